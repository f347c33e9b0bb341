"""The least noise that keeps a run within a target, whatever the mechanism.

Only two facts about a mechanism are used. Its noise multipliers that work at all
form an interval: below it a share of noise is too small for the mechanism's
theorem, above it the noise does not fit the ring. Within the interval, more noise
costs less epsilon. So the search needs the projected epsilon as a function of the
noise and nothing else: sensitivities that depend on the noise, because a wider
noise leaves a coarser rounding, are found with it.

    noise     1/16 ... too little | epsilon above target | within | does not fit
                                                          ^ the answer
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import floor, isfinite, log10, sqrt
from typing import Final, TypeAlias

Projection: TypeAlias = Callable[[float], float | None]
"""Epsilon of the whole run at a noise multiplier; None where that noise does not work."""

SMALLEST: Final = 1e-4
LARGEST: Final = 1e6
_START: Final = 1 / 16
_PRECISION: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Found:
    """A noise multiplier and what it costs.

    Attributes:
        noise_multiplier: The least that reaches the target; the largest that works where
            none does.
        epsilon: Of the whole run with it: above the target where none reaches it.
    """

    noise_multiplier: float
    epsilon: float


def least_noise(projection: Projection, target: float) -> Found | None:
    """Return the least noise that costs at most `target`, to six digits.

    Returns:
        Check `Found.epsilon` against the target; None if no noise works at all.

    Example:
        >>> found = least_noise(lambda noise: 10 / noise, target=4.0)
        >>> round(found.noise_multiplier, 4), found.epsilon <= 4.0
        (2.5, True)
        >>> least_noise(lambda noise: 10 / noise if noise < 2 else None, target=4.0).epsilon > 4
        True
    """
    low, high, best = _bracket(projection, target)
    while high > low * (1 + _PRECISION):
        middle = sqrt(low * high)
        epsilon = projection(middle)
        if epsilon is not None:
            best = (
                Found(middle, epsilon) if best is None or _better(epsilon, best, target) else best
            )
        # Noise that does not work lies beyond the answer only if smaller noise worked.
        enough = _within(epsilon, target) or (
            epsilon is None and best is not None and best.noise_multiplier < middle
        )
        low, high = (low, middle) if enough else (middle, high)
    return best


def not_positive(target: float, least: float) -> str:
    """Return why a `target` of 0 or less is refused, and the smallest that works.

    Args:
        target: That was asked for.
        least: Epsilon at the most noise that works; 0 where noise has no limit.

    Example:
        >>> not_positive(-1.0, 0.8509)
        'privacy.epsilon must be positive, got -1: the smallest that this run reaches is 0.851'
    """
    reached = (
        f"the smallest that this run reaches is {rounded_up(least):g}"
        if least > 0
        else "this run reaches any positive one"
    )
    return f"privacy.epsilon must be positive, got {target:g}: {reached}"


def rounded_up(epsilon: float) -> float:
    """Return `epsilon` to four digits, upwards: what a message names must work.

    Example:
        >>> rounded_up(1.33331), rounded_up(250.01)
        (1.334, 250.1)
    """
    if not isfinite(epsilon) or epsilon <= 0:
        return epsilon
    digit = 10.0 ** (floor(log10(epsilon)) - 3)
    return float(f"{(floor(epsilon / digit) + 1) * digit:.4g}")


def _bracket(projection: Projection, target: float) -> tuple[float, float, Found | None]:
    """Return noise that is too little, noise that is enough or too much, and the best so far."""
    noise, previous, best = _START, SMALLEST, None
    while noise < LARGEST:
        epsilon = projection(noise)
        if _within(epsilon, target):
            return _lower(projection, target, previous, Found(noise, epsilon or 0.0))
        if epsilon is not None:
            best = Found(noise, epsilon)
        elif best is not None:
            return best.noise_multiplier, noise, best
        previous, noise = noise, noise * sqrt(2)
    return noise, noise, best


def _lower(
    projection: Projection, target: float, previous: float, found: Found
) -> tuple[float, float, Found]:
    """Walk down from the very first step: a generous target needs next to no noise."""
    while previous == SMALLEST and found.noise_multiplier > 2 * SMALLEST:
        noise = found.noise_multiplier / 2
        epsilon = projection(noise)
        if epsilon is None or not _within(epsilon, target):
            return noise, found.noise_multiplier, found
        found = Found(noise, epsilon)
    return previous, found.noise_multiplier, found


def _within(epsilon: float | None, target: float) -> bool:
    # A billionth below the target absorbs the rounding of sums of curves.
    return epsilon is not None and epsilon <= target * (1 - 1e-9)


def _better(epsilon: float, best: Found, target: float) -> bool:
    """Return whether an epsilon replaces the best: the largest within, or else the smallest."""
    if _within(best.epsilon, target):
        return _within(epsilon, target)
    return epsilon < best.epsilon
