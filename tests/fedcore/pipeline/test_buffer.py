"""The laws of a buffer: weights, sensitivity, the mean, and who sits where."""

from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import Clip, Dense, Hadamard, NoRotation, Quantize, RandomK
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.pipeline import (
    Buffer,
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
    staleness_weight,
)
from fedcore.privacy import DistributedGaussian
from tests.fedcore.pipeline.rounds import round_plan

VERSIONS = tuple(f"{place:02x}" * 32 for place in range(8))
CLEAR = RunPlan(
    clip=Clip(1.0),
    rotate=NoRotation(),
    quantize=Quantize(24),
    secagg=NoSecAgg(),
    weighting=Uniform(),
    metric_slots=0,
)
ages = st.lists(st.integers(0, len(VERSIONS) - 1), min_size=1, max_size=8)
exponents = st.floats(0, 4)
updates = arrays(np.float32, 12, elements=st.floats(-1e3, 1e3, width=32))


def buffered(run, staleness, *, exponent=0.5, **changes):
    """The plan of a buffer with these seats."""
    buffer = Buffer(versions=VERSIONS, staleness=tuple(staleness), exponent=exponent)
    values = {"clients": len(staleness), "model_digest": VERSIONS[0], "buffer": buffer}
    return round_plan(run, **(values | changes))


def upload(bound, delta, staleness, name="one"):
    entropy = ReplayedEntropy(b"seed").child(name)
    return make_upload(bound, LocalUpdate(delta, 1, {}), None, entropy, staleness=staleness)


@given(staleness=st.integers(0, 10**6), exponent=exponents)
def test_a_weight_is_above_zero_and_never_above_one(staleness, exponent):
    weight = staleness_weight(staleness, exponent)
    assert 0 < weight <= 1
    assert weight >= staleness_weight(staleness + 1, exponent)
    assert staleness_weight(0, exponent) == 1
    assert staleness_weight(staleness, 0) == 1


def test_the_default_weight_is_that_of_the_paper():
    for staleness in range(50):
        assert staleness_weight(staleness, 0.5) == pytest.approx(1 / sqrt(1 + staleness))


@given(delta=updates, staleness=st.integers(0, 7), exponent=exponents)
def test_what_a_device_sends_is_never_longer_than_the_clip_however_old_it_is(
    delta, staleness, exponent
):
    bound = bind_round(buffered(CLEAR, (staleness, 0), exponent=exponent))
    sent = bound.sent.decode(upload(bound, delta, staleness).vector)
    rounding = sqrt(12) / (1 << 22)
    assert np.linalg.norm(sent) <= 1.0 + rounding
    weight = bound.plan.buffer.weight(staleness)
    assert np.linalg.norm(sent) <= min(1.0, np.linalg.norm(delta.astype(float))) * weight + rounding


@given(staleness=ages, exponent=exponents)
def test_a_buffer_costs_what_a_round_costs(staleness, exponent):
    run = replace(
        CLEAR,
        rotate=Hadamard(),
        quantize=Modular(20),
        privacy=DistributedGaussian(noise_multiplier=1.0, delta=1e-5),
        secagg=NoSecAgg(),
    )
    plan = buffered(run, staleness, exponent=exponent)
    in_buffer, in_round = bind_round(plan), bind_round(replace(plan, buffer=None))
    assert in_buffer.calibration == in_round.calibration
    assert in_buffer.release(len(staleness)) == in_round.release(len(staleness))


