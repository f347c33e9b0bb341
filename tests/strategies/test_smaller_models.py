"""Whole runs whose model is pruned, taught and trained for int8, masks and noise included."""

from dataclasses import replace
from functools import partial
from math import isclose

import numpy as np
import pytest

from clients.teacher import soft_targets
from fedcore.codec import Clip, Delta, PublicTopK, RandomK
from fedcore.crypto import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.data import Digits, load
from fedcore.errors import ConfigurationError
from fedcore.job import FedAvgM, Int8Aware, Job, ReleaseTeacher, Robust, check, open_teacher
from fedcore.manifest import Provenance
from fedcore.models import Mlp, Structured, build, widths_of
from fedcore.pipeline import Modular, PerLayerClip, Uniform
from fedcore.privacy import DistributedGaussian
from fedcore.release import release_model
from fedcore.training import LocalTraining, train
from strategies.factory import build_strategy
from strategies.pruning import PrunedStrategy
from tests.strategies.jobs import CLEAR, JOB, run_job

WIDE = {"model": Mlp(hidden=(16,)), "clip": Clip(100.0)}
"""1,210 weights."""
PRUNED = {**WIDE, "pruning": Structured(ratio=0.5, after_round=1)}
SIZES = [1210, 610, 610]
NOISY = {
    "clip": Clip(0.5),
    "weighting": Uniform(),
    "quantize": Modular(20),
    "privacy": DistributedGaussian(noise_multiplier=0.5, delta=1e-5),
}


