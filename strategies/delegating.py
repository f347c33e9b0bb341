"""A strategy that passes everything on to another: what wrappers have in common."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies.linear import refuse_nonlinear


class Delegating(Strategy):
    """Passes everything on, with a number added to Flower's count of rounds.

    Args:
        inner: The strategy.
        after: The last round that is over.
    """

    def __init__(self, inner: Strategy, after: int = 0) -> None:
        self._inner = inner
        self._after = after

    @property
    def inner(self) -> Strategy:
        """The strategy inside."""
        return self._inner

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the training messages of a round."""
        return self._inner.configure_train(self._after + server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return what the strategy makes of the replies."""
        return self._inner.aggregate_train(self._after + server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the evaluation messages of a round."""
        return self._inner.configure_evaluate(self._after + server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return what the strategy makes of the replies."""
        return self._inner.aggregate_evaluate(self._after + server_round, replies)

    def summary(self) -> None:
        """Log the strategy's own summary."""
        self._inner.summary()

    @property
    def requires_individual_updates(self) -> bool:
        """Whether the strategy inside cannot work on a sum."""
        try:
            refuse_nonlinear(self._inner)
        except ValueError:
            return True
        return False
