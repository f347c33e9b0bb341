"""How the cohort of a round was chosen, as executed, and what that may be worth.

A device that was probably not asked is better protected, if nobody knows whether it
was. Three conditions stand between that sentence and a smaller epsilon.

*Whom it protects from.* The coordinator knows the cohort: from it sampling hides
nothing. What is claimed here holds against those who see the models and no more.

*What the others see.* The mean is divided by the size k of a cohort, and scale, ring and
shares of noise are planned for it, so k shows in what is published, whoever adds the
noise; the theorems for Poisson samples [ZW19] want it hidden. So k counts as public.
Given k, a Poisson sample is a uniform choice of k devices out of the population, without
replacement, and the theorem for those [WBK19, Theorem 9] applies, which compares data
sets in which one device is *replaced*: by another, or by one that contributes nothing.
The latter is the ledger's own relation, so its curves and these add up. It costs twice
the sensitivity.

*What was executed.* Once a device that was drawn is missing from the sum, the sum is
no longer over a uniform choice: some devices had no chance. Then, and whenever those
invited are not exactly those drawn, the sampling of the release is ``"unknown"`` and
nothing is claimed. What no record can show is an assumption: every device of the
population would have answered, had it been drawn.

[WBK19] Wang, Balle and Kasiviswanathan, https://arxiv.org/abs/1808.00087
[ZW19]  Zhu and Wang, http://proceedings.mlr.press/v97/zhu19c.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedcore.privacy.rules import check

Sampling: TypeAlias = Literal["all", "fixed_size_without_replacement", "poisson", "unknown"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """How those who were invited had been chosen; nothing is known of it by default.

    Attributes:
        sampling: The way.
        rate: With which probability each device was chosen, in (0, 1].
        population: How many there were to choose from; 0 if unknown.
    """

    sampling: Sampling = "unknown"
    rate: float = 1.0
    population: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        check(
            (0 < self.rate <= 1, f"rate must be in (0, 1], got {self.rate}"),
            (
                (self.population >= 1) == (self.sampling != "unknown"),
                (
                    "population must be at least 1 for a known sampling and 0 for an unknown, "
                    f"got {self.population} for {self.sampling}"
                ),
            ),
        )
