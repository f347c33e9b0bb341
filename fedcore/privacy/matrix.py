"""Noise that is correlated over rounds, so that most of it cancels in the model.

A model is a running sum of the rounds' updates: with A the lower triangle of ones and x
the rounds' sums, training sees A x. Independent noise in every round adds up in A x;
the matrix mechanism factors A = B C, releases C x + Z with independent Gaussian Z, and
reads the rounds off it, which is the same as releasing

    x + C^-1 Z,        the prefix sums of which are  A x + B Z          [CCMRT22, DMRST22].

*C* is lower triangular, Toeplitz and banded: its first column is c_0, ..., c_{b-1}, the
first b coefficients of (1 - x)^-1/2, whose square is A,

    c_0 = 1,   c_j = c_{j-1} (2j - 1) / (2j)                     [FHU23, HUU23, KL24].

*Noise.* w = C^-1 Z solves C w = Z row by row: w_t = z_t - c_1 w_{t-1} - ... . Only the
last b - 1 rows are kept. The c_j decrease, so all roots of their polynomial lie outside
the unit circle (Enestrom and Kakeya): errors of rounding fade instead of growing.

*Sensitivity.* One device contributes a vector of norm at most 1 in each of at most k
rounds, any two of them at least b apart. The columns of C at these rounds then have no
row in common, so they are orthogonal, whatever the vectors are, and

    |C x - C x'| <= sqrt(k) |c|                                  [CGMMRX23, section 4.1].

All rounds together are *one* Gaussian mechanism with that sensitivity, also if later
rounds depend on earlier releases [DMRST22, Theorem 2.1]. After t rounds a device can
have taken part in ceil(t / separation) of them: that many of the k parts are spent.

Nothing here relies on how devices are sampled: that they keep their distance is enough,
and both sides see to it (`strategies.matrix_run`, `clients.participation`).

[CCMRT22]  Choquette-Choo, McMahan, Rush and Thakurta, https://arxiv.org/abs/2211.06530
[CGMMRX23] Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta and Xu,
           https://arxiv.org/abs/2306.08153
[DMRST22]  Denisov, McMahan, Rush, Smith and Thakurta, https://arxiv.org/abs/2202.08312
[FHU23]    Fichtenberger, Henzinger and Upadhyay, https://arxiv.org/abs/2202.11205
[HUU23]    Henzinger, Upadhyay and Upadhyay, https://arxiv.org/abs/2211.05006
[KL24]     Kalinin and Lampert, https://arxiv.org/abs/2405.13763
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.crypto import transcript_hash
from fedcore.privacy.calibration import MAX_INFLATION
from fedcore.privacy.rules import check, given, noise_rules
from fedcore.privacy.samplers import SEED_BYTES, standard_normals

Reals: TypeAlias = npt.NDArray[np.float64]

MOST_BANDS: Final = 4096
CARRIED: Final = 3
"""The ring has room for the noise of so many rounds at once: a run that aborts three
rounds in a row is stopped."""
_HORIZON: Final = 1 << 14
"""Rows of C^-1 that are summed for its norm; later ones add nothing that a float shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixGaussian:
    """Correlated noise, added to the sum by the coordinator before it is published.

    It protects from whoever reads the models; the coordinator sees the exact sums.

    Attributes:
        noise_multiplier: Standard deviation of Z over the sensitivity of the whole run: the
            run costs what one Gaussian mechanism with this multiplier costs. None to have it
            found for `epsilon`.
        epsilon: What all rounds together may cost; None if the noise is given.
        delta: Of the (epsilon, delta) that the ledger reports; below 1 / devices.
        epsilon_budget: Nothing is released beyond it; None for no limit other than `epsilon`.
        max_inflation: A ring in which rounding costs more than this factor of noise is refused.
        bands: Width of C: 1 is independent noise, more cancels better.
        min_separation: A device sits out until so many rounds after it took part; >= bands.
        participations: A device takes part in at most so many rounds of the run.
    """

    kind: Literal["matrix_gaussian"] = "matrix_gaussian"
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float
    epsilon_budget: float | None = None
    max_inflation: float = MAX_INFLATION
    bands: int
    min_separation: int
    participations: int

    def __post_init__(self) -> None:
        """Check ranges."""
        check(
            *noise_rules(
                self.noise_multiplier,
                self.epsilon,
                delta=self.delta,
                epsilon_budget=self.epsilon_budget,
                max_inflation=self.max_inflation,
            ),
            (
                1 <= self.bands <= MOST_BANDS,
                f"privacy.bands must be in 1..{MOST_BANDS}, got {self.bands}",
            ),
            (
                self.bands <= self.min_separation < 1 << 32,
                f"privacy.min_separation must be at least bands={self.bands}, "
                f"got {self.min_separation}: columns that overlap are not orthogonal",
            ),
            (
                1 <= self.participations < 1 << 32,
                f"privacy.participations must be at least 1, got {self.participations}",
            ),
        )

    @property
    def coefficients(self) -> Reals:
        """First column of C, shape [bands]."""
        return square_root_coefficients(self.bands)

    @property
    def sensitivity(self) -> float:
        """Largest change of C x if all contributions of one device, of norm 1, are removed."""
        return sensitivity(self.coefficients, self.participations)

    @property
    def row_multiplier(self) -> float:
        """Standard deviation of z_t, the noise of a row, over the norm of one contribution."""
        return given(self.noise_multiplier, self.epsilon) * self.sensitivity

    @property
    def released_multiplier(self) -> float:
        """Largest standard deviation of what is added to a round, over the same norm."""
        return self.row_multiplier * max(
            released_spread(self.bands, rounds) for rounds in range(1, CARRIED + 1)
        )


