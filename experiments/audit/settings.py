"""The configuration of an audit: that of a training run, and of the suites.

It loads no torch, so that a wrong value is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from experiments.schema import Experiment, InProcess, to_experiment
from fedcore.errors import ConfigurationError
from fedcore.job import explain

SUITES = ("canary", "membership", "inversion")


@dataclass(frozen=True, slots=True)
class CanarySettings:
    """How the canary suite audits.

    Attributes:
        candidates: Devices that are added; a fair coin makes each a canary or silent.
        every_round: Invite all devices to every round.
        seed: Of coins and directions.
    """

    candidates: int = 64
    every_round: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 16 <= self.candidates <= 4096:
            msg = f"canary.candidates must be in 16..4096, got {self.candidates}"
            raise ConfigurationError(msg)
        if not 0 <= self.seed < 1 << 62:
            msg = f"canary.seed must be in 0..2^62, got {self.seed}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class MembershipSettings:
    """How the membership suite attacks.

    Attributes:
        shadows: Runs of the job, each with other members.
        processes: Runs at the same time; 1 uses this process.
        seed: Of the coins.
    """

    shadows: int = 16
    processes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 4 <= self.shadows <= 1024:
            msg = f"membership.shadows must be in 4..1024, got {self.shadows}"
            raise ConfigurationError(msg)
        if not 1 <= self.processes <= 256:
            msg = f"membership.processes must be in 1..256, got {self.processes}"
            raise ConfigurationError(msg)
        if not 0 <= self.seed < 1 << 62:
            msg = f"membership.seed must be in 0..2^62, got {self.seed}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class InversionSettings:
    """How the inversion suite attacks.

    Attributes:
        cohort: Devices in the sum.
        examples: That each of them holds.
        steps: Of the search by gradient.
        seed: Of the search's start.
    """

    cohort: int = 20
    examples: int = 1
    steps: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("cohort", self.cohort, 2, 1000),
            ("examples", self.examples, 1, 1000),
            ("steps", self.steps, 1, 100_000),
            ("seed", self.seed, 0, 1 << 62),
        ):
            if not low <= value <= high:
                msg = f"inversion.{name} must be in {low}..{high}, got {value}"
                raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Audit:
    """Which suites run, and how.

    Attributes:
        suite: One of them, or all.
        canary: Of the canary suite.
        membership: Of the membership suite.
        inversion: Of the inversion suite.
    """

    suite: Literal["canary", "membership", "inversion", "all"]
    canary: CanarySettings
    membership: MembershipSettings
    inversion: InversionSettings

    @property
    def suites(self) -> tuple[str, ...]:
        """The chosen suites, in the order in which they run."""
        return SUITES if self.suite == "all" else (self.suite,)


def to_audit(cfg: DictConfig) -> tuple[Experiment, Audit]:
    """Convert composed YAML into the run to audit and the audit.

    Raises:
        ConfigurationError: A key is missing, unknown, of the wrong type or out of range, or
            the run does not stay in this process.
    """
    names = {field.name for field in fields(Audit)}
    values = OmegaConf.to_container(cfg, resolve=True)
    if not isinstance(values, dict):
        msg = f"an audit's configuration must be a mapping, got {type(values).__name__}"
        raise ConfigurationError(msg)
    own = {name: value for name, value in values.items() if name in names}
    run = {name: value for name, value in values.items() if name not in names}
    try:
        audit = TypeAdapter(Audit).validate_python(own, extra="forbid")
    except ValidationError as error:
        raise ConfigurationError(explain(error)) from None
    experiment = to_experiment(OmegaConf.create(run))
    if not isinstance(experiment.engine, InProcess):
        msg = "an audit watches its devices in this process: choose engine=in_process"
        raise ConfigurationError(msg)
    return experiment, audit
