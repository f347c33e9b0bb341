"""A run whose model becomes smaller on the way: one size of update before, one after.

Whatever depends on the number of weights has to hold for both: the ring, the rounding,
and with it the sensitivity that the noise is measured against. So both are put together
before the run; where noise is to be found for a target, the larger one is taken, and
where a cost is stated, the higher one. The ledger knows each round's own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedcore import models, training
from fedcore.data import Dataset
from fedcore.job.costs import Assessment, assess
from fedcore.job.settings import Job
from fedcore.models import NoPruning
from fedcore.pipeline import bind_round, layers_of
from fedcore.vectors import Layout


def layouts_of(job: Job, dataset: Dataset) -> tuple[Layout, ...]:
    """Return the layout of the model in each phase of the run: one, or two with pruning.

    The initial model is pruned for it: that pruning can be done, and gives what devices will
    build, is known before the run and not in the middle of it.

    Raises:
        ConfigurationError: The model cannot take the data's inputs, or cannot be pruned here.
    """
    model = models.build(job.model, dataset.input_shape, dataset.classes, job.seed)
    whole = Layout.of(training.get_arrays(model, copy=False))
    widths = models.pruned_widths(job.model, job.pruning)
    if widths is None or isinstance(job.pruning, NoPruning):
        return (whole,)
    small = models.prune(model, dataset.input_shape, widths)
    pruned = Layout.of(training.get_arrays(small, copy=False))
    return (whole, pruned) if job.pruning.after_round else (pruned,)


def assess_phases(job: Job, layouts: Sequence[Layout], fewest_examples: int) -> Assessment:
    """Return what the run costs; what is put together is its first round.

    Args:
        job: Its noise is given or to be found.
        layouts: From `layouts_of`.
        fewest_examples: On the smallest device.

    Raises:
        ConfigurationError: As `assess`, for any of the sizes.
    """
    found = _each(job, layouts, fewest_examples)
    target = found[0].device
    if target is not None and len(layouts) > 1:
        found = _each(max(found, key=_noise).job, layouts, fewest_examples)
        dearest = max(found, key=_epsilon).device or target
        found[0] = replace(found[0], device=replace(dearest, target=target.target))
    run = found[0].job.plan
    if run is None:
        return found[0]
    # What it costs was found for one flat clip; whether the layers fit is found here.
    bounds = [
        bind_round(replace(phase.bound.plan, run=run, layers=layers_of(run, layout)))
        for phase, layout in zip(found, layouts, strict=True)
        if phase.bound is not None
    ]
    return replace(found[0], bound=bounds[0])


def _each(job: Job, layouts: Sequence[Layout], fewest_examples: int) -> list[Assessment]:
    return [
        assess(
            job,
            parameters=layout.dim,
            fewest_examples=fewest_examples,
            layers=() if job.plan is None else layers_of(job.plan, layout),
        )
        for layout in layouts
    ]


def _noise(assessment: Assessment) -> float:
    return 0.0 if assessment.device is None else assessment.device.noise_multiplier


def _epsilon(assessment: Assessment) -> float:
    return 0.0 if assessment.device is None else assessment.device.epsilon
