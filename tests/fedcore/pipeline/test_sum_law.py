"""The law of the pipeline: the mean of what was trained, up to the documented loss."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import Clip, Dense, Hadamard, NoRotation, Quantize, RandomK
from fedcore.codec.sparsify import support
from fedcore.errors import RoundAbortedError
from fedcore.pipeline import (
    ByExamples,
    LocalUpdate,
    Modular,
    NoSecAgg,
    RunPlan,
    Uniform,
    decode_sum,
)
from fedcore.privacy import DistributedGaussian, DistributedSkellam
from fedcore.secagg.loopback import run_round
from tests.fedcore.pipeline.rounds import add, bound_round, local, private_plan, upload_all

norms = st.floats(1e-3, 1e3)
weightings = st.just(Uniform()) | st.builds(ByExamples, st.sampled_from([1, 100, 1024, 2**24 - 1]))
sparsifiers = st.just(Dense()) | st.builds(RandomK, st.floats(0.05, 1.0), unbiased=st.booleans())
coarse = st.builds(
    RunPlan,
    clip=st.builds(Clip, norms),
    sparsify=sparsifiers,
    rotate=st.sampled_from([NoRotation(), Hadamard()]),
    quantize=st.builds(Quantize, st.integers(2, 32)),
    weighting=weightings,
    secagg=st.just(NoSecAgg()),
)
fine = st.builds(
    RunPlan,
    clip=st.builds(Clip, norms),
    sparsify=sparsifiers,
    # Eight standard deviations: no example that a search can find wraps around.
    quantize=st.builds(Modular, st.integers(12, 32), st.just(8.0)),
    weighting=weightings,
    secagg=st.just(NoSecAgg()),
)
values = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, -1.0])
counts = st.integers(1, 2000)
measures = st.floats(-1e3, 1e3)


@settings(max_examples=150)
@given(run=coarse | fine, clients=st.integers(1, 6), dim=st.integers(1, 40), data=st.data())
def test_the_decoded_sum_is_the_weighted_mean_of_what_was_kept(run, clients, dim, data):
    bound = bound_round(run, clients=clients, dim=dim)
    deltas = data.draw(arrays(np.float32, (clients, dim), elements=values))
    examples = data.draw(st.lists(counts, min_size=clients, max_size=clients))
    losses = data.draw(st.lists(measures, min_size=clients, max_size=clients))
    updates = [
        local(delta, count, loss=loss, half=0.5)
        for delta, count, loss in zip(deltas, examples, losses, strict=True)
    ]
    total, uploads = upload_all(bound, updates)
    mean = decode_sum(bound, total, clients, [upload.metric_names for upload in uploads])

    most = run.weighting.max_examples if isinstance(run.weighting, ByExamples) else 1
    weights = np.minimum(examples, most)
    assert mean.weight == weights.sum()
    assert mean.survivors == clients
    # 2^-17 for each client's rounding, relative to a mean weight of at least one.
    assert mean.metrics["loss"] == pytest.approx(np.average(losses, weights=weights), abs=2**-16)
    assert mean.metrics["half"] == 0.5

    kept = [keep(bound, delta * (w / most)) for delta, w in zip(deltas, weights, strict=True)]
    expected = sum(kept) * (most / weights.sum())
    if isinstance(run.quantize, Quantize):
        step = run.clip.norm / (2 ** (run.quantize.bits - 1) - 1)
    else:
        step = 1 / bound.calibration.scale
    gain = dim / bound.update_dim if getattr(run.sparsify, "unbiased", False) else 1.0
    # Rounding moves a coordinate by less than a step a client; rotations keep the length.
    loss = gain * clients * step * bound.update_dim**0.5 * most / weights.sum()
    slack = 1e-6 * (np.abs(expected).max() + 1)
    assert np.linalg.norm(mean.delta - expected) <= loss * (1 + 1e-6) + slack


def keep(bound, x):
    """What is sent of a client's vector, in the place where it belongs."""
    run, dim = bound.plan.run, bound.plan.dim
    kept, gain = x.astype(np.float64), 1.0
    where = np.arange(dim)
    if isinstance(run.sparsify, RandomK):
        where = support(bound.plan.stage_seed("support"), dim, bound.update_dim)
        kept = kept[where]
        gain = dim / len(where) if run.sparsify.unbiased else 1.0
    length = np.linalg.norm(kept)
    if length > run.clip.norm:
        kept = kept * (run.clip.norm / length)
    full = np.zeros(dim)
    full[where] = kept * gain
    return full


def test_the_default_plan_loses_less_than_a_ten_thousandth():
    bound = bound_round(clients=10, dim=5000)
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(10, 5000)) * 0.1
    total, uploads = upload_all(bound, [local(delta, 700) for delta in deltas])
    mean = decode_sum(bound, total, 10, [upload.metric_names for upload in uploads])
    error = np.linalg.norm(mean.delta - deltas.mean(0)) / np.linalg.norm(deltas.mean(0))
    assert error < 1e-4


