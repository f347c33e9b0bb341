"""What the released model came from, measured like it: before pruning, and its teacher.

Both are int8 files on the same test examples, so that what an optimisation cost and what
it saved stand side by side. The model before pruning was trained for fewer rounds: what a
whole run without pruning would have come to, only that run can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
from torch import nn

from fedcore.data import Dataset, Inputs
from fedcore.job import Job, NoDistillation, open_teacher
from fedcore.models import NoPruning, build, fitting_widths
from fedcore.release import Measured, int8_file, measure
from fedcore.training import set_arrays

Arrays = Mapping[str, npt.NDArray[Any]]


def model_of(job: Job, dataset: Dataset, arrays: Arrays) -> nn.Module:
    """Return the job's model with these weights, which may be pruned."""
    widths = fitting_widths(job.model, job.pruning, arrays)
    model = build(job.model, dataset.input_shape, dataset.classes, job.seed, widths)
    set_arrays(model, arrays)
    return model


def unpruned(
    job: Job, dataset: Dataset, arrays: Arrays | None, calibration: Inputs
) -> Measured | None:
    """Return what would have been released right before pruning; None without it.

    Args:
        job: Says whether there was any.
        dataset: Whose test examples count.
        arrays: The last weights before pruning; None if the initial ones were pruned.
        calibration: As for the release.
    """
    if isinstance(job.pruning, NoPruning):
        return None
    model = build(job.model, dataset.input_shape, dataset.classes, job.seed)
    if arrays is not None:
        set_arrays(model, arrays)
    file, _ = int8_file(model, calibration)
    return measure(file, dataset.x_test, dataset.y_test)


def teacher(job: Job, dataset: Dataset) -> Measured | None:
    """Return what the teacher's release takes and is worth; None without one."""
    if isinstance(job.distillation, NoDistillation):
        return None
    release = open_teacher(job.distillation.path, job.distillation.key)
    return measure(release.model, dataset.x_test, dataset.y_test)
