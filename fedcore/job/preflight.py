"""Everything that can go wrong before training, found before training.

The data is read, the model is built, the first round's plan is put together for the
real size of the model and cohort, and the privacy of the whole run is added up. What
passes here fails later only for reasons that lie in the world.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

from fedcore import models, training
from fedcore.data import Dataset, Indices, load, partition
from fedcore.errors import ConfigurationError
from fedcore.job.costs import Assessment, assess
from fedcore.job.settings import Job
from fedcore.pipeline import BoundRound, Layer, bind_round, layers_of
from fedcore.privacy import Release
from fedcore.vectors import Layout


@dataclass(frozen=True, slots=True)
class Preflight:
    """What is known about a run before it starts.

    Attributes:
        dataset: All examples.
        shards: Row numbers of each simulated device's training examples.
        parameters: Trainable weights of the model.
        privacy: What all rounds cost, and the job with its noise stated.
    """

    dataset: Dataset = field(repr=False)
    shards: tuple[Indices, ...] = field(repr=False)
    parameters: int
    privacy: Assessment

    @property
    def job(self) -> Job:
        """What was checked, with the noise stated that it asked for."""
        return self.privacy.job

    @property
    def bound(self) -> BoundRound | None:
        """The first round put together; None for plain float32."""
        return self.privacy.bound

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of the model, if the rounds treat them apart."""
        return () if self.bound is None else self.bound.plan.layers

    @property
    def example_release(self) -> Release | None:
        """One round of DP-SGD on the device with the fewest examples; None without it.

        That device has the highest sampling rate.
        """
        return self.privacy.example_release

    @property
    def epsilon(self) -> float:
        """What the run costs a device, or an example where only examples are protected."""
        cost = self.privacy.device or self.privacy.example
        return inf if cost is None else cost.epsilon

    @property
    def delta(self) -> float | None:
        """That goes with `epsilon`; None without noise."""
        cost = self.privacy.device or self.privacy.example
        return None if cost is None else cost.delta


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
    fewest = min(len(shard) for shard in shards)
    layout, plan = Layout.of(training.get_arrays(model, copy=False)), job.plan
    layers = () if plan is None else layers_of(plan, layout)
    privacy = assess(job, parameters=parameters, fewest_examples=fewest, layers=layers)
    run = privacy.job.plan
    if run is not None and privacy.bound is not None:
        # What it costs was found for one flat clip; whether the layers fit is found here.
        first = replace(privacy.bound.plan, run=run, layers=layers)
        privacy = replace(privacy, bound=bind_round(first))
    return Preflight(dataset, shards, parameters, privacy)
