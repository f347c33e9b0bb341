"""What a coordinator's grids must not forget between two rounds, as a value.

All of it is public or the coordinator's own: no protocol state is kept, since a round
that was interrupted is never taken up in its middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedcore.codec import Broadcast
from fedcore.secagg import Certificate
from fedcore.vectors import Layout, RealVector


@dataclass(frozen=True, slots=True)
class DownlinkState:
    """The broadcast model, and which version each node has.

    Attributes:
        layout: Of the model.
        broadcast: What devices have, and the latest steps to it.
        versions: By node id.
    """

    layout: Layout
    broadcast: Broadcast
    versions: Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class GridState:
    """What a `SecureGrid` goes on from, beside its ledger.

    Attributes:
        run_id: Names the run in every plan; None before the first round.
        round_number: The last round that was begun.
        clip_norm: Of the next round, if the clip is adaptive; None without a clip.
        last: The last aggregate, shape [dim], from which a public support follows; None
            before the first.
        since: As in `strategies.counted`.
        counted: The last round in which an upload of each node counted.
        certificates: Of the enrolled devices that said who they are, by node id.
        downlink: With `downlink=delta`, from the first round on.
    """

    run_id: str | None
    round_number: int
    clip_norm: float | None
    last: RealVector | None = field(default=None, repr=False)
    since: int = 0
    counted: Mapping[int, int] = field(default_factory=dict)
    certificates: Mapping[int, Certificate] = field(default_factory=dict, repr=False)
    downlink: DownlinkState | None = field(default=None, repr=False)
