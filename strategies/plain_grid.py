"""The same reports for a run without any stage: plain float32 through Flower.

It changes no message. It counts bytes, and returns replies in the order of the nodes'
labels, since a sum of floats depends on the order and engines differ in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import inf

from flwr.app import Message
from flwr.serverapp import Grid

from fedcore.engine import WrappedGrid
from fedcore.pipeline.decline import DECLINE_CODE, add_reasons, counted_as
from fedcore.telemetry import RoundReport, Traffic, skipped
from strategies.exchange import array_bytes, content_bytes


class PlainGrid(WrappedGrid):
    """Reports what training exchanges cost.

    Args:
        grid: Does the work.
        labels: Every node's label, by node id.
        on_round: Called after every training exchange.
        on_begin: Called with the round's number before one.
        after_round: The last round that is over.
    """

    def __init__(
        self,
        grid: Grid,
        labels: Mapping[int, str],
        on_round: Callable[[RoundReport], None],
        *,
        on_begin: Callable[[int], None] = lambda _: None,
        after_round: int = 0,
    ) -> None:
        super().__init__(grid)
        self._labels = labels
        self._on_round = on_round
        self._on_begin = on_begin
        self._round = after_round

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
        replies = sorted(
            self._grid.send_and_receive(batch, timeout=timeout),
            key=lambda reply: (
                len(order.get(reply.metadata.src_node_id, "")),
                order.get(reply.metadata.src_node_id, ""),
            ),
        )
        if training:
            self._round += 1
            self._report(batch, replies)
        return replies

    def skip_round(self, invited: int, reason: str) -> None:
        """Count and report a round that is not held."""
        self._round += 1
        self._on_round(skipped(self._round, invited, reason, inf))

    def _report(self, batch: list[Message], replies: list[Message]) -> None:
        answers = [reply for reply in replies if reply.has_content()]
        declined: dict[str, int] = {}
        for reply in replies:
            if reply.has_error() and reply.error.code == DECLINE_CODE:
                declined = add_reasons(declined, {counted_as(reply.error.reason): 1})
        traffic = Traffic(
            up_payload=sum(array_bytes(reply.content) for reply in answers),
            up_total=sum(content_bytes(reply.content) for reply in answers),
            down_payload=sum(array_bytes(message.content) for message in batch),
            down_total=sum(content_bytes(message.content) for message in batch),
            uploads=len(answers),
            downloads=len(batch),
        )
        lost = {"upload": len(batch) - len(answers)} if len(answers) < len(batch) else {}
        self._on_round(
            RoundReport(
                round_number=self._round,
                attempts=1,
                invited=len(batch),
                survivors=len(answers),
                lost=lost,
                aborted=(),
                traffic=traffic,
                clipped=None,
                metrics={},
                neighbours=0,
                threshold=0,
                epsilon=inf,
                declined=declined,
            )
        )
