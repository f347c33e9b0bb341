"""What a run costs in privacy, and the noise that keeps it within what it may cost.

One place adds up all rounds, for either unit of privacy: it finds the noise for a
target epsilon, refuses what exceeds a budget, and says what deserves a warning. It
needs the sizes of model, cohort and the smallest device, but no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedcore.errors import ConfigurationError
from fedcore.job.levels import BothLevels, of_devices, of_examples
from fedcore.pipeline import (
    Bonawitz,
    BoundRound,
    Layer,
    bind_first,
    projected_epsilon,
    resolve,
)
from fedcore.privacy import (
    MatrixGaussian,
    NoPrivacy,
    PrivacyLedger,
    Release,
    least_noise,
    stated_noise,
)
from fedcore.privacy.releases import Unit
from fedcore.privacy.target import not_positive, rounded_up
from fedcore.training import ExampleLevelPrivacy

if TYPE_CHECKING:  # settings.py checks a job; here it is only read
    from fedcore.job.settings import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What all rounds together cost one unit.

    Attributes:
        unit: Whose privacy is meant.
        noise_multiplier: Given, or found for `target`.
        target: The epsilon that the noise was found for; None if the noise was given.
        epsilon: Of the whole run; infinite without noise.
        delta: That goes with it.
        budget: No release is made beyond it; None for no limit.
        inflation: By what factor rounding increases the noise over the central Gaussian's.
        ring_bits: Of the sum; None for noise that is not added in a ring.
    """

    unit: Unit
    noise_multiplier: float
    target: float | None
    epsilon: float
    delta: float
    budget: float | None
    inflation: float = 1.0
    ring_bits: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """Everything about a job's privacy that is known before it starts.

    Attributes:
        job: With its noise stated; a target that it had is now its budget.
        bound: The first round put together; None for plain float32.
        example_release: One round of DP-SGD on the smallest device; None without it.
        device: What the sums cost; None without noise in them.
        example: What local training costs; None without DP-SGD.
        warnings: What works and is still worth a second thought, one line each.
    """

    job: Job
    bound: BoundRound | None
    example_release: Release | None
    device: Cost | None
    example: Cost | None
    warnings: tuple[str, ...]


def assess(
    job: Job, *, parameters: int, fewest_examples: int, layers: tuple[Layer, ...] = ()
) -> Assessment:
    """Find the noise that `job` asks for, and add up what its rounds cost.

    Args:
        job: Its noise is given or to be found.
        parameters: Weights of the model.
        fewest_examples: On the smallest device, which samples at the highest rate.
        layers: Of the model, if the plan treats them apart.

    Raises:
        ConfigurationError: The stages do not fit, no noise reaches a target, or a budget would
            be exceeded; names the smallest value that works.
    """
    resolved = _resolve(job, parameters, fewest_examples, layers)
    plan = resolved.plan
    if plan is not None and isinstance(plan.secagg, Bonawitz):
        plan.secagg.check_margin(resolved.invited)
    if plan is not None and isinstance(plan.privacy, MatrixGaussian):
        _check_fleet(resolved, plan.privacy)
    bound = (
        None
        if plan is None
        else bind_first(plan, clients=resolved.invited, dim=parameters, layers=layers)
    )
    release = example_release(resolved, fewest_examples)
    device = _device_cost(job, resolved, bound)
    example = _example_cost(job, resolved, release)
    for cost in (device, example):
        if cost is not None:
            _check_budget(cost, resolved, bound, release)
    return Assessment(
        job=resolved,
        bound=bound,
        example_release=release,
        device=device,
        example=example,
        warnings=_warnings(resolved, fewest_examples),
    )


