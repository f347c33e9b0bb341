"""The one way in which this package refuses a value, and the rules that mechanisms share."""

from __future__ import annotations

from math import inf, isfinite
from typing import TypeAlias

from fedcore.errors import ConfigurationError

Rule: TypeAlias = tuple[bool, str]
"""Whether it holds, and what to say if not."""


def check(*rules: Rule) -> None:
    """Raise the message of the first rule that does not hold.

    Raises:
        ConfigurationError: A rule does not hold.
    """
    for holds, message in rules:
        if not holds:
            raise ConfigurationError(message)


def given(noise_multiplier: float | None, epsilon: float | None) -> float:
    """Return a noise multiplier that is given, not to be found for a target.

    Raises:
        ConfigurationError: There is a target instead.
    """
    if noise_multiplier is None:
        msg = (
            f"privacy.epsilon={epsilon:g} is for all rounds together, and a round does "
            "not know how many there are: find the noise first, with fedcore.pipeline.resolve"
            "(plan, rounds=..., clients=..., dim=...)"
        )
        raise ConfigurationError(msg)
    return noise_multiplier


def noise_rules(
    noise_multiplier: float | None,
    epsilon: float | None,
    *,
    delta: float,
    epsilon_budget: float | None,
    max_inflation: float,
) -> tuple[Rule, ...]:
    """Return what every mechanism with noise in a sum demands of its parameters."""
    return (
        (
            noise_multiplier is None or 0 < noise_multiplier < inf,
            f"privacy.noise_multiplier must be in (0, inf), got {noise_multiplier}: "
            "choose privacy=none for no noise",
        ),
        (0 < delta < 1, f"privacy.delta must be in (0, 1), got {delta}: use less than 1 / devices"),
        (
            (noise_multiplier is None) != (epsilon is None),
            "exactly one of privacy.noise_multiplier and privacy.epsilon must be given, got "
            f"{noise_multiplier} and {epsilon}: set the other to null",
        ),
        (
            # What a run cannot reach, 0 and less included, is refused once its size is known:
            # then the refusal names the smallest epsilon that it can reach.
            epsilon is None or isfinite(epsilon),
            f"privacy.epsilon must be a finite number, got {epsilon}: choose privacy=none for no "
            "limit",
        ),
        (
            epsilon_budget is None or 0 < epsilon_budget < inf,
            f"privacy.epsilon_budget must be in (0, inf) or null, got {epsilon_budget}: "
            "leave it out for no limit",
        ),
        (
            1 < max_inflation < inf,
            f"privacy.max_inflation must be above 1, got {max_inflation}: "
            "2 is the default, 1.01 asks for a ring that costs nothing",
        ),
    )
