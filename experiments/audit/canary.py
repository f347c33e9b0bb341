"""How much of one device do the published models show? Asked with random canaries.

Candidates join the fleet as devices. A fair coin makes each a canary, which sends a
random direction of the full clip norm whenever a cohort draw picks it, or silent. The
statistic is the cosine between a candidate's direction and what was published
[AKOOMS24]; for a direction that nobody sent it is that of a random direction, N(0, 1/d)
in d dimensions. Three observers, each stronger than the one before:

    final model    the last model minus the first: who downloads the result
    every model    the largest cosine over the rounds' changes of the model
    its rounds     the sum of the cosines over the rounds that the candidate was drawn
                   for, over the square root of their number: the coordinator, who draws

Each gives two numbers. The estimate is epsilon between the Gaussian of random
directions and the one fitted to the canaries' statistics. The bound is what guessing
the coins proves at 95 % [SNJ23]; it is far below for any number of candidates that is
affordable, and holds without a model of the statistic.

A canary counts as often as it was drawn, and one that was never drawn counts as it is.
With `every_round` everybody is in every round, which is what the ledger assumes, since
it claims nothing for the secrecy of the draws: only then can an estimate come near it.

[AKOOMS24] see `gaussians`; [SNJ23] see `one_run`
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from experiments.audit.gaussians import Estimates, Normal, estimate
from experiments.audit.one_run import Bound, Coins, bound_from_scores
from experiments.audit.planted import (
    Canary,
    Fleet,
    Published,
    Silent,
    Trace,
    increments,
    planted_fleet,
    rounds_of,
    run_fleet,
)
from experiments.audit.settings import CanarySettings
from fedcore.errors import ConfigurationError
from fedcore.job import Job, Preflight
from fedcore.training import ExampleLevelPrivacy

Cosines: TypeAlias = npt.NDArray[np.float64]
"""Shape [directions, rounds] or [directions]."""

FRESH = 10_000
"""Random directions that nobody sent; drawn exactly, see `random_cosines`."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one observer sees and can conclude.

    Attributes:
        observer: Who.
        estimates: Of epsilon, from two Gaussians.
        bound: On epsilon, from guessing coins.
        null: Gaussian of the statistic of directions that nobody sent.
        canaries: Gaussian fitted to the canaries' statistics.
        statistics: Of every candidate, shape [candidates].
    """

    observer: str
    estimates: Estimates
    bound: Bound
    null: Normal
    canaries: Normal
    statistics: Cosines = field(repr=False)


@dataclass(frozen=True, slots=True)
class CanaryAudit:
    """The suite's result.

    Attributes:
        epsilon: What the ledger says of the audited run; infinite without noise.
        delta: At which all epsilons are stated.
        rounds: How many the run finished.
        cohort: Devices invited to a round.
        devices: All of them.
        coins: Which candidates were canaries, shape [candidates].
        participations: How often each candidate was drawn, shape [candidates].
        accuracy: Of the final model.
        observations: From the weakest observer to the strongest.
    """

    epsilon: float
    delta: float
    rounds: int
    cohort: int
    devices: int
    coins: Coins = field(repr=False)
    participations: npt.NDArray[np.int64] = field(repr=False)
    accuracy: float
    observations: tuple[Observation, ...]


def check_canary(job: Job, preflight: Preflight, settings: CanarySettings) -> None:
    """Refuse a run that this suite says nothing about.

    Raises:
        ConfigurationError: Updates are not clipped, the ledger counts examples, or the run
            does not fit the larger fleet.
    """
    if job.plan is None:
        msg = (
            "suite=canary plants updates of the clip norm, but quantize=none sends them unclipped: "
            "choose clip=norm and a quantizer"
        )
        raise ConfigurationError(msg)
    if isinstance(job.privacy, ExampleLevelPrivacy):
        msg = (
            "suite=canary adds whole devices, but privacy=example_level bounds single examples: "
            "choose distributed_gaussian, distributed_skellam or none, or suite=membership"
        )
        raise ConfigurationError(msg)
    _fleet(job, preflight, settings)


def audit_canaries(
    job: Job,
    preflight: Preflight,
    settings: CanarySettings,
    *,
    signed: bool = False,
    workers: int = 0,
    quiet: bool = False,
) -> CanaryAudit:
    """Run the job with candidates among its devices, and compare what shows with the ledger.

    Args:
        job: The run to audit, which `check_canary` accepts.
        preflight: Of that run.
        settings: Of the suite.
        signed: Whether the devices are enrolled.
        workers: Processes that train devices.
        quiet: Show no progress bar.

    Raises:
        ConfigurationError: The run does not fit the larger fleet, or finished no round.
    """
    fleet = _fleet(job, preflight, settings)
    trace = run_fleet(fleet, signed=signed, workers=workers, title="canary", quiet=quiet)
    return _conclude(fleet, trace, settings)


def _candidates(settings: CanarySettings) -> tuple[list[Canary], Coins]:
    """Return what every candidate would send, and whether it does."""
    coins = np.random.default_rng([settings.seed, 1]).random(settings.candidates) < 0.5
    return [Canary(settings.seed, index) for index in range(settings.candidates)], coins


def _fleet(job: Job, preflight: Preflight, settings: CanarySettings) -> Fleet:
    canaries, coins = _candidates(settings)
    parts = [canary if coin else Silent() for canary, coin in zip(canaries, coins, strict=True)]
    return planted_fleet(job, preflight, parts, every_round=settings.every_round)


def _conclude(fleet: Fleet, trace: Trace, settings: CanarySettings) -> CanaryAudit:
    canaries, coins = _candidates(settings)
    rng = np.random.default_rng([settings.seed, 3])
    changes = increments(trace.models, fleet.job)
    moved = np.flatnonzero(np.linalg.norm(changes, axis=1) > 0)
    if not len(moved):
        msg = f"no round changed the model, so there is nothing to audit: {trace.stopped}"
        raise ConfigurationError(msg)
    total = trace.models[-1:] - trace.models[:1]
    seen_total, seen = _cosines(canaries, np.vstack([total, changes[moved]]))
    fresh = random_cosines(changes[moved], FRESH, rng)
    drawn = np.array(
        [
            np.isin(moved + 1, rounds_of(fleet, fleet.devices.clients + index))
            for index in range(len(canaries))
        ]
    )
    dim = trace.models.shape[1]
    statistics = {
        "final model": (seen_total, Normal(0.0, 1 / sqrt(dim))),
        "every model": (seen.max(axis=1), Normal.fit(fresh.max(axis=1))),
        "its rounds": (_matched(seen, drawn), Normal.fit(_matched(fresh, drawn))),
    }
    delta = trace.ledger.delta
    return CanaryAudit(
        epsilon=trace.ledger.epsilon,
        delta=delta,
        rounds=len(moved),
        cohort=fleet.job.clients_per_round,
        devices=fleet.job.clients,
        coins=coins,
        participations=drawn.sum(axis=1),
        accuracy=trace.accuracy,
        observations=tuple(
            Observation(
                name,
                estimate(found[coins], null, delta, seed=settings.seed),
                bound_from_scores(found, coins, delta),
                null,
                Normal.fit(found[coins]),
                found,
            )
            for name, (found, null) in statistics.items()
        ),
    )


def _cosines(canaries: list[Canary], changes: Published) -> tuple[Cosines, Cosines]:
    """Return each direction's cosine with the first of `changes`, and with the others."""
    units = changes / np.linalg.norm(changes, axis=1, keepdims=True)
    found = np.array([units @ canary.direction(changes.shape[1]) for canary in canaries])
    return found[:, 0].astype(np.float64), found[:, 1:].astype(np.float64)


