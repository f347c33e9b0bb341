"""What devices are able to do, and what each class of them is asked to do.

A device describes itself in powers of two: memory, cores and speed rounded down, its
number of examples rounded up, 0 for what it does not tell. So a description says how
a device would do at worst, and many devices have the same one. It decides what it tells
(`clients.profile`).

The classes of a run are public, ordered from the smallest to the largest. A device is of
the last class whose least memory, cores and speed it has; it works that out itself, from
the same job, and says it beside its uploads. A class of width 0, and a device that is of
no class, is not asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from math import inf, isclose
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from fedcore.crypto import transcript_hash
from fedcore.errors import ConfigurationError
from fedcore.models import Logistic, NoPruning
from fedcore.models.parts import Structure
from fedcore.pipeline.shares import MOST_CLASSES, ByClass, Shares, Whole

if TYPE_CHECKING:
    from fedcore.job.settings import Job

LARGEST: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class Profile:
    """What a device tells of itself: powers of two, or 0 for what it does not tell.

    Attributes:
        memory_mib: Memory in MiB, rounded down.
        cores: Rounded down.
        link_kbps: Kilobits a second that it sends, rounded down.
        examples: How many it has, rounded up.
    """

    memory_mib: int = 0
    cores: int = 0
    link_kbps: int = 0
    examples: int = 0

    @classmethod
    def of(cls, told: Mapping[str, object]) -> Profile:
        """Return the profile that a reply holds; what is malformed is not told.

        Args:
            told: Numbers by the names of the fields; others are ignored.
        """
        known = {name: told.get(name) for name in _NAMES}
        return cls(
            **{
                name: value
                for name, value in known.items()
                if type(value) is int and 0 < value <= LARGEST and not value & (value - 1)
            }
        )


_NAMES: Final = tuple(entry.name for entry in fields(Profile))


def rounded_down(value: float) -> int:
    """Return the largest power of two that is at most `value`; 0 if that is below 1.

    Example:
        >>> [rounded_down(value) for value in (0.5, 1, 1000, 1024)]
        [0, 1, 512, 1024]
    """
    return 1 << (min(int(value), LARGEST).bit_length() - 1) if value >= 1 else 0


def rounded_up(value: int) -> int:
    """Return the smallest power of two that is at least `value`; 0 for 0.

    Example:
        >>> [rounded_up(value) for value in (0, 1, 1000, 1024)]
        [0, 1, 1024, 1024]
    """
    return 1 << (min(value, LARGEST) - 1).bit_length() if value > 0 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClass:
    """Devices of one size, and their part of the work.

    Attributes:
        name: For people.
        memory_mib: Least memory in MiB.
        cores: Fewest cores.
        link_kbps: Slowest link, in kilobits a second.
        width: Share of each hidden layer's channels that they train; 0 if they are not asked.
        steps: Share of `training.epochs` that they take.
        simulated: Fraction of a simulation's devices that are of this class.
    """

    name: str
    memory_mib: int = 0
    cores: int = 0
    link_kbps: int = 0
    width: float = 1.0
    steps: float = 1.0
    simulated: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("memory_mib", "cores", "link_kbps"):
            value = getattr(self, name)
            if not 0 <= value <= LARGEST or value & (value - 1):
                msg = (
                    f"devices.classes: {name} of {self.name!r:.40} must be 0 or a power of two, as "
                    f"devices tell it, got {value}"
                )
                raise ConfigurationError(msg)
        for name, low in (("width", 0.0), ("steps", 1e-9), ("simulated", 0.0)):
            value = getattr(self, name)
            if not low <= value <= 1:
                msg = (
                    f"devices.classes: {name} of {self.name!r:.40} must be in "
                    f"{'(' if low else '['}0, 1], got {value}"
                )
                raise ConfigurationError(msg)

    def suits(self, profile: Profile) -> bool:
        """Return whether a device has what this class takes."""
        return (
            profile.memory_mib >= self.memory_mib
            and profile.cores >= self.cores
            and profile.link_kbps >= self.link_kbps
        )


@dataclass(frozen=True, slots=True)
class Equal:
    """Nobody is asked what it is; every device trains all of the model."""

    kind: Literal["equal"] = "equal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Devices of several classes.

    Attributes:
        classes: From the smallest to the largest.
        structure: Which channels a part has: always the first, or others in every round.
        normalise: Whether updates are divided by the share of steps that made them.
        least_trainers: No weight's sum over fewer devices is revealed.
        latency_seconds: Start and round trip of a device, at most.
        core_gflops: What one core does in a second, in 10^9 operations, at least.
        margin: So many times longer than estimated a device may take; infinite for no
            deadline but `stage_seconds`.
    """

    classes: tuple[DeviceClass, ...]
    structure: Structure = "rolling"
    normalise: bool = False
    least_trainers: int = 2
    latency_seconds: float = 10.0
    core_gflops: float = 1.0
    margin: float = 4.0
    kind: Literal["mixed"] = "mixed"

    def __post_init__(self) -> None:
        """Check ranges, and that the simulated fractions add up."""
        if not 1 <= len(self.classes) <= MOST_CLASSES:
            msg = f"devices.classes must be 1 to {MOST_CLASSES} classes, got {len(self.classes)}"
            raise ConfigurationError(msg)
        if not any(known.width for known in self.classes):
            msg = "devices.classes must have one whose width is above 0, or nobody is asked"
            raise ConfigurationError(msg)
        total = sum(known.simulated for known in self.classes)
        if total and not isclose(total, 1, abs_tol=1e-6):
            msg = (
                "the fractions of simulated devices (devices.classes, simulated) must add up to 1, "
                f"or be 0 for real devices, got {total:g}"
            )
            raise ConfigurationError(msg)
        for name, value in (
            ("latency_seconds", self.latency_seconds),
            ("core_gflops", self.core_gflops),
        ):
            if not 0 < value < inf:
                msg = f"devices.{name} must be positive and finite, got {value}"
                raise ConfigurationError(msg)
        if not self.margin >= 1:
            msg = f"devices.margin must be at least 1, got {self.margin}"
            raise ConfigurationError(msg)
        _ = self.shares  # whose ranges are checked there

    @property
    def shares(self) -> ByClass:
        """What a round's plan says of the classes; one that is not asked stands as if it were."""
        return ByClass(
            widths=tuple(known.width or 1.0 for known in self.classes),
            steps=tuple(known.steps for known in self.classes),
            structure=self.structure,
            normalise=self.normalise,
            least_trainers=self.least_trainers,
        )

    @property
    def simulates(self) -> bool:
        """Whether profiles are made up, for devices that do not exist."""
        return any(known.simulated for known in self.classes)

    def class_of(self, profile: Profile) -> int | None:
        """Return the index of a device's class; None if it is too small for all."""
        suiting = [index for index, known in enumerate(self.classes) if known.suits(profile)]
        return suiting[-1] if suiting else None

    def asks(self, profile: Profile) -> bool:
        """Return whether a device is invited to rounds."""
        index = self.class_of(profile)
        return index is not None and self.classes[index].width > 0