def _check_fleet(job: Job, privacy: MatrixGaussian) -> None:
    """Refuse a fleet too small for cohorts that keep their distance.

    Raises:
        ConfigurationError: Some round would find too few devices that may take part.
    """
    crowded = job.invited * min(job.rounds, privacy.min_separation)
    needed = max(crowded, -(-job.invited * job.rounds // privacy.participations))
    if job.clients < needed:
        msg = (
            f"{job.rounds} rounds of {job.invited} devices, each at most "
            f"{privacy.participations} times and at least {privacy.min_separation} rounds apart, "
            f"need clients={needed} at least, got {job.clients}: lower clients_per_round, rounds "
            "or privacy.min_separation, or raise privacy.participations"
        )
        raise ConfigurationError(msg)


def example_release(
    job: Job, examples: int, noise_multiplier: float | None = None
) -> Release | None:
    """Return one round of DP-SGD on a device with so many `examples`; None without it.

    Args:
        job: Says how it trains.
        examples: On the device.
        noise_multiplier: Instead of the job's own.
    """
    privacy = of_examples(job.privacy)
    if privacy is None:
        return None
    noise = privacy.stated_noise if noise_multiplier is None else noise_multiplier
    size = job.training.batch_size
    batches = -(-examples // size) if size else 1
    return Release(
        round_number=1,
        unit="example",
        mechanism="gaussian" if noise else "none",
        noise_multiplier=noise,
        sampling="poisson",
        sampling_rate=1 / batches,
        amplification_claimed=batches > 1,
        steps=job.training.epochs * batches,
    )


def _resolve(job: Job, parameters: int, examples: int, layers: tuple[Layer, ...]) -> Job:
    """Return `job` with all noise stated."""
    sums, local, plan = of_devices(job.privacy), of_examples(job.privacy), job.plan
    if plan is not None:
        sums = resolve(
            plan,
            rounds=job.rounds,
            clients=job.invited,
            dim=parameters,
            layers=layers,
        ).privacy
    if local is not None and local.noise_multiplier is None:
        local = _resolve_local(job, local, examples)
    match job.privacy:
        case BothLevels() as both if local is not None and not isinstance(sums, NoPrivacy):
            return replace(job, privacy=replace(both, device=sums, example=local))
        case ExampleLevelPrivacy() if local is not None:
            return replace(job, privacy=local)
        case _:
            return replace(job, privacy=sums)


def _resolve_local(job: Job, privacy: ExampleLevelPrivacy, examples: int) -> ExampleLevelPrivacy:
    target = privacy.epsilon or 0.0
    if target <= 0:
        raise ConfigurationError(not_positive(target, 0.0))
    ledger = PrivacyLedger(delta=privacy.delta)

    def projection(noise: float) -> float | None:
        release = example_release(job, examples, noise)
        return None if release is None else ledger.projected_epsilon(release, job.rounds)

    found = least_noise(projection, target)
    if found is None or found.epsilon > target:
        least = "" if found is None else f": raise it to {rounded_up(found.epsilon):g}, or"
        msg = (
            f"no noise keeps {job.rounds} rounds of local training within privacy.epsilon="
            f"{target:g}{least} run fewer rounds or epochs"
        )
        raise ConfigurationError(msg)
    return replace(
        privacy,
        noise_multiplier=found.noise_multiplier,
        epsilon=None,
        epsilon_budget=target if privacy.epsilon_budget is None else privacy.epsilon_budget,
    )


def _device_cost(asked: Job, job: Job, bound: BoundRound | None) -> Cost | None:
    privacy, target = of_devices(job.privacy), of_devices(asked.privacy)
    if isinstance(privacy, NoPrivacy) or isinstance(target, NoPrivacy) or bound is None:
        return None
    calibration = bound.calibration
    return Cost(
        unit="device",
        noise_multiplier=stated_noise(privacy),
        target=target.epsilon,
        epsilon=projected_epsilon(bound, job.rounds, privacy.delta),
        delta=privacy.delta,
        budget=privacy.epsilon_budget,
        inflation=1.0 if calibration is None else calibration.inflation,
        ring_bits=bound.ring.bits,
    )


def _example_cost(asked: Job, job: Job, release: Release | None) -> Cost | None:
    privacy, target = of_examples(job.privacy), of_examples(asked.privacy)
    if privacy is None or target is None or release is None:
        return None
    return Cost(
        unit="example",
        noise_multiplier=privacy.stated_noise,
        target=target.epsilon,
        epsilon=PrivacyLedger(delta=privacy.delta).projected_epsilon(release, job.rounds),
        delta=privacy.delta,
        budget=privacy.epsilon_budget,
    )


def _check_budget(cost: Cost, job: Job, bound: BoundRound | None, local: Release | None) -> None:
    """Refuse a run that would stop before its last round.

    Raises:
        ConfigurationError: Names the smallest budget, and how many rounds this one lasts.
    """
    budget = cost.budget
    if budget is None or cost.epsilon <= budget:
        return
    sums = None if bound is None else bound.release(bound.plan.clients)
    release = sums if cost.unit == "device" else local
    if release is None:
        return
    ledger = PrivacyLedger(delta=cost.delta)
    affordable = _most(
        job.rounds, lambda rounds: ledger.projected_epsilon(release, rounds) <= budget
    )
    msg = (
        f"privacy.epsilon_budget must be at least {rounded_up(cost.epsilon):g} for {job.rounds} "
        f"rounds, got {budget:g}: it lasts for {affordable} rounds; raise it, lower rounds, "
        "or raise privacy.noise_multiplier"
    )
    raise ConfigurationError(msg)


def _most(rounds: int, affordable: Callable[[int], bool]) -> int:
    """Return the most rounds, fewer than `rounds`, that are affordable."""
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low


def _warnings(job: Job, examples: int) -> tuple[str, ...]:
    """Return what a delta that is too large allows: the whole data of one unit in the open."""
    sums, local = of_devices(job.privacy), of_examples(job.privacy)
    found = []
    if not isinstance(sums, NoPrivacy):
        found.append((sums.delta, job.clients, "devices"))
    if local is not None:
        found.append((local.delta, examples, "examples on the smallest device"))
    return tuple(
        f"privacy.delta={delta:g} is not below 1/{count}, one over the number of {whom}: "
        f"publishing one of them in full would keep the promise; choose at most {0.1 / count:.1g}"
        for delta, count, whom in found
        if delta * count >= 1
    )
