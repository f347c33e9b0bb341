"""Which uploads went into the model, for devices that keep what they have not sent.

With error feedback a device must know whether its last upload counted (`clients.feedback`).
It cannot see that: an upload may come too late, get lost on the way back, or belong to an
attempt that is given up. So the coordinator keeps one number for each node, and tells it
with the next request for an upload. The number is about that node alone, and it is no
secret. Only what became a mean counts: a sum that was revealed and then refused did not
change the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counted:
    """The last round in which an upload of each node counted.

    Attributes:
        since: The last round before this coordinator took over; 0 from the first round on.
            What counted until then it does not know, and devices give nothing of that
            time a second time.
        rounds: By node id, of those that have counted since.
    """

    since: int = 0
    rounds: dict[int, int] = field(default_factory=dict)

    def last(self, node_id: int) -> int:
        """Return the round to name to a node."""
        return self.rounds.get(node_id, self.since)

    def add(self, node_ids: Iterable[int], round_number: int) -> None:
        """Note whose uploads made the mean of a round."""
        self.rounds |= dict.fromkeys(node_ids, round_number)