def sizes(recorder):
    return [sum(array.size for array in each.arrays.values()) for each in recorder.progress]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A release of a model for digits, and the public key that signed it."""
    folder, data = tmp_path_factory.mktemp("teacher"), load(Digits())
    model = build(Mlp(hidden=(32,)), data.input_shape, data.classes, seed=3)
    config = LocalTraining(epochs=30, batch_size=20, learning_rate=0.1)
    train(model, data.x_train, data.y_train, config, np.random.default_rng(0))
    return released(model, data, folder, tuple("0123456789"))


def released(model, data, folder, labels):
    key = SigningKey.generate(ReplayedEntropy(b"teacher"))
    release_model(
        model,
        folder=folder / "model",
        name="teacher",
        labels=labels,
        calibration=data.x_test[:64],
        x_test=data.x_test[:64],
        y_test=np.minimum(data.y_test[:64], len(labels) - 1),
        key=key,
        provenance=Provenance("run", 0, 1, 3.5, 1e-5, "ab" * 32),
        created_at="2026-01-01T00:00:00+00:00",
    )
    (folder / "teacher.pub").write_bytes(key.public.to_pem())
    return ReleaseTeacher(path=str(folder / "model"), key=str(folder / "teacher.pub"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": FedAvgM(server_momentum=0.5)},
        {"sparsify": RandomK(fraction=0.5)},
        {"sparsify": PublicTopK(fraction=0.5)},
        {"downlink": Delta(8)},
        {"clip": PerLayerClip(1.0, 0.5, (("*.bias", 0.5), ("*", 1.0)))},
    ],
    ids=["plain", "momentum", "random_k", "public_top_k", "delta", "per_layer"],
)
def test_after_pruning_every_round_works_on_the_smaller_model(changes):
    run = run_job(**(PRUNED | changes), training=LocalTraining(epochs=1))
    assert sizes(run) == [1210, 610, 610]
    assert widths_of(run.last.arrays) == (8,)
    assert all(report.survivors == 6 for report in run.reports)
    dims = [release.dim for release in run.last.ledger.releases]
    assert dims[0] > dims[1] == dims[2]


def test_masks_change_no_bit_of_a_pruned_run():
    assert run_job(**PRUNED).model == run_job(**PRUNED, **CLEAR).model


def test_pruning_before_the_first_round_needs_no_second_size():
    job = replace(JOB, **WIDE, pruning=Structured(ratio=0.5))
    assert check(job).sizes == (610,)
    assert sizes(run_job(**WIDE, pruning=Structured(ratio=0.5))) == [610] * 3


def test_uploads_shrink_with_the_model():
    sent = [report.traffic.up_payload for report in run_job(**PRUNED).reports]
    assert sent[0] / sent[1] == pytest.approx(1210 / 610)
    assert sent[1] == sent[2]


def test_the_ledger_follows_the_size_and_stays_within_what_was_stated():
    job = replace(JOB, **(PRUNED | NOISY))
    run, stated = run_job(**(PRUNED | NOISY)), check(job).epsilon
    dims = [release.dim for release in run.last.ledger.releases]
    assert dims == [2048, 1024, 1024] or dims == SIZES
    spent = run.last.ledger.epsilon
    assert spent <= stated * (1 + 1e-9)
    assert isclose(spent, stated, rel_tol=0.05)


def test_a_target_is_kept_for_both_sizes():
    privacy = DistributedGaussian(epsilon=60.0, delta=1e-5)
    changes = PRUNED | NOISY | {"privacy": privacy}
    found = check(replace(JOB, **changes)).job
    assert found.privacy.noise_multiplier > 0
    for pruning in (Structured(ratio=0.5), Job().pruning):
        alone = replace(found, pruning=pruning)
        assert check(alone).epsilon <= 60.0
    assert run_job(**changes | {"privacy": found.privacy}).last.ledger.epsilon <= 60.0


def test_all_three_together_are_as_good_as_the_model_before(teacher):
    training = LocalTraining(epochs=4, batch_size=20, learning_rate=0.1)
    changes = {**PRUNED, "training": training, "rounds": 8, "evaluate_every": 8}
    changes["pruning"] = Structured(ratio=0.5, after_round=4)
    plain = run_job(**WIDE, training=training, rounds=8, evaluate_every=8)
    small = run_job(**changes, distillation=teacher, qat=Int8Aware(rounds=3))
    assert sizes(small) == [1210] * 4 + [610] * 4
    assert small.accuracy > plain.accuracy - 0.05


def test_int8_training_changes_the_last_rounds_and_no_others():
    plain, aware = run_job(**WIDE), run_job(**WIDE, qat=Int8Aware(rounds=1))
    same = [
        np.array_equal(a.arrays["fc1.weight"], b.arrays["fc1.weight"])
        for a, b in zip(plain.progress, aware.progress, strict=True)
    ]
    assert same == [True, True, False]


def test_a_teacher_changes_what_is_learnt(teacher):
    assert run_job(**WIDE).model != run_job(**WIDE, distillation=teacher).model


def test_a_teacher_is_checked_before_the_run(teacher, tmp_path):
    for changes, message in (
        ({"path": str(tmp_path)}, r"distillation\.path must be a release"),
        ({"key": str(tmp_path / "none")}, r"distillation\.key must be a readable PEM file"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            check(replace(JOB, distillation=replace(teacher, **changes)))
    other = SigningKey.generate(ReplayedEntropy(b"somebody else"))
    (tmp_path / "other.pub").write_bytes(other.public.to_pem())
    with pytest.raises(ConfigurationError, match=r"signed by distillation\.key"):
        open_teacher(teacher.path, str(tmp_path / "other.pub"))


def test_a_teacher_of_other_classes_is_refused_by_coordinator_and_device(tmp_path):
    data = load(Digits())
    config = released(
        build(Mlp(hidden=(4,)), data.input_shape, 3, seed=0), data, tmp_path, tuple("abc")
    )
    job = replace(JOB, distillation=config)
    with pytest.raises(ConfigurationError, match=r"10 classes, found one for \[1, 8, 8\] and 3"):
        check(job)
    with pytest.raises(ConfigurationError, match="for 10 classes, found one for 3"):
        soft_targets(job, {}, data.x_train[:5], 10)


def test_a_device_may_have_its_own_copy_of_the_teacher(teacher):
    job = replace(JOB, distillation=replace(teacher, path="nowhere", key="nowhere.pub"))
    node = {"teacher-path": teacher.path, "teacher-key": teacher.key}
    x = load(Digits()).x_train[:5]
    targets = soft_targets(job, node, x, 10)
    assert targets.probabilities.shape == (5, 10)
    assert soft_targets(JOB, node, x, 10) is None
    with pytest.raises(ConfigurationError, match=r"nowhere\.pub"):
        soft_targets(job, {}, x, 10)


def test_what_a_teacher_cost_is_pointed_out(teacher):
    warned = check(replace(JOB, **NOISY, distillation=teacher)).privacy.warnings
    assert any("released with epsilon 3.5" in warning for warning in warned)


def test_an_aborted_round_prunes_the_same_model_again():
    class Calls:
        def __init__(self):
            self.seen = []

        def configure_train(self, server_round, arrays, config, grid):
            self.seen.append((server_round, arrays))
            return []

    made = []
    strategy = PrunedStrategy(lambda: made.append(Calls()) or made[-1], lambda a: a[:1], 1)
    for server_round, arrays in ((1, "large"), (2, "large"), (3, "large"), (4, "l")):
        strategy.configure_train(server_round, arrays, None, None)
    assert made[0].seen == [(1, "large")]
    assert made[1].seen == [(2, "l"), (3, "l"), (4, "l")]
    assert len(made) == 2


@pytest.mark.parametrize(("kind", "single"), [("krum", True), ("fedmedian", True)])
def test_a_strategy_that_needs_single_updates_still_says_so(kind, single):
    inside = partial(build_strategy, Robust(kind), cohort=4)
    assert PrunedStrategy(inside, lambda arrays: arrays, 1).requires_individual_updates == single
    linear = partial(build_strategy, FedAvgM(), cohort=4)
    assert not PrunedStrategy(linear, lambda arrays: arrays, 1).requires_individual_updates