@lru_cache(maxsize=8)
def square_root_coefficients(bands: int) -> Reals:
    """Return the first coefficients of (1 - x)^-1/2, shape [bands]. Read-only.

    Example:
        >>> square_root_coefficients(4).tolist()
        [1.0, 0.5, 0.375, 0.3125]
    """
    j = np.arange(1, bands)
    coefficients = np.concatenate([[1.0], np.cumprod((2 * j - 1) / (2 * j))])
    coefficients.setflags(write=False)
    return coefficients


def sensitivity(coefficients: Reals, participations: int) -> float:
    """Return sqrt(k) |c|: of C x, for contributions of norm 1 at least `bands` rounds apart."""
    return sqrt(participations) * float(np.linalg.norm(coefficients))


def spent_participations(round_number: int, *, separation: int, participations: int) -> int:
    """Return in how many of the first `round_number` rounds one device can have taken part.

    Example:
        >>> [spent_participations(t, separation=3, participations=2) for t in range(1, 9)]
        [1, 1, 1, 2, 2, 2, 2, 2]
    """
    return min(participations, -(-round_number // separation))


def inverse_column(coefficients: Reals, rows: int) -> Reals:
    """Return the first column of C^-1, shape [rows]."""
    from scipy.signal import lfilter  # noqa: PLC0415 - only where correlated noise is planned

    impulse = np.zeros(rows)
    impulse[0] = 1.0
    column: Reals = lfilter([1.0], coefficients, impulse)
    return column


@lru_cache(maxsize=32)
def released_spread(bands: int, rounds: int) -> float:
    """Return the standard deviation of `rounds` successive rows of w together; 1 for z_t."""
    column = inverse_column(square_root_coefficients(bands), _HORIZON)
    return float(np.linalg.norm(np.convolve(column, np.ones(rounds))))


def prefix_errors(coefficients: Reals, rounds: int) -> Reals:
    """Return the standard deviation of the noise in each prefix sum, shape [rounds].

    In units of that of z_t; times the sensitivity it is the error at equal privacy.
    """
    return np.sqrt(np.cumsum(np.cumsum(inverse_column(coefficients, rounds)) ** 2))


class CorrelatedNoise:
    """The rows of C^-1 Z, one after another, for Z of standard deviation 1.

    Row t of Z follows from the seed and t alone. Nothing but the window of the
    recurrence is kept, and that can be made again from the seed: the same seed and the
    same number of rows give the same noise.

    Args:
        seed: 32 secret bytes, of this run alone.
        bands: Width of C.
        dim: Length of a row.
    """

    def __init__(self, seed: bytes, *, bands: int, dim: int) -> None:
        check((len(seed) == SEED_BYTES, f"seed must be {SEED_BYTES} bytes, got {len(seed)}"))
        self._seed = seed
        self._coefficients = square_root_coefficients(bands)
        self._dim = dim
        self._window: deque[Reals] = deque(maxlen=bands - 1)
        self._rows = 0

    @property
    def rows(self) -> int:
        """How many rows were made."""
        return self._rows

    def next(self) -> Reals:
        """Return the next row, shape [dim], float64."""
        self._rows += 1
        row = standard_normals(row_seed(self._seed, self._rows), self._dim)
        for coefficient, earlier in zip(self._coefficients[1:], self._window, strict=False):
            row -= coefficient * earlier
        self._window.appendleft(row)
        return row.copy()

    def skip_to(self, rows: int) -> None:
        """Make rows until there are `rows`, and leave them unused."""
        while self._rows < rows:
            self.next()


def row_seed(seed: bytes, row: int) -> bytes:
    """Return the 32 secret bytes that one row of Z is drawn from."""
    return transcript_hash("fedcore/v1/noise-row", seed, row.to_bytes(8, "little"))


def stream_name(seed: bytes) -> str:
    """Return a public name of the noise that follows from `seed`: 16 hexadecimal digits."""
    return transcript_hash("fedcore/v1/noise-stream", seed)[:8].hex()
