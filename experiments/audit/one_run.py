"""A lower bound on epsilon from one training run.

Each of m units took part or not by a fair coin of its own. Whoever saw the result
guesses the coins of some of them; v of r guesses are right. If the mechanism is
(epsilon, delta)-DP for one unit more or less, then the chance of that is at most

    beta + 2 m delta alpha,   q = e^epsilon / (1 + e^epsilon),
    beta  = P[Bin(r, q) >= v],
    alpha = max over i of (P[Bin(r, q) >= v - i] - beta) / i        [SNJ23, Theorem 5.2]

An epsilon for which that is below 5 % is refuted. Unlike counting errors over units
of one run as if they were runs [JUO20], this needs no independence between the units'
scores: only that the coins are fair, and that guesses depend on the result alone.

How many units to guess must be fixed before the scores are known. A few numbers are
tried, and each at a fraction of the 5 %. Even if all guesses are right the bound stops
near log(r / 3): r guesses cannot tell more.

[JUO20] Jagielski, Ullman and Oprea, "Auditing Differentially Private Machine Learning".
        https://arxiv.org/abs/2006.07709
[SNJ23] Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run".
        https://arxiv.org/abs/2305.08846
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Scores: TypeAlias = npt.NDArray[np.float64]
Coins: TypeAlias = npt.NDArray[np.bool_]

CONFIDENCE: Final = 0.95
SHARES: Final = (0.25, 0.5, 0.75)
"""Fractions of the units that are guessed: the highest scores as in, as many of the lowest as
out. Not all of them, since coins seldom fall half and half."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What one run proves.

    Attributes:
        epsilon: No smaller one is compatible with the guesses, at `CONFIDENCE`.
        guesses: How many units were guessed.
        correct: How many of them rightly.
        units: How many there were.
        ceiling: The bound if every guess had been right.
    """

    epsilon: float
    guesses: int
    correct: int
    units: int
    ceiling: float


def bound_from_scores(scores: Scores, coins: Coins, delta: float) -> Bound:
    """Return the best bound over the shares of units to guess.

    Args:
        scores: Of each unit, shape [units]; higher means that it took part.
        coins: Whether it did, shape [units].
        delta: The probability that goes with epsilon.
    """
    order = np.argsort(scores, kind="stable")
    allowed = (1 - CONFIDENCE) / len(SHARES)
    found = []
    for share in SHARES:
        half = max(1, round(share * len(scores) / 2))
        low, high = order[:half], order[-half:]
        guesses = 2 * half
        correct = int(np.count_nonzero(coins[high]) + np.count_nonzero(~coins[low]))
        found.append(
            Bound(
                lower_bound(len(scores), guesses, correct, delta, allowed),
                guesses,
                correct,
                len(scores),
                lower_bound(len(scores), guesses, guesses, delta, allowed),
            )
        )
    return max(found, key=lambda bound: bound.epsilon)


def lower_bound(units: int, guesses: int, correct: int, delta: float, allowed: float) -> float:
    """Return the largest epsilon that `correct` of `guesses` refutes; 0 if it refutes none.

    Args:
        units: How many took part by a fair coin.
        guesses: How many were guessed.
        correct: How many of them rightly.
        delta: The probability that goes with epsilon.
        allowed: Chance of a wrong verdict.

    Example:
        >>> round(lower_bound(100, 100, 100, delta=0.0, allowed=0.05), 2)
        3.49
        >>> lower_bound(100, 100, 50, delta=0.0, allowed=0.05)
        0.0
    """
    from scipy.optimize import brentq  # noqa: PLC0415 - only where an audit runs

    def excess(epsilon: float) -> float:
        return p_value(units, guesses, correct, epsilon, delta) - allowed

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def p_value(units: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return how likely (epsilon, delta)-DP makes at least so many right guesses, at most."""
    from scipy.special import expit  # noqa: PLC0415 - only where an audit runs
    from scipy.stats import binom  # noqa: PLC0415 - likewise

    right = float(expit(epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    steps = np.arange(1, correct + 1)
    alpha = float(np.max((binom.sf(correct - steps - 1, guesses, right) - beta) / steps, initial=0))
    return min(1.0, beta + 2 * units * delta * alpha)
