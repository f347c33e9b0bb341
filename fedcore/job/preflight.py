"""Everything that can go wrong before training, found before training.

The data is read, the model is built, the first round's plan is put together for the
real size of the model and cohort, and the privacy of the whole run is added up. What
passes here fails later only for reasons that lie in the world.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from fedcore import models
from fedcore.data import Dataset, Indices, load, partition
from fedcore.errors import ConfigurationError
from fedcore.job.settings import Job
from fedcore.pipeline import Bonawitz, BoundRound, RoundPlan, bind_round
from fedcore.privacy import NoPrivacy, PrivacyLedger, Release
from fedcore.training import ExampleLevelPrivacy


@dataclass(frozen=True, slots=True)
class Preflight:
    """What is known about a run before it starts.

    Attributes:
        dataset: All examples.
        shards: Row numbers of each simulated device's training examples.
        parameters: Trainable weights of the model.
        bound: The first round put together; None for plain float32.
        example_release: One round of DP-SGD on the device with the fewest examples,
            which has the highest sampling rate; None without it.
        epsilon: What the whole run will cost; infinite without noise.
        delta: That goes with it; None without noise.
    """

    dataset: Dataset = field(repr=False)
    shards: tuple[Indices, ...] = field(repr=False)
    parameters: int
    bound: BoundRound | None
    example_release: Release | None
    epsilon: float
    delta: float | None


def check(job: Job) -> Preflight:
    """Read the data, put the first round together, and add up the privacy of all rounds.

    Raises:
        DataError: The data is missing, malformed or does not fit.
        ConfigurationError: The job cannot work, or would exceed its privacy budget.
    """
    dataset = load(job.data)
    if job.classes is not None and job.classes != dataset.classes:
        msg = (
            f"classes must be {dataset.classes}, as the data set {dataset.name!r} has, "
            f"got {job.classes}"
        )
        raise ConfigurationError(msg)
    models.check_fit(job.model, dataset.input_shape)
    shards = partition(dataset, job.partition, job.clients, job.seed)
    model = models.build(job.model, dataset.input_shape, dataset.classes, job.seed)
    parameters = models.parameter_count(model)
    bound = first_round(job, parameters)
    release = _example_release(job, shards)
    epsilon, delta = projected(job, bound, release)
    return Preflight(dataset, shards, parameters, bound, release, epsilon, delta)


def first_round(job: Job, dim: int) -> BoundRound | None:
    """Return the first round put together for a model of `dim` weights.

    Raises:
        ConfigurationError: The stages do not fit each other, the cohort or the ring.
    """
    plan = job.plan
    if plan is None:
        return None
    if isinstance(plan.secagg, Bonawitz):
        plan.secagg.check_margin(job.clients_per_round)
    round_plan = RoundPlan(
        run=plan,
        run_id="preflight",
        round_number=1,
        attempt=1,
        clients=job.clients_per_round,
        dim=dim,
        model_digest="",
    )
    return bind_round(round_plan)


def projected(
    job: Job, bound: BoundRound | None, example_release: Release | None
) -> tuple[float, float | None]:
    """Return (epsilon, delta) after all rounds.

    Raises:
        ConfigurationError: The budget would be exceeded.
    """
    if isinstance(job.privacy, ExampleLevelPrivacy) and example_release is not None:
        ledger = PrivacyLedger(delta=job.privacy.delta)
        return ledger.projected_epsilon(example_release, job.rounds), job.privacy.delta
    if bound is None or isinstance(job.privacy, (NoPrivacy, ExampleLevelPrivacy)):
        return inf, None
    ledger = PrivacyLedger(delta=job.privacy.delta)
    release = bound.release(bound.plan.clients)
    epsilon = ledger.projected_epsilon(release, job.rounds)
    budget = job.privacy.epsilon_budget
    if budget is not None and epsilon > budget:
        affordable = _affordable_rounds(ledger, release, job.rounds, budget)
        msg = (
            f"privacy.epsilon_budget must be at least {epsilon:.4g} for {job.rounds} rounds, "
            f"got {budget:g}: it lasts for {affordable} rounds; raise it, lower rounds, or raise "
            "privacy.noise_multiplier"
        )
        raise ConfigurationError(msg)
    return epsilon, job.privacy.delta


def _affordable_rounds(ledger: PrivacyLedger, release: Release, rounds: int, budget: float) -> int:
    """Return the most rounds, fewer than `rounds`, that cost at most `budget`."""
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        if ledger.projected_epsilon(release, middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def _example_release(job: Job, shards: tuple[Indices, ...]) -> Release | None:
    if not isinstance(job.privacy, ExampleLevelPrivacy):
        return None
    fewest = min(len(shard) for shard in shards)
    size = job.training.batch_size
    batches = -(-fewest // size) if size else 1
    return Release(
        round_number=1,
        unit="example",
        mechanism="gaussian" if job.privacy.noise_multiplier else "none",
        noise_multiplier=job.privacy.noise_multiplier,
        sampling="poisson",
        sampling_rate=1 / batches,
        amplification_claimed=batches > 1,
        steps=job.training.epochs * batches,
    )
