"""Correlated noise for the sums of a run: rows of C^-1 Z in the ring of each round.

Every round rotates by its own signs, and may scale differently; the noise lives where
these do not matter, in the coordinates of the model and in multiples of the largest
contribution. With R the round's rotation, D the bound on a rounded vector and q_i the
devices' integers, a round publishes

    lift( (sum q_i + floor(R (D m w) + 1/2)) mod 2^b ),

with w the round's row and m the deviation of Z. Since the q_i are whole, that is a
function of sum q_i + R (D m w), and so of  sum (R^T q_i / D) + m w: vectors of norm at
most 1 in fixed coordinates, plus the matrix mechanism's noise.

*Low bits.* Nothing of a floating-point number is published but the whole number it is
rounded to. Its distribution is that of a rounded Gaussian only up to the precision of a
float64; unlike `central_gaussian`, no bound on that difference enters delta.

*Aborted rounds* publish nothing, but their rows exist. A round without a sum is a round
to which nobody contributed, so its row is published together with the next: the noise
in the model is then B Z, as if nothing had happened. A row that was drawn is never used
again, whatever became of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedcore.codec.rotate import rotate
from fedcore.errors import ConfigurationError, LocalProtocolError
from fedcore.pipeline.bound import BoundRound
from fedcore.privacy import CorrelatedNoise, MatrixGaussian, stream_name
from fedcore.vectors import IntegerVector


@dataclass(slots=True)
class NoiseTape:
    """The noise of one run, which can only be wound forward.

    Attributes:
        mechanism: The run's.
        seed: 32 secret bytes, of this run alone: whoever has them takes the noise off.
        last: The round that was drawn last; 0 for none.
        dim: Length of a row; None before the first.
        keep: Called when a row is used up, before it is returned: what it writes must be
            durable, or a restart could use the row for other data.
    """

    mechanism: MatrixGaussian
    seed: bytes = field(repr=False)
    last: int = 0
    dim: int | None = None
    keep: Callable[[], None] = lambda: None
    _rows: CorrelatedNoise | None = field(default=None, repr=False)

    @property
    def stream(self) -> str:
        """Public name of this noise, for the ledger."""
        return stream_name(self.seed)

    def draw(self, bound: BoundRound, /) -> IntegerVector:
        """Return the noise of a round later than all before, shape [bound.update_dim].

        Raises:
            LocalProtocolError: The row was used before, or the round is another run's.
            ConfigurationError: The model's size has changed.
        """
        plan, calibration = bound.plan, bound.calibration
        if calibration is None or plan.run.privacy != self.mechanism:
            msg = f"this noise is of {self.mechanism}, the round wants {plan.run.privacy}"
            raise LocalProtocolError(msg)
        if plan.round_number <= self.last:
            msg = (
                f"the noise of round {self.last} was the last that was used, asked for round "
                f"{plan.round_number}: a row is used once"
            )
            raise LocalProtocolError(msg)
        if self.dim not in {None, bound.update_dim}:
            msg = (
                f"the noise of this run has {self.dim} coordinates, the model {bound.update_dim}: "
                "start a new run for another model"
            )
            raise ConfigurationError(msg)
        rows = self._wound(bound.update_dim)
        noise = np.sum([rows.next() for _ in range(plan.round_number - self.last)], axis=0)
        self.last, self.dim = plan.round_number, bound.update_dim
        self.keep()
        noise *= self.mechanism.row_multiplier * calibration.rounded_norm
        turned = rotate(noise, plan.stage_seed("rotation"))
        return np.floor(turned + 0.5).astype(np.int64)

    def skip_to(self, round_number: int) -> None:
        """Leave out the rows until that of a round, durably: to see fewer tells nobody more."""
        self.last = max(self.last, round_number)
        self._rows = None
        self.keep()

    def _wound(self, dim: int) -> CorrelatedNoise:
        """Return the rows, wound to the last one that was used."""
        if self._rows is None:
            self._rows = CorrelatedNoise(self.seed, bands=self.mechanism.bands, dim=dim)
            self._rows.skip_to(self.last)
        return self._rows
