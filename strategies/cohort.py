"""Who takes part in a round, and a grid that shows nobody else.

Flower's strategies draw their clients from `grid.get_node_ids()` with Python's global
generator. `CohortGrid` shows a strategy exactly the round's cohort instead, so that an
unmodified strategy with ``fraction_train=1`` trains whom the policy chose: the same
devices on every engine, whatever ids their nodes have there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedcore.crypto import transcript_hash
from fedcore.engine import Clock, WrappedGrid
from fedcore.errors import ConfigurationError
from strategies.exchange import POLL_SECONDS, exchange
from strategies.matrix_run import MatrixRun

PROFILE = "query.profile"
"""Type of the message that asks a node who it is."""


def discover(grid: Grid, *, nodes: int, seconds: float, clock: Clock) -> dict[int, str]:
    """Return the label of every node, by node id.

    A node that answers `PROFILE` names itself (its partition in a simulation, its
    enrolled name in a fleet); one that does not is called by its node id.

    Args:
        grid: Where the nodes are.
        nodes: How many to wait for.
        seconds: How long to wait, for them to connect and then to answer.
        clock: Tells the time.

    Raises:
        ConfigurationError: Fewer nodes connected, or two use the same label.
    """
    deadline = clock.now() + seconds
    while len(ids := list(grid.get_node_ids())) < nodes:
        if clock.now() >= deadline:
            msg = (
                f"expected {nodes} nodes, found {len(ids)} after {seconds:g} s: start more nodes, "
                "or lower clients"
            )
            raise ConfigurationError(msg)
        clock.sleep(POLL_SECONDS)
    questions = {
        node_id: Message(RecordDict({"profile": ConfigRecord()}), node_id, PROFILE)
        for node_id in ids
    }
    labels = {node_id: str(node_id) for node_id in ids}
    for node_id, reply in exchange(grid, questions, seconds=seconds, clock=clock):
        if reply.has_content():
            label = reply.content.config_records.get("profile", ConfigRecord()).get("label")
            labels[node_id] = label if isinstance(label, str) else labels[node_id]
    if len(set(labels.values())) < len(labels):
        msg = "every node must have a label of its own, found one twice: check partition-id"
        raise ConfigurationError(msg)
    return labels


def choose_cohort(
    labels: Iterable[str],
    size: int,
    *,
    seed: int,
    round_number: int,
    used: Callable[[str], int] = lambda _: 0,
) -> list[str]:
    """Return `size` labels, uniformly chosen without replacement, by `seed` and round.

    Labels that were `used` less come first; those used alike are chosen uniformly.

    Example:
        >>> choose_cohort(["a", "b", "c"], 2, seed=0, round_number=1) == choose_cohort(
        ...     ["c", "b", "a"], 2, seed=0, round_number=1
        ... )
        True
    """
    context = f"{seed}/{round_number}".encode()
    ranked = sorted(
        labels,
        key=lambda label: (
            used(label),
            transcript_hash("fedcore/v1/cohort", context, label.encode()),
        ),
    )
    return ranked[:size]


class CohortGrid(WrappedGrid):
    """Shows the cohort of the current round; a training exchange ends the round.

    Args:
        grid: Does the work.
        labels: Every node's label, by node id.
        size: Of a cohort.
        seed: Of the choice.
        first_round: Number of the round that comes first.
        spacing: Who may take part in which round, and how often each did; if None,
            everybody may.
    """

    def __init__(
        self,
        grid: Grid,
        labels: Mapping[int, str],
        size: int,
        seed: int,
        first_round: int = 1,
        *,
        spacing: MatrixRun | None = None,
    ) -> None:
        super().__init__(grid)
        self._nodes = {label: node_id for node_id, label in labels.items()}
        self._size = size
        self._seed = seed
        self._round = first_round
        self._spacing = spacing

    def get_node_ids(self) -> list[int]:
        """Return the nodes of the current cohort.

        Raises:
            BudgetExhaustedError: Too few may take part in this round.
        """
        choose = partial(choose_cohort, size=self._size, seed=self._seed, round_number=self._round)
        if self._spacing is None:
            cohort = choose(self._nodes)
        else:
            may = self._spacing.candidates(self._nodes, self._round, wanted=self._size)
            cohort = choose(may, used=self._spacing.participations)
        return [self._nodes[label] for label in cohort]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass messages on; training messages end the round."""
        batch = list(messages)
        replies = self._grid.send_and_receive(batch, timeout=timeout)
        if any(message.metadata.message_type.startswith("train") for message in batch):
            self._round += 1
        return replies