def random_cosines(changes: Published, count: int, rng: np.random.Generator) -> Cosines:
    """Return the cosines of `count` random directions with each of `changes`, exactly.

    Of a random direction only its part in the span of the changes matters: normal
    coordinates there, over a length to which the other dimensions add a chi-square.

    Args:
        changes: Shape [rounds, dim], none of them zero.
        count: How many directions.
        rng: Draws them.

    Returns:
        Shape [count, rounds].
    """
    units = changes / np.linalg.norm(changes, axis=1, keepdims=True)
    triangle = np.linalg.qr(units.T.astype(np.float64), mode="r")  # [span, rounds]
    inside = rng.standard_normal((count, len(triangle)))
    rest = changes.shape[1] - len(triangle)
    beyond = rng.chisquare(rest, count) if rest else np.zeros(count)
    length = np.sqrt((inside**2).sum(axis=1) + beyond)
    cosines: Cosines = (inside @ triangle) / length[:, np.newaxis]
    return cosines


def _matched(cosines: Cosines, drawn: npt.NDArray[np.bool_]) -> Cosines:
    """Return the sum over a direction's rounds over the root of their number.

    Row i has the rounds of candidate i, and beyond the last one of the first again.
    """
    rounds = drawn[np.arange(len(cosines)) % len(drawn)]
    matched: Cosines = (cosines * rounds).sum(axis=1) / np.sqrt(rounds.sum(axis=1).clip(min=1))
    return matched
