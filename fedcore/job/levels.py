"""Which units of privacy a run protects: devices, examples, or both.

Noise in the sum hides whether a device took part; noise in a device's own training
hides whether one of its examples did. The two are told apart here, because their
epsilons do not add up: each has its noise, its target and its ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Discriminator

from fedcore.pipeline.choices import SumPrivacy
from fedcore.privacy import Central, Distributed, NoPrivacy
from fedcore.training import ExampleLevelPrivacy

NOISE_KEY: Final = "noise-multiplier"
"""Under it a training message states the noise of DP-SGD."""
_BY_KIND = Discriminator("kind")


@dataclass(frozen=True, slots=True, kw_only=True)
class BothLevels:
    """Noise in the sum, and DP-SGD on every device.

    What the device uploads is private for each of its examples even from whoever sees the
    single upload; what the sum reveals is private for the device as a whole.

    Attributes:
        device: Noise in the sum.
        example: Noise in local training.
    """

    kind: Literal["both_levels"] = "both_levels"
    device: Annotated[Distributed | Central, _BY_KIND]
    example: ExampleLevelPrivacy


PrivacyConfig: TypeAlias = Annotated[SumPrivacy | ExampleLevelPrivacy | BothLevels, _BY_KIND]


def of_devices(privacy: SumPrivacy | ExampleLevelPrivacy | BothLevels) -> SumPrivacy:
    """Return the noise in the sum."""
    match privacy:
        case ExampleLevelPrivacy():
            return NoPrivacy()
        case BothLevels():
            return privacy.device
        case _:
            return privacy


def of_examples(
    privacy: SumPrivacy | ExampleLevelPrivacy | BothLevels,
) -> ExampleLevelPrivacy | None:
    """Return the noise in local training; None for none."""
    match privacy:
        case ExampleLevelPrivacy():
            return privacy
        case BothLevels():
            return privacy.example
        case _:
            return None
