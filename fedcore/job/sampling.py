"""How a run chooses the devices of a round; `strategies.sampling` does it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal, TypeAlias

from fedcore.errors import ConfigurationError
from fedcore.job.backoff import NoBackOff
from fedcore.job.levels import of_devices
from fedcore.privacy import MatrixGaussian

if TYPE_CHECKING:
    from fedcore.job.settings import Job

MOST_OVER_SELECTION = 2.0


@dataclass(frozen=True, slots=True)
class FixedSize:
    """Always as many devices, by the run's public seed: anybody can tell which.

    Attributes:
        over_selection: So many times `clients_per_round` are invited, and the round goes on
            with the first `clients_per_round` that answer; 1 invites as many as are wanted.
    """

    over_selection: float = 1.0
    kind: Literal["fixed"] = "fixed"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.over_selection <= MOST_OVER_SELECTION:
            msg = (
                f"sampling.over_selection must be in [1, {MOST_OVER_SELECTION:g}], got "
                f"{self.over_selection}: 1.3 invites 30 % more devices than are wanted"
            )
            raise ConfigurationError(msg)


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


def invited(sampling: SamplingConfig, wanted: int) -> int:
    """Return how many devices a round invites to get as many updates as are wanted.

    Example:
        >>> invited(FixedSize(over_selection=1.3), 10)
        13
    """
    factor = sampling.over_selection if isinstance(sampling, FixedSize) else 1.0
    # The small term undoes the rounding of a product that is whole.
    return ceil(factor * wanted - 1e-9)


def check_sampling(job: Job) -> None:
    """Refuse a choice of devices that does not fit the rest of the job.

    Raises:
        ConfigurationError: Names both parties, and what to choose instead.
    """
    sampling, privacy = job.sampling, of_devices(job.privacy)
    spaced = isinstance(privacy, MatrixGaussian)
    if spaced and not isinstance(sampling, FixedSize):
        msg = (
            "privacy=matrix_gaussian needs cohorts that keep their distance: choose "
            f"sampling=fixed, got sampling={sampling.kind}"
        )
        raise ConfigurationError(msg)
    if isinstance(sampling, Everyone) and job.clients_per_round != job.clients:
        msg = (
            f"sampling=everyone invites all clients={job.clients}: set clients_per_round to "
            f"as many, got {job.clients_per_round}"
        )
        raise ConfigurationError(msg)
    if getattr(privacy, "amplification", False) and not isinstance(sampling, Poisson):
        msg = (
            "privacy.amplification counts a secret choice of devices, and "
            f"sampling={sampling.kind} is public: choose sampling=poisson, or "
            "privacy.amplification=false"
        )
        raise ConfigurationError(msg)
    _check_over_selection(job)
    if not isinstance(job.backoff, NoBackOff):
        _check_backoff(job, spaced=spaced)


def _check_over_selection(job: Job) -> None:
    if job.invited > job.clients:
        factor = getattr(job.sampling, "over_selection", 1.0)
        msg = (
            f"sampling.over_selection={factor:g} invites {job.invited} devices to get "
            f"{job.clients_per_round} updates, got clients={job.clients}: lower one of them, or "
            "raise clients"
        )
        raise ConfigurationError(msg)
    plan = job.plan
    if plan is None or plan.minimum_survivors(job.invited) <= job.clients_per_round:
        return
    least = ceil(1000 * (1 - job.clients_per_round / job.invited)) / 1000
    msg = (
        f"dropout must be at least {least:g} if {job.clients_per_round} of {job.invited} invited "
        f"devices are enough (sampling.over_selection), got {job.dropout:g}: it is the fraction of "
        "those invited that may be missing"
    )
    raise ConfigurationError(msg)


def _check_backoff(job: Job, *, spaced: bool) -> None:
    if isinstance(job.sampling, Everyone):
        msg = (
            f"backoff={job.backoff.kind} leaves devices out, and sampling=everyone invites all: "
            "choose backoff=none or sampling=fixed"
        )
        raise ConfigurationError(msg)
    if spaced:
        msg = (
            f"backoff={job.backoff.kind} would let some devices take part more often than "
            "privacy=matrix_gaussian plans for: choose backoff=none"
        )
        raise ConfigurationError(msg)
    if getattr(of_devices(job.privacy), "amplification", False):
        msg = (
            "privacy.amplification counts a choice from all devices, and "
            f"backoff={job.backoff.kind} chooses by who failed: choose backoff=none, or "
            "privacy.amplification=false"
        )
        raise ConfigurationError(msg)
