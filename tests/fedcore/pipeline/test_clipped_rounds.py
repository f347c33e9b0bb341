"""Whole rounds with an adaptive clip or one for each layer: sums, sensitivity, answers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import Clip, ClipSegments, Discretize, Quantize, RandomK, TellingClip
from fedcore.codec.clip import clip_norm
from fedcore.errors import ConfigurationError
from fedcore.pipeline import (
    AdaptiveClip,
    ByExamples,
    Layer,
    Modular,
    NoSecAgg,
    PerLayerClip,
    RunPlan,
    Uniform,
    decode_sum,
    make_upload,
)
from fedcore.privacy import DistributedGaussian, DistributedSkellam
from fedcore.secagg.loopback import run_round
from tests.fedcore.pipeline.rounds import (
    bound_round,
    entropy_of,
    local,
    private_plan,
    upload_all,
)

ADAPTIVE = AdaptiveClip(fraction_noise=0.4)
SIZES = (20, 1, 9, 10)
LAYERS = tuple(Layer(f"layer{number}", size) for number, size in enumerate(SIZES))
values = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, 1e30, float("nan")])
vectors = arrays(np.float32, 40, elements=values)
sparsifiers = st.builds(RandomK, st.floats(0.05, 1.0))


def mean_of(bound, updates):
    total, uploads = upload_all(bound, updates)
    return decode_sum(bound, total, len(updates), [upload.metric_names for upload in uploads])


def telling_round(clip=ADAPTIVE, norm=1.0, dim=40, clients=5, **changes):
    run = private_plan(clip=clip, secagg=NoSecAgg(), **{"quantize": Modular(24), **changes})
    return bound_round(run, dim=dim, clients=clients, clip_norm=norm)


def layered_round(run=None, **changes):
    run = run or RunPlan(clip=PerLayerClip(2.0), weighting=Uniform(), secagg=NoSecAgg())
    return bound_round(run, dim=sum(SIZES), layers=LAYERS, **changes)


@settings(max_examples=150)
@given(x=vectors, norm=st.floats(1e-3, 1e3), sparsify=sparsifiers, client=st.integers(0, 99))
def test_no_input_exceeds_the_calibrated_sensitivity_answer_included(x, norm, sparsify, client):
    bound = telling_round(norm=norm, sparsify=sparsify)
    found = bound.calibration
    assert isinstance(bound.clip, TellingClip)
    assert found.clip == bound.kept.target.norm
    assert found.clip == pytest.approx(np.hypot(norm, bound.clip.weight * norm), rel=1e-14)
    discretize = Discretize(found.scale, found.rounded_norm, found.signal_spread)
    y = bound.kept.encode(x, entropy_of(client))
    rounded = discretize.bind(bound.kept.target).encode(y, entropy_of(client))
    assert len(y) == found.dim == bound.update_dim
    assert np.linalg.norm(rounded) <= found.rounded_norm


@pytest.mark.parametrize("mechanism", [DistributedGaussian, DistributedSkellam])
@pytest.mark.parametrize("fitting", [0, 3, 8])
def test_the_decoded_fraction_is_unbiased_with_the_stated_noise(mechanism, fitting):
    privacy = mechanism(noise_multiplier=1.0, delta=1e-5)
    bound = telling_round(AdaptiveClip(fraction_noise=0.2), clients=8, privacy=privacy, dropout=0.0)
    short, long = np.full(40, 0.01), np.full(40, 9.0)
    told = []
    for attempt in range(400):
        uploads = [
            make_upload(bound, local(short if c < fitting else long), None, entropy_of(c, attempt))
            for c in range(8)
        ]
        total = bound.ring.reduce(sum(upload.vector.astype(np.uint64) for upload in uploads))
        told.append(decode_sum(bound, total, 8, [()]).unclipped)
    # Six standard errors of a mean over 400; a deviation over 400 is within 4 % of itself.
    assert np.mean(told) == pytest.approx(fitting / 8, abs=6 * 0.2 / 20)
    assert np.std(told) == pytest.approx(0.2, rel=0.2)


def test_the_noise_on_the_update_is_that_of_the_longer_norm():
    clip = AdaptiveClip(fraction_noise=0.2)
    bound = telling_round(clip, norm=2.0, dim=20_000, clients=8, dropout=0.0)
    mean = mean_of(bound, [local(np.zeros(20_000)) for _ in range(8)])
    longer = 2.0 * np.hypot(1, clip.weight(1.0, 8))
    assert mean.delta.shape == (20_000,)
    assert mean.delta.std() * 8 == pytest.approx(longer, rel=0.03)


def test_the_ledger_sees_the_configured_noise_whatever_the_clip():
    small, large = (telling_round(norm=norm).release(5) for norm in (1e-3, 1e3))
    assert small.noise_multiplier == 1.0
    assert small.dim == 41
    assert replace(small, scale=1.0) == replace(large, scale=1.0)
    assert small.scale == pytest.approx(large.scale * 1e6)


@pytest.mark.parametrize("quantize", [Modular(24), Quantize(16)])
@pytest.mark.parametrize("weighting", [Uniform(), ByExamples(10)])
def test_without_noise_the_fraction_is_exact_and_nothing_is_appended(quantize, weighting):
    run = RunPlan(clip=AdaptiveClip(), quantize=quantize, weighting=weighting, secagg=NoSecAgg())
    bound = bound_round(run, clients=4, dim=2, clip_norm=1.0)
    deltas = ([3.0, 4.0], [0.6, 0.7], [0.0, np.nan], [0.0, -9.0])
    mean = mean_of(bound, [local(delta, 10) for delta in deltas])
    assert bound.update_dim == 2
    assert (mean.clipped, mean.unclipped) == (3, 0.25)
    np.testing.assert_allclose(mean.delta, [0.3, (0.8 + 0.7 - 1) / 4], atol=1e-3)


def test_under_noise_a_fixed_clip_tells_nothing():
    bound = bound_round(private_plan(secagg=NoSecAgg()))
    assert mean_of(bound, [local(np.zeros(12))] * 5).unclipped is None


@settings(max_examples=100)
@given(
    clients=st.integers(1, 5),
    sparsify=sparsifiers,
    power=st.sampled_from([0.0, 0.5]),
    feedback=st.booleans(),
    data=st.data(),
)
def test_the_sum_of_layers_is_the_sum_of_the_clipped_layers(
    clients, sparsify, power, feedback, data
):
    clip = PerLayerClip(2.0, power)
    run = RunPlan(
        clip=clip, sparsify=sparsify, weighting=Uniform(), secagg=NoSecAgg(),
        quantize=Modular(24, tails=8.0), error_feedback=feedback,
    )  # fmt: skip
    bound = layered_round(run, clients=clients)
    elements = st.floats(-1e4, 1e4, width=32)
    deltas = data.draw(arrays(np.float32, (clients, 40), elements=elements))
    support = replace(sparsify, seed=bound.plan.stage_seed("support")).positions(40)
    edges = np.cumsum((0, *SIZES))
    expected = np.zeros(40)
    for delta in deltas.astype(np.float64):
        for start, stop, norm in zip(edges[:-1], edges[1:], clip.bounds(LAYERS), strict=True):
            here = support[(support >= start) & (support < stop)]
            kept = clip_norm(delta[here], norm)
            assert np.linalg.norm(kept) <= norm * (1 + 1e-12)
            expected[here] += kept / clients
    mean = mean_of(bound, [local(delta) for delta in deltas])
    loss = 1 / bound.calibration.scale * bound.update_dim**0.5
    assert np.linalg.norm(mean.delta - expected) <= loss + 1e-5
    assert bound.kept.target.norm == pytest.approx(2.0)


@given(x=vectors, client=st.integers(0, 99))
def test_no_input_exceeds_the_sensitivity_of_its_layers(x, client):
    run = private_plan(clip=PerLayerClip(0.3), secagg=NoSecAgg(), quantize=Modular(24))
    bound = layered_round(run)
    found = bound.calibration
    assert isinstance(bound.clip, ClipSegments)
    y = bound.kept.encode(x, entropy_of(client))
    discretize = Discretize(found.scale, found.rounded_norm, found.signal_spread)
    rounded = discretize.bind(bound.kept.target).encode(y, entropy_of(client))
    assert np.linalg.norm(rounded) <= found.rounded_norm


@pytest.mark.parametrize(
    ("run", "changes"),
    [
        (private_plan(clip=ADAPTIVE, quantize=Modular(18)), {"clip_norm": 0.4}),
        (RunPlan(clip=ADAPTIVE), {"clip_norm": 0.4}),
        (RunPlan(clip=PerLayerClip(), sparsify=RandomK(0.3)), {"layers": LAYERS}),
        (private_plan(clip=PerLayerClip(), quantize=Modular(18)), {"layers": LAYERS}),
    ],
)
def test_masks_change_neither_the_sum_nor_the_answer(run, changes):
    bound = bound_round(run, clients=6, dim=40, **changes)
    rng = np.random.default_rng(3)
    total, uploads = upload_all(bound, [local(rng.normal(size=40) / n, n) for n in range(1, 7)])
    vectors = {client: upload.vector for client, upload in enumerate(uploads)}
    outcome = run_round(vectors, bound.secagg)
    assert outcome.total.tobytes() == total.tobytes()
    open_, masked = (decode_sum(bound, vector, 6, [()]) for vector in (total, outcome.total))
    assert masked.unclipped == open_.unclipped
    assert masked.delta.tobytes() == open_.delta.tobytes()


def test_answers_too_exact_for_the_noise_are_refused_before_the_round():
    with pytest.raises(ConfigurationError, match=r"clip\.fraction_noise must be at least"):
        telling_round(AdaptiveClip())


def test_a_clip_that_stays_binds_as_ever():
    bound = bound_round(RunPlan(clip=Clip(2.0)))
    assert bound.clip == Clip(2.0)
    assert bound.kept.target.norm == bound.calibration.clip == 2.0
