"""How a run chooses the devices of a round; `strategies.sampling` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class FixedSize:
    """Always `clients_per_round` devices, by the run's public seed: anybody can tell which."""

    kind: Literal["fixed"] = "fixed"


@dataclass(frozen=True, slots=True)
class Poisson:
    """Each device by itself, with probability clients_per_round / clients, in secret.

    The size of a cohort varies: `clients_per_round` is its mean. A draw too small for its
    secure sum is a round in which nothing happens.
    """

    kind: Literal["poisson"] = "poisson"


@dataclass(frozen=True, slots=True)
class Everyone:
    """All devices in every round."""

    kind: Literal["everyone"] = "everyone"


SamplingConfig: TypeAlias = FixedSize | Poisson | Everyone
