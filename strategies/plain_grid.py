"""The same reports for a run without any stage: plain float32 through Flower.

It changes no message. It counts bytes, and returns replies in the order of the nodes'
labels, since a sum of floats depends on the order and engines differ in theirs. Where
more nodes are asked than are wanted, it returns the first replies that are enough. All
that it returns is held at once: a strategy of Flower's wants a list.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from math import inf

from flwr.app import Message
from flwr.serverapp import Grid

from fedcore.engine import Clock, SystemClock, WrappedGrid
from fedcore.pipeline.decline import DECLINE_CODE, add_reasons, counted_as
from fedcore.telemetry import RoundReport, Traffic, skipped
from strategies.exchange import RETRY_AT_ONCE, exchange
from strategies.goals import in_turn
from strategies.stragglers import Dropped, Stragglers
from strategies.wire_bytes import array_bytes, content_bytes


class PlainGrid(WrappedGrid):
    """Reports what training exchanges cost.

    Args:
        grid: Does the work.
        labels: Every node's label, by node id.
        on_round: Called after every training exchange.
        on_begin: Called with the round's number before one.
        after_round: The last round that is over.
        wanted: How many replies are enough; None for all.
        seed: Public; decides in which order nodes are asked where not all are wanted.
        clock: For the deadline.
        on_outcome: As in `SecureGrid`.
    """

    def __init__(
        self,
        grid: Grid,
        labels: Mapping[int, str],
        on_round: Callable[[RoundReport], None],
        *,
        on_begin: Callable[[int], None] = lambda _: None,
        after_round: int = 0,
        wanted: int | None = None,
        seed: int = 0,
        clock: Clock | None = None,
        on_outcome: Callable[[Collection[int], Collection[int]], None] = lambda _, __: None,
    ) -> None:
        super().__init__(grid)
        self._labels = labels
        self._on_round = on_round
        self._on_begin = on_begin
        self._round = after_round
        self._wanted = wanted
        self._seed = seed
        self._clock = clock or SystemClock()
        self._on_outcome = on_outcome
        self._stragglers = Stragglers()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass messages on, sort the replies, and report on training."""
        batch = list(messages)
        order = {
            message.metadata.dst_node_id: self._labels.get(message.metadata.dst_node_id, "")
            for message in batch
        }
        training = any(message.metadata.message_type.startswith("train") for message in batch)
        if training:
            self._on_begin(self._round + 1)
            replies = self._train(batch, order, inf if timeout is None else timeout)
        else:
            replies = list(self._grid.send_and_receive(batch, timeout=timeout))
        return sorted(
            replies,
            key=lambda reply: (
                len(order.get(reply.metadata.src_node_id, "")),
                order.get(reply.metadata.src_node_id, ""),
            ),
        )

    def _train(
        self, batch: list[Message], labels: Mapping[int, str], seconds: float
    ) -> list[Message]:
        """Return the replies of a round, errors included, and report on it."""
        self._round += 1
        wanted = len(batch) if self._wanted is None else min(self._wanted, len(batch))
        messages = {message.metadata.dst_node_id: message for message in batch}
        if wanted < len(batch):
            turn = in_turn(messages, labels, f"{self._seed}/{self._round}")
            messages = {node_id: messages[node_id] for node_id in turn}
        replies: dict[int, Message] = {}
        answered: set[int] = set()

        for node_id, reply in exchange(
            self._grid,
            messages,
            seconds=seconds,
            clock=self._clock,
            retry_after=RETRY_AT_ONCE,
            enough=lambda: wanted < len(batch) and len(answered) >= wanted,
            stragglers=self._stragglers,
        ):
            replies[node_id] = reply
            if reply.has_content():
                answered.add(node_id)
        dropped = self._stragglers.finish(self._grid)
        declined = {node_id for node_id, reply in replies.items() if _declines(reply)}
        alive = answered | dropped.nodes
        self._on_outcome(alive, messages.keys() - alive - declined)
        surplus = len(batch) - len(replies) if len(answered) >= wanted else 0
        self._report(batch, list(replies.values()), dropped, surplus)
        return list(replies.values())

    def skip_round(self, invited: int, reason: str) -> None:
        """Count and report a round that is not held."""
        self._round += 1
        self._on_round(skipped(self._round, invited, reason, inf))

    def _report(
        self, batch: list[Message], replies: list[Message], dropped: Dropped, surplus: int
    ) -> None:
        answers = [reply for reply in replies if reply.has_content()]
        declined: dict[str, int] = {}
        for reply in replies:
            if _declines(reply):
                declined = add_reasons(declined, {counted_as(reply.error.reason): 1})
        traffic = Traffic(
            up_payload=sum(array_bytes(reply.content) for reply in answers),
            up_total=sum(content_bytes(reply.content) for reply in answers),
            down_payload=sum(array_bytes(message.content) for message in batch),
            down_total=sum(content_bytes(message.content) for message in batch),
            uploads=len(answers),
            downloads=len(batch),
        )
        traffic += dropped.traffic
        lost = len(batch) - len(answers) - surplus
        self._on_round(
            RoundReport(
                round_number=self._round,
                attempts=1,
                invited=len(batch),
                survivors=len(answers),
                lost={"upload": lost} if lost else {},
                aborted=(),
                traffic=traffic,
                clipped=None,
                metrics={},
                neighbours=0,
                threshold=0,
                epsilon=inf,
                declined=declined,
                surplus=surplus,
                late=dropped.late,
                duplicates=dropped.duplicates,
            )
        )


def _declines(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == DECLINE_CODE
