"""Pruning, distillation and int8 training: what cannot work is refused before a run."""

import sys
from dataclasses import replace

import pytest

from fedcore.errors import ConfigurationError
from fedcore.job import Int8Aware, Job, ReleaseTeacher, check, trains_for_int8
from fedcore.models import Logistic, Mlp, Structured
from fedcore.pipeline import NoSecAgg, Uniform
from fedcore.privacy import MatrixGaussian
from fedcore.training import ExampleLevelPrivacy
from tests.fedcore.job.test_preflight import JOB

LATER = Structured(after_round=3)
TEACHER = ReleaseTeacher(path="model", key="key.pub")
LOCAL = {"privacy": ExampleLevelPrivacy(), "weighting": Uniform()}
MATRIX = {
    "privacy": MatrixGaussian(
        noise_multiplier=2.0, delta=1e-5, bands=2, min_separation=2, participations=5
    ),
    "weighting": Uniform(),
    "clients": 30,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning": LATER, "error_feedback": True}, "changes its size: set error_feedback=false"),
        ({"pruning": LATER, **MATRIX}, r"removes some: set pruning\.after_round=0"),
        ({"pruning": Structured(after_round=10)}, "must leave a round to recover"),
        ({"pruning": Structured(), "model": Logistic()}, "as they are: raise the ratio"),
        ({"pruning": Structured(ratio=0.01, multiple=64)}, "as they are: raise the ratio"),
        ({"qat": Int8Aware(rounds=11)}, r"qat\.rounds must be at most rounds=10, got 11"),
        ({"qat": Int8Aware(), **LOCAL}, "qat=int8 is for plain local training"),
        ({"distillation": TEACHER, **LOCAL}, "distillation=release is for plain local training"),
        (
            {"distillation": TEACHER, "qat": Int8Aware(), **LOCAL},
            "distillation=release and qat=int8 is for plain",
        ),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_repair(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        Job(**changes)


@pytest.mark.parametrize("changes", [{"error_feedback": True}, MATRIX])
def test_a_model_pruned_before_the_first_round_has_one_size_and_is_accepted(changes):
    Job(**({"pruning": Structured(), "secagg": NoSecAgg()} | changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8Aware(rounds=0), r"qat\.rounds must be at least 1"),
        (lambda: replace(TEACHER, temperature=0.0), r"distillation\.temperature must be positive"),
        (lambda: replace(TEACHER, temperature=float("inf")), r"distillation\.temperature"),
        (lambda: replace(TEACHER, weight=0.0), r"distillation\.weight must be in \(0, 1\]"),
        (lambda: replace(TEACHER, weight=1.1), r"distillation\.weight"),
    ],
)
def test_ranges_are_checked(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_the_last_rounds_train_for_int8():
    job = Job(rounds=5, qat=Int8Aware(rounds=2))
    assert [trains_for_int8(job, number) for number in range(1, 6)] == [False] * 3 + [True] * 2
    assert not trains_for_int8(Job(rounds=5), 5)


def test_a_pruning_that_cannot_be_done_here_is_found_before_the_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    pruned = replace(JOB, model=Mlp(hidden=(16,)), pruning=LATER)
    with pytest.raises(ConfigurationError, match="pruning needs torch-pruning: pip install"):
        check(pruned)
    assert Job.from_json(pruned.to_json()) == pruned  # a device does not need it
    assert check(JOB).sizes == (650,)


def test_both_sizes_must_fit_the_plan():
    job = replace(JOB, model=Mlp(hidden=(16,)), pruning=LATER)
    assert check(job).sizes == (1210, 610)
    assert check(job).parameters == 1210