@given(data=st.data(), staleness=ages, exponent=exponents, sparse=st.booleans())
def test_the_mean_is_that_of_the_clipped_updates_weighed_by_their_age(
    data, staleness, exponent, sparse
):
    run = replace(CLEAR, sparsify=RandomK(0.5) if sparse else Dense(), dropout=0.9)
    plan = buffered(run, staleness, exponent=exponent)
    bound = bind_round(plan)
    deltas = [data.draw(updates) for _ in staleness]
    survivors = sorted(data.draw(st.sets(st.integers(0, len(staleness) - 1), min_size=1)))
    total = bound.ring.zeros(bound.dim)
    for seat in survivors:
        total = total + upload(bound, deltas[seat], staleness[seat], str(seat)).vector
    stale = plan.buffer.total(survivors)
    mean = decode_sum(bound, bound.ring.reduce(total), len(survivors), [()], stale=stale)
    weights = [(1 + staleness[seat]) ** -exponent for seat in survivors]
    assert stale == pytest.approx(sum(weights))
    kept = [bound.kept.decode(bound.kept.encode(deltas[seat], None)) for seat in survivors]
    expected = sum(weight * x for weight, x in zip(weights, kept, strict=True)) / sum(weights)
    rounding = len(survivors) / sum(weights) / (1 << 22)
    np.testing.assert_allclose(mean.delta, expected, atol=rounding + 1e-6)


def test_a_round_and_a_buffer_of_one_version_send_the_same_bits():
    fresh = buffered(CLEAR, (0,) * 5)
    delta = np.linspace(-1, 1, 12, dtype=np.float32)
    one = upload(bind_round(fresh), delta, 0)
    other = upload(bind_round(replace(fresh, buffer=None)), delta, 0)
    assert one.vector.tobytes() == other.vector.tobytes()


def test_a_buffer_survives_the_wire():
    plan = buffered(CLEAR, (0, 3, 1, 1, 0))
    assert RoundPlan.from_bytes(plan.to_bytes()) == plan


@pytest.mark.parametrize(
    ("staleness", "dropped", "alike"),
    [
        ((0, 0, 0), 0, 3),
        ((0, 0, 0), 1, 2),
        ((0, 0, 0, 1, 1), 0, 2),
        ((0, 0, 0, 1, 1), 1, 1),
        ((0, 0, 0, 1), 0, 1),
        ((4, 4, 4), 3, 1),  # a device is there itself
    ],
)
def test_as_many_have_the_model_of_any_member_as_the_smallest_group_without_the_lost(
    staleness, dropped, alike
):
    assert Buffer(versions=VERSIONS, staleness=staleness).alike(dropped) == alike


def test_a_device_takes_its_seat_only_if_it_names_the_model_that_it_has():
    buffer = Buffer(versions=VERSIONS, staleness=(0, 2, 2))
    assert buffer.seated(VERSIONS[0], 0) == 0
    assert buffer.seated(VERSIONS[2], 1) == buffer.seated(VERSIONS[2], None) == 2
    for digest, seat in ((VERSIONS[2], 0), (VERSIONS[0], 1), (VERSIONS[1], 2), (VERSIONS[2], 3)):
        with pytest.raises(PeerProtocolError, match=f"seat {seat} must name the model"):
            buffer.seated(digest, seat)
    with pytest.raises(PeerProtocolError, match="none of the 8 versions that the buffer admits"):
        buffer.seated("ff" * 32, None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"versions": ()}, "must hold 1 to 1024, got 0"),
        ({"versions": VERSIONS[:1] * 2}, "must differ"),
        ({"staleness": (0, 8)}, "must be in 0..7"),
        ({"staleness": (-1,)}, "must be in 0..7"),
        ({"exponent": -1.0}, "buffer.exponent must be in"),
    ],
)
def test_a_buffer_that_means_nothing_is_refused(changes, why):
    with pytest.raises(ConfigurationError, match=why):
        Buffer(**({"versions": VERSIONS, "staleness": (0, 1)} | changes))


def test_a_plan_refuses_a_buffer_of_another_cohort_or_model():
    for changes in ({"clients": 4}, {"model_digest": VERSIONS[1]}):
        with pytest.raises(ConfigurationError, match="the current model as its first version"):
            buffered(CLEAR, (0,) * 5, **changes)
    with pytest.raises(ConfigurationError, match="choose weighting=uniform"):
        buffered(replace(CLEAR, weighting=ByExamples()), (0,) * 5)
