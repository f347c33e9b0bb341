"""A strategy that goes on with a smaller model after some round.

Flower hands the global model from round to round through `configure_train`. Here the
model is pruned on its way into the first round that is to train the smaller one, and a
fresh copy of the strategy takes over: a server's momentum has the shape of the model it
was gathered on, and says nothing about one without its neighbours. Rounds count on, so
what devices and ledger know of them stays true.

If that round is aborted, Flower keeps the large model and offers it again. It is pruned
again: equal models are pruned equally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from strategies.delegating import Delegating

Shrink = Callable[[ArrayRecord], ArrayRecord]
"""Returns the smaller model; one that is small already, as it is."""


class PrunedStrategy(Delegating):
    """Passes everything on to a strategy, and from some round on a smaller model.

    Args:
        fresh: Makes the strategy; called once for each size of the model.
        shrink: Prunes.
        after_round: The last round of the large model.
    """

    def __init__(self, fresh: Callable[[], Strategy], shrink: Shrink, after_round: int) -> None:
        super().__init__(fresh())
        self._fresh = fresh
        self._shrink = shrink
        self._after_round = after_round
        self._shrunk = False

    @property
    def shrunk(self) -> bool:
        """Whether the strategy inside is that of the smaller model."""
        return self._shrunk

    def take_over(self) -> None:
        """Let a fresh strategy go on, with the smaller model."""
        self._shrunk, self._inner = True, self._fresh()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the training messages of a round, with the model of its size."""
        if server_round > self._after_round:
            arrays = self._shrink(arrays)
            if not self._shrunk:
                self.take_over()
        return super().configure_train(server_round, arrays, config, grid)