Devices: TypeAlias = Mixed | Equal


@lru_cache(maxsize=4)
def simulated_profiles(devices: Mixed, clients: int, seed: int) -> tuple[Profile, ...]:
    """Return the profiles of a simulation's devices: each class has its exact fraction.

    Args:
        devices: With fractions.
        clients: How many devices there are.
        seed: Of the run; who is small has nothing to do with what it has for data.
    """
    order = sorted(
        range(clients),
        key=lambda index: transcript_hash(
            "fedcore/v1/simulated-profile", f"{seed}/{index}".encode()
        ),
    )
    profiles, start, total = dict[int, Profile](), 0, 0.0
    for known in devices.classes:
        total += known.simulated
        stop = round(total * clients)
        own = Profile(known.memory_mib, known.cores, known.link_kbps)
        profiles |= dict.fromkeys(order[start:stop], own)
        start = stop
    return tuple(profiles.get(index, Profile()) for index in range(clients))


def shares_of(devices: Devices) -> Shares:
    """Return what the plan of a round says of the classes."""
    return devices.shares if isinstance(devices, Mixed) else Whole()


def check_devices(job: Job) -> None:
    """Refuse classes that do not fit the rest of the job.

    Raises:
        ConfigurationError: Names both parties, and what to choose instead.
    """
    devices = job.devices
    if isinstance(devices, Equal):
        return
    if job.plan is None:
        msg = (
            "devices=mixed divides each weight's sum by who trained it, and quantize=none leaves "
            "the mean to Flower, which counts everybody: choose quantize=modular (secagg=none "
            "shows single updates all the same), or devices=equal"
        )
        raise ConfigurationError(msg)
    _check_widths(job, devices)
    if devices.simulates:
        profiles = simulated_profiles(devices, job.clients, job.seed)
        check_enough(job, sum(map(devices.asks, profiles)), job.clients)
    for known in devices.classes:
        epochs = job.training.epochs * known.steps
        if known.width and not (isclose(epochs, round(epochs), abs_tol=1e-6) and round(epochs)):
            msg = (
                f"training.epochs={job.training.epochs} times steps={known.steps:g} of the class "
                f"{known.name!r:.40} must be a whole number of epochs, got {epochs:g}"
            )
            raise ConfigurationError(msg)
    if devices.normalise and any(known.steps < 1 for known in devices.classes):
        training = job.training
        if training.momentum or training.weight_decay or job.strategy.kind == "fedprox":
            msg = (
                "devices.normalise divides an update by its number of steps, which is its length "
                "for plain SGD only: set training.momentum=0 and weight_decay=0, without "
                "strategy=fedprox, or choose devices.normalise=false"
            )
            raise ConfigurationError(msg)


def check_enough(job: Job, able: int, there: int) -> None:
    """Refuse a fleet with too few devices that are asked.

    Args:
        job: Says how many a round invites.
        able: Devices of a class that is asked.
        there: Devices in all.

    Raises:
        ConfigurationError: A round would invite more.
    """
    if able < job.invited:
        msg = (
            f"a round invites {job.invited} devices, and {able} of {there} are large enough for a "
            "class that is asked: lower clients_per_round, or lower what devices.classes take"
        )
        raise ConfigurationError(msg)


def _check_widths(job: Job, devices: Mixed) -> None:
    if not devices.shares.narrow:
        return
    if isinstance(job.model, Logistic):
        msg = (
            "model=logistic has no hidden channels of which a device could train fewer: set all "
            "widths to 1 and lower steps, or choose another model"
        )
        raise ConfigurationError(msg)
    if not isinstance(job.pruning, NoPruning):
        msg = (
            "pruning chooses channels by their weights, and those that few devices train are the "
            "weaker ones: choose pruning=none, or devices=equal"
        )
        raise ConfigurationError(msg)
