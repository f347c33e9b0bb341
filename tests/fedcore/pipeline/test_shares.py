"""The mean of a sum in which not everybody trained everything is that of those who did."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.codec import Clip, Dense, NoRotation, Quantize, RandomK, Sketch
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError
from fedcore.models.parts import part_of
from fedcore.pipeline import (
    AdaptiveClip,
    ByClass,
    ByExamples,
    LocalUpdate,
    Modular,
    NoSecAgg,
    RoundPlan,
    RunPlan,
    Uniform,
    bind_round,
    decode_sum,
    make_upload,
    sent_by,
    trainers_of,
)
from fedcore.privacy import CentralGaussian, DistributedGaussian, MatrixGaussian
from fedcore.vectors import Entry, Layout

LAYOUT = Layout(
    (
        Entry("0.weight", (6, 3), "float32"),
        Entry("0.bias", (6,), "float32"),
        Entry("2.weight", (2, 6), "float32"),
        Entry("2.bias", (2,), "float32"),
    )
)
TWO = ByClass(widths=(0.5, 1.0), steps=(1.0, 1.0), least_trainers=1)
RUN = RunPlan(
    clip=Clip(100.0), weighting=Uniform(), quantize=Modular(32), secagg=NoSecAgg(), shares=TWO
)


def plan_of(run, clients, number=1, **more):
    return RoundPlan(
        run=run, run_id="r", round_number=number, attempt=1, clients=clients, dim=LAYOUT.dim,
        model_digest="", **more,
    )  # fmt: skip


def updates_of(rng, plan, classes):
    shares = plan.run.shares
    for index in classes:
        mask = part_of(LAYOUT, shares.widths[index], shares.structure, plan.round_number - 1).mask()
        yield (rng.normal(size=LAYOUT.dim) * mask).astype(np.float32), mask


def mean_of(plan, classes, updates):
    bound = bind_round(plan)
    total = 0
    for client, (index, update) in enumerate(zip(classes, updates, strict=True)):
        local = LocalUpdate(sent_by(plan, LAYOUT, index, update), 5, {})
        entropy = ReplayedEntropy(f"{client}".encode())
        total = total + make_upload(bound, local, None, entropy).vector
    factor = trainers_of(plan, LAYOUT, classes).factor
    names = [()] * len(classes)
    return decode_sum(bound, bound.ring.reduce(total), len(classes), names, factor=factor).delta


some_classes = st.lists(st.integers(0, 2), min_size=1, max_size=7)


@settings(deadline=None, max_examples=60)
@given(
    classes=some_classes,
    widths=st.tuples(*[st.floats(0.01, 1.0)] * 3),
    structure=st.sampled_from(["nested", "rolling"]),
    number=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_each_coordinates_mean_is_over_exactly_those_who_trained_it(
    classes, widths, structure, number, seed
):
    shares = ByClass(widths=widths, steps=(1.0,) * 3, structure=structure, least_trainers=1)
    plan = plan_of(replace(RUN, shares=shares), len(classes), number)
    pairs = list(updates_of(np.random.default_rng(seed), plan, classes))
    count = sum(mask.astype(int) for _, mask in pairs)
    total = sum(update.astype(np.float64) for update, _ in pairs)
    expected = np.where(count, total / np.maximum(count, 1), 0.0)
    found = mean_of(plan, classes, [update for update, _ in pairs])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found[count == 0] == 0).all()
    assert (trainers_of(plan, LAYOUT, classes).count == count).all()


@settings(deadline=None, max_examples=40)
@given(
    classes=some_classes, steps=st.tuples(*[st.sampled_from([0.2, 0.5, 1.0])] * 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_normalised_steps_give_the_mean_direction_times_the_mean_number_of_steps(
    classes, steps, seed
):
    shares = ByClass(
        widths=(0.5, 0.75, 1.0), steps=steps, structure="nested", normalise=True, least_trainers=1
    )
    plan = plan_of(replace(RUN, shares=shares), len(classes))
    pairs = list(updates_of(np.random.default_rng(seed), plan, classes))
    taken = [steps[index] for index in classes]
    count = np.maximum(sum(mask.astype(int) for _, mask in pairs), 1)
    direction = sum(u.astype(np.float64) / s for (u, _), s in zip(pairs, taken, strict=True))
    length = sum(mask * s for (_, mask), s in zip(pairs, taken, strict=True))
    expected = direction / count * (length / count)
    found = mean_of(plan, classes, [update for update, _ in pairs])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_devices_that_agree_are_agreed_with_however_few_of_them_train_a_weight():
    plan = plan_of(RUN, 5)
    classes = [0, 0, 0, 0, 1]
    same = np.linspace(1, 2, LAYOUT.dim, dtype=np.float32)
    masks = [part_of(LAYOUT, TWO.widths[index], "rolling", 0).mask() for index in classes]
    found = mean_of(plan, classes, [np.where(mask, same, np.float32(0)) for mask in masks])
    np.testing.assert_allclose(found, same, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"sparsify": RandomK(fraction=0.5, unbiased=False)},
        {"quantize": Quantize(bits=16)},
        {"quantize": Quantize(bits=16), "rotate": NoRotation()},
        {"clip": AdaptiveClip()},
    ],
    ids="+".join,
)
def test_every_linear_codec_has_the_same_mean_where_it_sends_something(change):
    plan = plan_of(replace(RUN, **change), 4, clip_norm=100.0 if "clip" in change else None)
    classes = [0, 0, 1, 1]
    pairs = list(updates_of(np.random.default_rng(3), plan, classes))
    expected = sum(u for u, _ in pairs) / sum(m.astype(int) for _, m in pairs)
    found = mean_of(plan, classes, [update for update, _ in pairs])
    kept = found != 0
    assert kept.any()
    np.testing.assert_allclose(found[kept], expected[kept], atol=0.05)


def test_a_sum_has_the_same_sensitivity_with_classes_as_without():
    noisy = replace(
        RUN, clip=Clip(1.0), quantize=Modular(20),
        privacy=DistributedGaussian(noise_multiplier=2.0, delta=1e-3),
    )  # fmt: skip
    with_classes = bind_round(plan_of(noisy, 10))
    without = bind_round(replace(with_classes.plan, run=replace(noisy, shares=RUN.shares)))
    plain = bind_round(plan_of(replace(noisy, shares=type(RunPlan().shares)()), 10))
    assert with_classes.calibration == plain.calibration == without.calibration
    assert with_classes.release(9) == plain.release(9)


@given(steps=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 20))
def test_what_is_clipped_is_what_is_sent_also_when_it_was_made_longer_before(steps, seed):
    shares = ByClass(widths=(1.0,), steps=(steps,), normalise=True, least_trainers=1)
    run = replace(RUN, shares=shares, clip=Clip(0.5), quantize=Quantize(16), rotate=NoRotation())
    plan = plan_of(run, 1)
    update = np.random.default_rng(seed).normal(size=LAYOUT.dim).astype(np.float32)
    bound = bind_round(plan)
    upload = make_upload(
        bound, LocalUpdate(sent_by(plan, LAYOUT, 0, update), 1, {}), None, ReplayedEntropy(b"x")
    )
    sent = bound.codec.decode(upload.vector[: bound.update_dim])
    assert np.linalg.norm(sent) <= 0.5 + 1e-3


def test_what_a_class_does_not_train_must_not_change():
    plan = plan_of(RUN, 2)
    with pytest.raises(ConfigurationError, match="outside of its part"):
        sent_by(plan, LAYOUT, 0, np.ones(LAYOUT.dim, np.float32))
    with pytest.raises(ConfigurationError, match="2 classes of devices, got class 2"):
        sent_by(plan, LAYOUT, 2, np.zeros(LAYOUT.dim, np.float32))


def test_a_plan_with_classes_survives_the_wire():
    plan = plan_of(RUN, 3)
    assert RoundPlan.from_bytes(plan.to_bytes()) == plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weighting": ByExamples()}, "choose weighting=uniform"),
        (
            {
                "privacy": MatrixGaussian(
                    noise_multiplier=8.0, delta=1e-3, bands=1, min_separation=1, participations=6
                ),
                "quantize": Modular(20),
            },
            "privacy=matrix_gaussian takes back",
        ),
        ({"error_feedback": True}, "would send later what a device did not train"),
        (
            {
                "error_feedback": True,
                "shares": replace(TWO, structure="nested"),
                "sparsify": Sketch(fraction=0.5, unbiased=False),
            },
            "nested without sparsify=sketch",
        ),
    ],
)
def test_plans_that_cannot_be_right_are_refused(change, said):
    with pytest.raises(ConfigurationError, match=said):
        replace(RUN, **change)


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": (), "steps": ()},
        {"widths": (1.0,), "steps": (1.0, 1.0)},
        {"widths": (0.0,), "steps": (1.0,)},
        {"widths": (1.0,), "steps": (1.5,)},
        {"widths": (float("nan"),), "steps": (1.0,)},
        {"widths": (1.0,), "steps": (1.0,), "least_trainers": 0},
    ],
)
def test_classes_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        ByClass(**wrong)


def test_nested_parts_may_keep_what_they_did_not_send():
    nested = replace(TWO, structure="nested")
    assert replace(RUN, error_feedback=True, shares=nested).shares == nested
    assert isinstance(replace(RUN, privacy=CentralGaussian(noise_multiplier=1.0, delta=1e-3),
                              quantize=Modular(20)).sparsify, Dense)  # fmt: skip
