"""Where configuration becomes code; nothing below this package imports Hydra.

YAML chooses between the options of a group and sets their numbers. It never names a
Python class and never changes the order of the stages: the order is a security
property, and lives in `fedcore.pipeline`. The types are the library's own frozen
dataclasses, so a field is declared once and its range is checked once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, TypeAlias

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import Discriminator, TypeAdapter, ValidationError

import experiments.resolvers  # noqa: F401 - what conf/ calls
from clients.simulated import simulated_root
from fedcore.engine import HeavyTailed
from fedcore.errors import ConfigurationError
from fedcore.job import Int8Aware, Job, explain
from fedcore.pipeline import NoSecAgg


@dataclass(frozen=True, slots=True)
class InProcess:
    """All clients in this process, or in forked workers.

    Attributes:
        workers: Processes that train clients; 0 trains them in this one.
    """

    workers: int = 0
    kind: Literal["in_process"] = "in_process"

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= 256:
            msg = f"engine.workers must be in 0..256, got {self.workers}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Ray:
    """Flower's simulation engine.

    Attributes:
        cpus_per_client: As many clients train at once as fit into the cores.
    """

    cpus_per_client: float = 1.0
    kind: Literal["ray"] = "ray"

    def __post_init__(self) -> None:
        if not 0 < self.cpus_per_client <= 1024:
            msg = f"engine.cpus_per_client must be in (0, 1024], got {self.cpus_per_client}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class OnnxInt8:
    """Export the final model to int8 ONNX, sign it, and try it as a device would.

    Attributes:
        key: File of the signing key; None makes one in the output folder.
    """

    key: str | None = None
    kind: Literal["onnx_int8"] = "onnx_int8"


@dataclass(frozen=True, slots=True)
class NoRelease:
    """Keep the final model to ourselves."""

    kind: Literal["none"] = "none"


Engine: TypeAlias = Annotated[InProcess | Ray, Discriminator("kind")]
ReleaseConfig: TypeAlias = Annotated[OnnxInt8 | NoRelease, Discriminator("kind")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment(Job):
    """A job, and where it runs.

    Attributes:
        signed: Whether simulated devices are enrolled: they sign their keys and
            cross-check the survivors.
        engine: What carries the messages.
        release: What becomes of the final model.
        output: Folder that the run writes.
    """

    signed: bool
    engine: Engine
    release: ReleaseConfig
    output: str

    def __post_init__(self) -> None:
        Job.__post_init__(self)  # a class with slots is made anew, and super() finds the old one
        if isinstance(self.pace, HeavyTailed) and isinstance(self.engine, Ray):
            msg = (
                "pace=heavy_tailed passes on a virtual clock, and Ray's engine has its own: choose "
                "engine=in_process, or pace=at_once"
            )
            raise ConfigurationError(msg)
        if isinstance(self.qat, Int8Aware) and isinstance(self.release, NoRelease):
            msg = (
                "qat=int8 trains for an int8 release, and release=none makes none: choose "
                "release=onnx_int8, or qat=none"
            )
            raise ConfigurationError(msg)

    @property
    def job(self) -> Job:
        """What is the same wherever it runs."""
        job = Job(**{field.name: getattr(self, field.name) for field in fields(Job)})
        if not self.signed:
            return job
        if isinstance(job.secagg, NoSecAgg):
            msg = "signed=true signs the keys of masks: choose secagg=bonawitz or seed_helper"
            raise ConfigurationError(msg)
        authority = simulated_root(job.seed).public.raw.hex()
        return replace(job, secagg=replace(job.secagg, authority=authority))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an account needs to know of data and model.

    Attributes:
        parameters: Weights of the model.
        examples: On the smallest device.
    """

    parameters: int
    examples: int

    def __post_init__(self) -> None:
        for name in ("parameters", "examples"):
            if getattr(self, name) < 1:
                msg = f"sizes.{name} must be at least 1, got {getattr(self, name)}"
                raise ConfigurationError(msg)


def to_experiment(cfg: DictConfig) -> Experiment:
    """Convert composed YAML into the typed value that the library takes.

    Numbers below the key `sweep` are for other keys to refer to; they are nothing themselves.

    Raises:
        ConfigurationError: A key is missing, unknown, of the wrong type or out of range.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        if isinstance(values, dict):
            values.pop("sweep", None)
        return TypeAdapter(Experiment).validate_python(values, extra="forbid")
    except MissingMandatoryValue as error:
        msg = f"{error.full_key}: a value is missing; give it as {error.full_key}=..."
        raise ConfigurationError(msg) from None
    except ValidationError as error:
        raise ConfigurationError(explain(error)) from None


def to_account(cfg: DictConfig) -> tuple[Experiment, Sizes | None]:
    """Convert the configuration of an account: an experiment, and perhaps its sizes.

    Raises:
        ConfigurationError: As `to_experiment`, or only one of the sizes is given.
    """
    given = dict(cfg.sizes)
    experiment = to_experiment(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "sizes"])
    )
    if all(value is None for value in given.values()):
        return experiment, None
    try:
        return experiment, TypeAdapter(Sizes).validate_python(given, extra="forbid")
    except ValidationError as error:
        msg = f"sizes.{explain(error)}; give both sizes.parameters and sizes.examples"
        raise ConfigurationError(msg) from None
