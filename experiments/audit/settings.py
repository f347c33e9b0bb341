"""The configuration of an audit: that of a training run, and of the suites."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import TypeAdapter, ValidationError

from experiments.audit.canary import CanarySettings
from experiments.audit.inversion import InversionSettings
from experiments.audit.membership import MembershipSettings
from experiments.schema import Experiment, InProcess, to_experiment
from fedcore.errors import ConfigurationError
from fedcore.job import explain

SUITES = ("canary", "membership", "inversion")


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
