"""What a run would cost in privacy: over its rounds, and over the noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from experiments.schema import Experiment
from fedcore.errors import ConfigurationError
from fedcore.job import check
from fedcore.job.preflight import first_round
from fedcore.privacy import DistributedGaussian, DistributedSkellam, PrivacyLedger, Release
from fedcore.training import ExampleLevelPrivacy

NOISES = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True, slots=True)
class Point:
    """Epsilon after `rounds` rounds with `noise_multiplier`."""

    rounds: int
    noise_multiplier: float
    epsilon: float


def account(experiment: Experiment) -> str:
    """Draw both curves and return the text to print.

    Raises:
        ConfigurationError: The run adds no noise, cannot work, or exceeds its budget.
    """
    job = experiment.job
    if not isinstance(job.privacy, (DistributedGaussian, DistributedSkellam, ExampleLevelPrivacy)):
        msg = (
            f"privacy={job.privacy.kind} adds no noise, so epsilon is infinite: choose "
            "privacy=distributed_gaussian, distributed_skellam or example_level"
        )
        raise ConfigurationError(msg)
    preflight = check(job)
    release = preflight.example_release
    if preflight.bound is not None and release is None:
        release = preflight.bound.release(preflight.bound.plan.clients)
    if release is None:
        msg = "nothing that this run releases carries noise"
        raise ConfigurationError(msg)
    ledger = PrivacyLedger(delta=job.privacy.delta)
    by_round = [
        Point(rounds, release.noise_multiplier, ledger.projected_epsilon(release, rounds))
        for rounds in _milestones(job.rounds)
    ]
    by_noise = [
        Point(job.rounds, noise, _epsilon(experiment, preflight.parameters, release, noise))
        for noise in NOISES
    ]
    picture = _draw(experiment, by_round, by_noise)
    unit = "one device" if release.unit == "device" else "one example"
    lines = [
        f"{job.name}: protects {unit}, noise multiplier {release.noise_multiplier:g}, "
        f"delta {job.privacy.delta:g}, amplification by sampling "
        f"{'claimed (Poisson)' if release.amplification_claimed else 'not claimed'}",
        "",
        "  rounds   epsilon",
        *(f"  {point.rounds:>6}   {point.epsilon:>7.3f}" for point in by_round),
        "",
        f"  noise    epsilon after {job.rounds} rounds",
        *(f"  {point.noise_multiplier:>5g}    {_shown(point.epsilon)}" for point in by_noise),
        "",
        f"  picture  {picture}",
    ]
    return "\n".join(lines)


def _milestones(rounds: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... and the last round."""
    steps = [step * 10**power for power in range(9) for step in (1, 2, 5)]
    return [*(step for step in steps if step < rounds), rounds]


def _epsilon(experiment: Experiment, parameters: int, release: Release, noise: float) -> float:
    """Return epsilon of the whole run with another noise; infinite if that does not fit."""
    job = experiment.job
    ledger = PrivacyLedger(delta=getattr(job.privacy, "delta", 1e-5))
    if isinstance(job.privacy, ExampleLevelPrivacy):
        return ledger.projected_epsilon(replace(release, noise_multiplier=noise), job.rounds)
    if not isinstance(job.privacy, (DistributedGaussian, DistributedSkellam)):
        return inf
    privacy = replace(job.privacy, noise_multiplier=noise, epsilon_budget=None)
    try:
        bound = first_round(replace(job, privacy=privacy), parameters)
    except ConfigurationError:
        return inf  # more noise than the ring holds
    if bound is None:
        return inf
    return ledger.projected_epsilon(bound.release(bound.plan.clients), job.rounds)


def _shown(epsilon: float) -> str:
    return f"{epsilon:.3f}" if epsilon < inf else "does not fit the ring: raise quantize.bits"


def _draw(experiment: Experiment, by_round: list[Point], by_noise: list[Point]) -> Path:
    """Write one picture with both curves and return its path."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - only where it draws

    folder = Path(experiment.output)
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([p.rounds for p in by_round], [p.epsilon for p in by_round], marker="o")
    left.set(xlabel="rounds", ylabel="epsilon", title="over the rounds", ylim=(0, None))
    fitting = [point for point in by_noise if point.epsilon < inf]
    right.plot([p.noise_multiplier for p in fitting], [p.epsilon for p in fitting], marker="o")
    right.set(
        xlabel="noise multiplier",
        ylabel=f"epsilon after {experiment.rounds} rounds",
        title="over the noise",
        xscale="log",
        yscale="log",
    )
    right.set_xticks(NOISES, [f"{noise:g}" for noise in NOISES])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "epsilon.png"
    figure.savefig(path, dpi=150)
    return path
