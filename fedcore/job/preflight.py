"""Everything that can go wrong before training, found before training.

The data is read, the model is built, the first round's plan is put together for the
real size of the model and cohort, and the privacy of the whole run is added up. What
passes here fails later only for reasons that lie in the world.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

from fedcore import models
from fedcore.data import Dataset, Indices, load, partition
from fedcore.errors import ConfigurationError
from fedcore.job.costs import Assessment
from fedcore.job.optimisation import ReleaseTeacher
from fedcore.job.phases import assess_phases, layouts_of
from fedcore.job.settings import Job
from fedcore.job.teacher import teacher_warnings
from fedcore.pipeline import BoundRound, Layer
from fedcore.privacy import Release
from fedcore.vectors import Layout


@dataclass(frozen=True, slots=True)
class Preflight:
    """What is known about a run before it starts.

    Attributes:
        dataset: All examples.
        shards: Row numbers of each simulated device's training examples.
        layouts: Of the model in each phase of the run: before and after pruning.
        privacy: What all rounds cost, and the job with its noise stated.
    """

    dataset: Dataset = field(repr=False)
    shards: tuple[Indices, ...] = field(repr=False)
    layouts: tuple[Layout, ...]
    privacy: Assessment

    @property
    def sizes(self) -> tuple[int, ...]:
        """Weights of the model in each phase."""
        return tuple(layout.dim for layout in self.layouts)

    @property
    def parameters(self) -> int:
        """Weights of the model in the first round."""
        return self.sizes[0]

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
    layouts = layouts_of(job, dataset)
    fewest = min(len(shard) for shard in shards)
    privacy = assess_phases(job, layouts, fewest)
    if isinstance(job.distillation, ReleaseTeacher):
        warnings = teacher_warnings(job, job.distillation, dataset)
        privacy = replace(privacy, warnings=(*privacy.warnings, *warnings))
    return Preflight(dataset, shards, layouts, privacy)
