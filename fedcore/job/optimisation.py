"""What makes the released model smaller or more faithful, as parts of a run.

    pruning        fewer channels, after some round           `fedcore.models.Structured`
    distillation   a released model teaches a smaller one     `ReleaseTeacher`
    qat            the last rounds train for int8             `Int8Aware`

All three act where the data is or where the global model is; none needs data at the
coordinator. Coordinator and devices read the same job, so each round's architecture and
arithmetic are known to both; no code travels.

    pruning        at the coordinator, on the global model, before a round. From then on
                   everybody trains, sends and receives the smaller model
    distillation   on the device: it runs the teacher on its own examples
    qat            on the device, in its forward pass
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal, TypeAlias

from fedcore.errors import ConfigurationError
from fedcore.job.levels import of_devices, of_examples
from fedcore.models import NoPruning, pruned_widths
from fedcore.privacy import MatrixGaussian

if TYPE_CHECKING:
    from fedcore.job.settings import Job


@dataclass(frozen=True, slots=True)
class NoDistillation:
    """Devices learn from their labels alone."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseTeacher:
    """A signed release of an earlier run teaches this run's model, on every device.

    Attributes:
        path: Folder of the release, or of its versions, of which the highest counts. A real
            device names its own copy in its node configuration as `teacher-path`.
        key: PEM file of the public key that signed it; on a real device `teacher-key`.
        temperature: Softens what teacher and student say; 1 changes nothing.
        weight: Of the teacher in the loss, in (0, 1]; the labels have the rest.
    """

    path: str
    key: str
    temperature: float = 2.0
    weight: float = 0.5
    kind: Literal["release"] = "release"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.temperature < inf:
            msg = (
                f"distillation.temperature must be positive and finite, got {self.temperature}: "
                "1 to 10 is usual"
            )
            raise ConfigurationError(msg)
        if not 0 < self.weight <= 1:
            msg = (
                f"distillation.weight must be in (0, 1], got {self.weight}: choose "
                "distillation=none for 0"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class NoQat:
    """Devices train in floats; the release is quantised afterwards."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class Int8Aware:
    """The last rounds round in the forward pass as the int8 release will.

    Attributes:
        rounds: How many, counted from the last.
    """

    rounds: int = 5
    kind: Literal["int8"] = "int8"

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rounds < 1:
            msg = f"qat.rounds must be at least 1, got {self.rounds}: choose qat=none for 0"
            raise ConfigurationError(msg)


Distillation: TypeAlias = ReleaseTeacher | NoDistillation
Qat: TypeAlias = Int8Aware | NoQat


def trains_for_int8(job: Job, round_number: int) -> bool:
    """Return whether devices round their forward pass in this round."""
    return isinstance(job.qat, Int8Aware) and round_number > job.rounds - job.qat.rounds


def check_optimisation(job: Job) -> None:
    """Refuse what cannot work together.

    Raises:
        ConfigurationError: Names both parties, and what to choose instead.
    """
    if isinstance(job.qat, Int8Aware) and job.qat.rounds > job.rounds:
        msg = f"qat.rounds must be at most rounds={job.rounds}, got {job.qat.rounds}: lower it"
        raise ConfigurationError(msg)
    changed = [
        f"{name}={config.kind}"
        for name, config, off in (
            ("distillation", job.distillation, NoDistillation),
            ("qat", job.qat, NoQat),
        )
        if not isinstance(config, off)
    ]
    if changed and of_examples(job.privacy) is not None:
        msg = (
            f"{' and '.join(changed)} is for plain local training, and privacy={job.privacy.kind} "
            "trains by DP-SGD: turn one of them off, or protect devices by "
            "privacy=distributed_gaussian"
        )
        raise ConfigurationError(msg)
    if not isinstance(job.pruning, NoPruning):
        _check_pruning(job)


def _check_pruning(job: Job) -> None:
    if pruned_widths(job.model, job.pruning) is None or isinstance(job.pruning, NoPruning):
        return
    if job.pruning.after_round >= job.rounds:
        msg = (
            f"pruning.after_round must leave a round to recover, so be less than rounds="
            f"{job.rounds}, got {job.pruning.after_round}"
        )
        raise ConfigurationError(msg)
    if job.error_feedback and job.pruning.after_round:
        msg = (
            "error_feedback keeps what a device did not send of the whole model, and pruning "
            f"after round {job.pruning.after_round} changes its size: set error_feedback=false, "
            "or pruning.after_round=0"
        )
        raise ConfigurationError(msg)
    if isinstance(of_devices(job.privacy), MatrixGaussian) and job.pruning.after_round:
        msg = (
            "privacy=matrix_gaussian takes back in later rounds what it added in earlier ones, to "
            f"the same weights, and pruning after round {job.pruning.after_round} removes some: "
            "set pruning.after_round=0, or choose privacy=distributed_gaussian"
        )
        raise ConfigurationError(msg)
