"""What a run would cost in privacy: over its rounds, its noise and its bits, without training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from experiments import account_plot
from experiments.costs import costs_in_words, warnings_in_words
from experiments.schema import Experiment, Sizes
from fedcore.codec import Dense
from fedcore.errors import ConfigurationError
from fedcore.job import Assessment, Cost, assess, check, of_devices
from fedcore.pipeline import Modular, RoundPlan, bind_first, projected_epsilon, with_noise
from fedcore.privacy import NoPrivacy, PrivacyLedger, Release

UNFIT = "does not fit ring or cohort: raise quantize.bits or clients_per_round"
NOISES = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
BITS = range(6, 33)
_NOTHING = 1.0001


@dataclass(frozen=True, slots=True)
class Account:
    """The curves of one unit.

    Attributes:
        cost: Of the run as it is configured.
        by_round: (rounds, epsilon).
        by_noise: (noise multiplier, epsilon of the whole run); infinite if it does not fit.
    """

    cost: Cost
    by_round: tuple[tuple[int, float], ...]
    by_noise: tuple[tuple[float, float], ...]


def account(experiment: Experiment, sizes: Sizes | None = None) -> str:
    """Draw all curves and return the text to print.

    Args:
        experiment: Whose privacy is accounted.
        sizes: Instead of those of its data, which is then not read.

    Raises:
        ConfigurationError: The run adds no noise, cannot work, or exceeds its budget.
    """
    job = experiment.job
    if sizes is None:
        preflight = check(job)
        parameters, privacy = preflight.parameters, preflight.privacy
    else:
        parameters = sizes.parameters
        if not isinstance(job.sparsify, Dense) and job.sparsify.dense_below > 0:
            msg = (
                "what is sent with sparsify.dense_below follows from the model's layers: choose "
                "sparsify.dense_below=0, or leave the sizes to the model"
            )
            raise ConfigurationError(msg)
        privacy = assess(job, parameters=parameters, fewest_examples=sizes.examples)
    if privacy.device is None and privacy.example is None:
        msg = (
            f"privacy={job.privacy.kind} adds no noise, so epsilon is infinite: choose "
            "one of the mechanisms of conf/privacy, such as privacy=distributed_gaussian"
        )
        raise ConfigurationError(msg)
    accounts = _accounts(privacy)
    by_bits = _inflation_by_bits(privacy)
    folder = Path(experiment.output)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "epsilon.png"
    picture.write_bytes(account_plot.draw(accounts, privacy.job.rounds, by_bits))
    return "\n".join(_lines(privacy, parameters, accounts, by_bits, picture))


def _accounts(privacy: Assessment) -> list[Account]:
    """Return the curves of each unit that is protected."""
    job, bound = privacy.job, privacy.bound
    found = []
    if privacy.device is not None and bound is not None:
        release = bound.release(bound.plan.clients)
        found.append(
            _curves(
                privacy.device,
                job.rounds,
                release,
                lambda z: _of_sums(bound.plan, job.rounds, z),
            )
        )
    if privacy.example is not None and privacy.example_release is not None:
        local, delta = privacy.example_release, privacy.example.delta
        found.append(
            _curves(
                privacy.example,
                job.rounds,
                local,
                lambda z: PrivacyLedger(delta=delta).projected_epsilon(
                    replace(local, noise_multiplier=z, mechanism="gaussian"), job.rounds
                ),
            )
        )
    return found


def _curves(
    cost: Cost, rounds: int, release: Release, epsilon: account_plot.EpsilonOfNoise
) -> Account:
    ledger = PrivacyLedger(delta=cost.delta)
    noises = sorted({*NOISES, cost.noise_multiplier} - {0.0})
    return Account(
        cost,
        tuple((count, ledger.projected_epsilon(release, count)) for count in _milestones(rounds)),
        tuple((noise, epsilon(noise)) for noise in noises),
    )


def _of_sums(first: RoundPlan, rounds: int, noise: float) -> float:
    """Return epsilon of the whole run with another noise; infinite if that does not fit."""
    try:
        plan = with_noise(first.run, noise)
        bound = bind_first(plan, clients=first.clients, dim=first.dim, layers=first.layers)
    except ConfigurationError:
        return inf  # more noise than the ring holds, or too little for a share
    return projected_epsilon(bound, rounds, getattr(first.run.privacy, "delta", 1e-5))


def _inflation_by_bits(privacy: Assessment) -> list[tuple[int, float]]:
    """Return the inflation for every number of bits in which this noise fits at all."""
    if privacy.device is None or privacy.bound is None:
        return []
    first, found = privacy.bound.plan, []
    plan = first.run
    if not isinstance(plan.quantize, Modular):
        return []
    sums = of_devices(privacy.job.privacy)
    if isinstance(sums, NoPrivacy):
        return []
    unlimited = replace(plan, privacy=replace(sums, max_inflation=100.0))
    for bits in BITS:
        wider = replace(unlimited, quantize=replace(plan.quantize, bits=bits))
        try:
            bound = bind_first(wider, clients=first.clients, dim=first.dim, layers=first.layers)
        except ConfigurationError:
            continue
        if bound.calibration is not None:
            found.append((bits, bound.calibration.inflation))
            if bits >= privacy.bound.ring.bits and bound.calibration.inflation < _NOTHING:
                break  # more bits buy nothing
    return found


def _milestones(rounds: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... and the last round."""
    steps = [step * 10**power for power in range(9) for step in (1, 2, 5)]
    return [*(step for step in steps if step < rounds), rounds]


def _lines(
    privacy: Assessment,
    parameters: int,
    accounts: list[Account],
    by_bits: list[tuple[int, float]],
    picture: Path,
) -> list[str]:
    job = privacy.job
    lines = [
        f"{job.name}: {parameters:,} weights, {job.rounds} rounds, {job.clients_per_round} of "
        f"{job.clients} devices a round",
        *costs_in_words(privacy),
        *warnings_in_words(privacy),
    ]
    for entry in accounts:
        lines += ["", *_table(entry, job.rounds, privacy)]
    if by_bits:
        lines += ["", "  bits     noise over the central Gaussian's"]
        lines += [f"  {bits:>4}     {inflation:.4f}" for bits, inflation in by_bits]
    return [*lines, "", f"  picture  {picture}"]


def _table(entry: Account, rounds: int, privacy: Assessment) -> list[str]:
    release = privacy.example_release
    claimed = entry.cost.unit == "example" and release and release.amplification_claimed
    sampling = "counts in its favour (Poisson)" if claimed else "is not counted"
    return [
        f"  for one {entry.cost.unit}, delta {entry.cost.delta:g}; that it is sampled {sampling}",
        "",
        "  rounds   epsilon",
        *(f"  {count:>6}   {epsilon:>7.3f}" for count, epsilon in entry.by_round),
        "",
        f"  noise    epsilon after {rounds} rounds",
        *(f"  {noise:>5.5g}    {_shown(epsilon)}" for noise, epsilon in entry.by_noise),
    ]


def _shown(epsilon: float) -> str:
    return f"{epsilon:.3f}" if epsilon < inf else UNFIT
