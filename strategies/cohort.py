"""Who takes part in a round, and a grid that shows nobody else.

Flower's strategies draw their clients from `grid.get_node_ids()` with Python's global
generator. `CohortGrid` shows a strategy exactly the round's cohort instead, so that an
unmodified strategy with ``fraction_train=1`` trains whom the policy chose: the same
devices on every engine, whatever ids their nodes have there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedcore.engine import Clock, WrappedGrid
from fedcore.errors import ConfigurationError
from fedcore.job import Profile
from strategies.exchange import POLL_SECONDS, exchange
from strategies.sampling import Cohorts

PROFILE = "query.profile"
"""Type of the message that asks a node who it is."""
RETURN_SECONDS = 60.0
"""How long a run that goes on waits for the nodes that it knows."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The nodes of a run.

    Attributes:
        labels: By node id.
        profiles: What the nodes told of themselves, by node id; empty if nobody asked.
    """

    labels: Mapping[int, str]
    profiles: Mapping[int, Profile] = field(default_factory=dict)


def discover(
    grid: Grid,
    *,
    nodes: int,
    seconds: float,
    clock: Clock,
    wanted: Sequence[str] = (),
    known: Mapping[int, str] | None = None,
) -> Fleet:
    """Return who the nodes are, and what they tell of themselves.

    A node that answers `PROFILE` names itself (its partition in a simulation, its
    enrolled name in a fleet); one that does not is called by its node id.

    A run that goes on knows its nodes. It waits for them, but not for ever: one that is
    away stays in the population, is drawn like every other, and is lost when it is.

    Args:
        grid: Where the nodes are.
        nodes: How many to wait for.
        seconds: How long to wait, for them to connect and then to answer.
        clock: Tells the time.
        known: Labels that an earlier process found, by node id.
        wanted: Names of the fields of a profile that are asked for.

    Raises:
        ConfigurationError: Fewer nodes connected, or two use the same label.
    """
    earlier = known or {}
    patience = min(seconds, RETURN_SECONDS) if len(earlier) >= nodes else seconds
    deadline = clock.now() + patience
    while len(ids := list(grid.get_node_ids())) < nodes:
        if clock.now() >= deadline:
            if len(earlier) >= nodes:
                break
            msg = (
                f"expected {nodes} nodes, found {len(ids)} after {seconds:g} s: start more nodes, "
                "or lower clients"
            )
            raise ConfigurationError(msg)
        clock.sleep(POLL_SECONDS)
    # Who told of itself before is asked again: what it told is not kept.
    strangers = [node_id for node_id in ids if wanted or node_id not in earlier]
    labels = {node_id: earlier[node_id] for node_id in ids if node_id in earlier}
    found = ask(grid, strangers, seconds=seconds, clock=clock, wanted=wanted)
    labels |= found.labels
    # A device that came back under another id is the one of its label, and no second one.
    here = set(labels.values())
    labels |= {node_id: label for node_id, label in earlier.items() if label not in here}
    if len(set(labels.values())) < len(labels):
        msg = "every node must have a label of its own, found one twice: check partition-id"
        raise ConfigurationError(msg)
    return Fleet(labels, found.profiles)


def ask(
    grid: Grid,
    node_ids: Iterable[int],
    *,
    seconds: float,
    clock: Clock,
    wanted: Sequence[str] = (),
) -> Fleet:
    """Ask nodes who they are; return what they answer in time, and the ids of the others."""
    asked = ConfigRecord({"wanted": list(wanted)} if wanted else {})
    labels = {node_id: str(node_id) for node_id in node_ids}
    questions = {
        node_id: Message(RecordDict({"profile": asked}), node_id, PROFILE) for node_id in labels
    }
    profiles = dict.fromkeys(labels, Profile()) if wanted else {}
    for node_id, reply in exchange(grid, questions, seconds=seconds, clock=clock):
        if reply.has_content():
            record = reply.content.config_records.get("profile", ConfigRecord())
            if wanted:
                profiles[node_id] = Profile.of({name: record.get(name) for name in wanted})
            label = record.get("label")
            labels[node_id] = label if isinstance(label, str) else labels[node_id]
    return Fleet(labels, profiles)


class CohortGrid(WrappedGrid):
    """Shows the cohort of the current round; a training exchange ends the round.

    Args:
        grid: Does the work.
        cohorts: Who is in which.
        refusal: Why a round cannot be held with so many clients, or None if it can; asked
            about cohorts whose size is left to chance.
        on_skip: Told the size of a cohort that is too small, and the reason, instead of
            training.
    """

    def __init__(
        self,
        grid: Grid,
        cohorts: Cohorts,
        *,
        refusal: Callable[[int], str | None] = lambda _: None,
        on_skip: Callable[[int, str], None] = lambda _, __: None,
    ) -> None:
        super().__init__(grid)
        self._cohorts = cohorts
        self._refusal = refusal
        self._on_skip = on_skip
        self._shown = False

    def get_node_ids(self) -> list[int]:
        """Return the nodes of the current cohort."""
        self._shown = True
        return self._cohorts.current()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass messages on; training messages end the round.

        A draw with which no round can be held ends it too: nothing is sent, nothing is
        released, and the strategy keeps its model. Whom to draw depended on nobody's data,
        so neither does whether the round was held.
        """
        batch = list(messages)
        training = any(message.metadata.message_type.startswith("train") for message in batch)
        # A strategy that was shown nobody sends nothing.
        if not training and (batch or not self._shown or self._cohorts.current()):
            return self._grid.send_and_receive(batch, timeout=timeout)
        self._shown = False
        if self._cohorts.varies and (problem := self._problem()) is not None:
            self._on_skip(len(self._cohorts.current()), problem)
            self._cohorts.finish()
            return []
        replies = self._grid.send_and_receive(batch, timeout=timeout)
        self._cohorts.finish()
        return replies

    def _problem(self) -> str | None:
        drawn = len(self._cohorts.current())
        if not drawn:
            return "nobody was drawn: raise clients_per_round"
        refusal = self._refusal(drawn)
        return (
            refusal and f"the draw has a size ({drawn}) with which no round can be held: {refusal}"
        )