@pytest.mark.parametrize(
    "run",
    [
        RunPlan(),
        RunPlan(quantize=Quantize(6), rotate=NoRotation(), weighting=Uniform()),
        RunPlan(quantize=Modular(11), sparsify=RandomK(0.3), metric_slots=1),
        private_plan(quantize=Modular(18)),
    ],
)
def test_the_masked_sum_is_the_sum_bit_for_bit(run):
    bound = bound_round(run, clients=6, dim=50)
    rng = np.random.default_rng(1)
    updates = [local(rng.normal(size=50), 10 + index) for index in range(6)]
    total, uploads = upload_all(bound, updates)
    vectors = {client: upload.vector for client, upload in enumerate(uploads)}
    outcome = run_round(vectors, bound.secagg)
    assert outcome.total.dtype == total.dtype
    assert outcome.total.tobytes() == total.tobytes()


def test_a_survivor_less_leaves_the_mean_of_the_others_bit_for_bit():
    bound = bound_round(clients=10, dim=30)
    rng = np.random.default_rng(2)
    _, uploads = upload_all(bound, [local(rng.normal(size=30), index) for index in range(1, 11)])
    vectors = {client: upload.vector for client, upload in enumerate(uploads)}
    outcome = run_round(vectors, bound.secagg, {4: "upload"})
    rest = add([vector for client, vector in vectors.items() if client != 4], bound)
    assert outcome.survivors == frozenset(range(10)) - {4}
    assert outcome.total.tobytes() == rest.tobytes()


def test_clipped_updates_are_counted():
    run = RunPlan(clip=Clip(1.0), weighting=Uniform(), secagg=NoSecAgg())
    bound = bound_round(run, clients=4, dim=2)
    updates = [local(delta) for delta in ([3.0, 4.0], [0.6, 0.7], [0.0, 0.0], [0.0, -9.0])]
    total, uploads = upload_all(bound, updates)
    mean = decode_sum(bound, total, 4, [upload.metric_names for upload in uploads])
    assert mean.clipped == 2
    np.testing.assert_allclose(mean.delta, [(0.6 + 0.6) / 4, (0.8 + 0.7 - 1) / 4], atol=1e-6)


def test_a_client_without_examples_weighs_nothing_and_one_with_too_many_is_cut():
    run = RunPlan(weighting=ByExamples(10), secagg=NoSecAgg())
    bound = bound_round(run, clients=3, dim=2)
    updates = [
        local([9.0, 9.0], 0, a=7.0),
        local([1.0, 0.0], 10, a=1.0),
        local([0.0, 1.0], 99, a=3.0),
    ]
    total, uploads = upload_all(bound, updates)
    mean = decode_sum(bound, total, 3, [upload.metric_names for upload in uploads])
    assert mean.weight == 20
    assert mean.metrics == {"a": 2.0}
    np.testing.assert_allclose(mean.delta, [0.5, 0.5], atol=1e-5)


def test_a_diverged_client_counts_as_zero_and_its_metrics_too():
    run = RunPlan(weighting=Uniform(), secagg=NoSecAgg())
    bound = bound_round(run, clients=2, dim=3)
    updates = [
        local([np.nan, np.inf, 1.0], a=np.nan, b=np.inf),
        local([2.0, 2.0, 2.0], a=4.0, b=1.0),
    ]
    total, uploads = upload_all(bound, updates)
    mean = decode_sum(bound, total, 2, [upload.metric_names for upload in uploads])
    np.testing.assert_allclose(mean.delta, [1.0, 1.0, 1.0], atol=1e-5)
    assert mean.metrics == {"a": 2.0, "b": 0.5}


def test_clients_that_measure_different_things_have_no_mean():
    bound = bound_round(clients=2)
    total, _ = upload_all(bound, [local(np.zeros(12), 1, a=1.0), local(np.zeros(12), 1, b=1.0)])
    with pytest.raises(RoundAbortedError, match="different metrics") as caught:
        decode_sum(bound, total, 2, [("a",), ("b",)])
    assert caught.value.stage == "uploading"


def test_a_cohort_without_examples_has_no_mean():
    bound = bound_round(clients=2)
    total, _ = upload_all(bound, [local(np.zeros(12), 0), local(np.zeros(12), 0)])
    with pytest.raises(RoundAbortedError, match="no examples"):
        decode_sum(bound, total, 2, [(), ()])


@pytest.mark.parametrize("mechanism", [DistributedGaussian, DistributedSkellam])
def test_the_noise_in_the_mean_is_the_noise_in_the_ledger(mechanism):
    run = private_plan(
        clip=Clip(2.0),
        quantize=Modular(24),
        privacy=mechanism(noise_multiplier=0.8, delta=1e-5),
        dropout=0.0,
    )
    bound = bound_round(run, clients=4, dim=20_000)
    total, uploads = upload_all(bound, [local(np.zeros(20_000)) for _ in range(4)])
    mean = decode_sum(bound, total, 4, [upload.metric_names for upload in uploads])
    # z * clip in the sum of four; a sample of 20 000 gives the deviation within 3 %.
    assert mean.delta.std() * 4 == pytest.approx(0.8 * 2.0, rel=0.03)
    assert abs(mean.delta.mean()) < 4 * 0.4 / 20_000**0.5
    assert (mean.weight, mean.metrics, mean.clipped) == (4.0, {}, None)


def test_results_do_not_print_what_they_hold():
    bound = bound_round(clients=2)
    total, uploads = upload_all(bound, [local(np.full(12, 0.123456), 1)] * 2)
    mean = decode_sum(bound, total, 2, [(), ()])
    for value in (LocalUpdate(np.full(12, 0.123456), 1, {}), uploads[0], mean):
        assert "array" not in repr(value)
        assert "0.1234" not in repr(value)
