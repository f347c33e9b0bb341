"""Which coordinates a round sends, where small layers are sent whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.codec import Clip, Dense, PartlyDense, PublicTopK, Quantize, RandomK, Sketch, Support
from fedcore.errors import ConfigurationError
from fedcore.pipeline import (
    Layer,
    Modular,
    NoSecAgg,
    PerLayerClip,
    RoundPlan,
    RunPlan,
    Uniform,
    bind_first,
    bind_round,
    decode_sum,
    layers_of,
    resolve,
    support_of,
)
from fedcore.pipeline.selection import selection_of
from fedcore.privacy import DistributedGaussian
from fedcore.vectors import Entry, Layout
from tests.fedcore.pipeline.rounds import entropy_of, local, round_plan, upload_all

LAYERS = (Layer("a.weight", 8), Layer("a.bias", 2), Layer("b.weight", 6), Layer("b.bias", 1))
DIM = 17
SMALL = [8, 9, 16]
SPARSE = [RandomK(0.3, dense_below=3), Sketch(0.3, dense_below=3), PublicTopK(0.3, dense_below=3)]


def plan_of(sparsify, last=None, **changes):
    run = RunPlan(sparsify=sparsify, secagg=NoSecAgg(), weighting=Uniform(), **changes)
    plan = round_plan(run, dim=DIM, layers=LAYERS if run.names_layers else ())
    return round_plan(run, dim=DIM, layers=plan.layers, support=support_of(plan, last))


@pytest.mark.parametrize("sparsify", SPARSE)
@given(seed=st.integers(0, 50))
def test_the_mean_has_small_layers_as_exactly_as_a_dense_round(sparsify, seed):
    deltas = np.random.default_rng(seed).normal(size=(5, DIM)).astype(np.float32)
    bound = bind_round(plan_of(sparsify, quantize=Quantize(24)))
    total, uploads = upload_all(bound, [local(delta) for delta in deltas])
    mean = decode_sum(bound, total, 5, [upload.metric_names for upload in uploads])
    np.testing.assert_allclose(mean.delta[SMALL], deltas.mean(axis=0)[SMALL], atol=1e-3)
    assert bound.update_dim == 3 + 4  # three tenths of the other fourteen
    assert RoundPlan.from_bytes(bound.plan.to_bytes()) == bound.plan


@pytest.mark.parametrize("kind", [RandomK, Sketch, PublicTopK])
def test_without_small_layers_nothing_changes(kind):
    found = selection_of(plan_of(kind(0.3, dense_below=1)))
    assert type(found) in {RandomK, Sketch, Support}
    without = bind_round(plan_of(kind(0.3))).select
    x, entropy = np.arange(DIM) + 1.0, entropy_of(0)
    np.testing.assert_array_equal(
        found.bind(without.source).encode(x, entropy), without.encode(x, entropy)
    )


@pytest.mark.parametrize("kind", [RandomK, Sketch, PublicTopK])
def test_with_small_layers_only_everything_is_sent(kind):
    plan = plan_of(kind(0.3, dense_below=9))
    assert selection_of(plan) == Dense()
    assert plan.support == ""
    assert bind_round(plan).update_dim == DIM


def test_a_support_follows_the_last_aggregate_outside_of_small_layers():
    last = np.zeros(DIM)
    last[[3, 8, 12]] = 5.0, 9.0, 4.0
    plan = plan_of(PublicTopK(0.15, 0.01, dense_below=3), last)
    assert isinstance(selection_of(plan), PartlyDense)
    sent = set(selection_of(plan).positions(DIM).tolist())
    assert sent > {3, *SMALL}
    assert len(sent) == 5


def test_a_plan_names_layers_only_where_they_are_treated_apart():
    layout = Layout((Entry("w", (2, 3), "float32"), Entry("b", (3,), "float32")))
    assert layers_of(RunPlan(sparsify=RandomK()), layout) == ()
    named = layers_of(RunPlan(sparsify=RandomK(dense_below=4)), layout)
    assert named == (Layer("w", 6), Layer("b", 3))
    with pytest.raises(ConfigurationError, match=r"add up to dim=17, got 0 layers"):
        round_plan(RunPlan(sparsify=RandomK(dense_below=3)), dim=DIM)


def test_a_bound_for_each_layer_finds_its_layers_among_what_is_sent():
    bound = bind_round(plan_of(RandomK(0.5, dense_below=3), clip=PerLayerClip(2.0)))
    positions = selection_of(bound.plan).positions(DIM)
    assert bound.clip.stops == tuple(int((positions < end).sum()) for end in (8, 10, 16, 17))
    assert bound.clip.stops[1] - bound.clip.stops[0] == 2


@pytest.mark.parametrize("clip", [Clip(1.0), PerLayerClip(1.0)])
def test_the_noise_is_found_for_all_that_is_sent(clip):
    run = RunPlan(
        sparsify=RandomK(0.3, dense_below=3), clip=clip, weighting=Uniform(),
        quantize=Modular(20), privacy=DistributedGaussian(epsilon=4.0, delta=1e-5),
    )  # fmt: skip
    sizes = {"clients": 20, "dim": DIM, "layers": LAYERS}
    found = resolve(run, rounds=5, **sizes)
    assert bind_first(found, **sizes).update_dim == 7
    with pytest.raises(ConfigurationError, match="got 0 layers"):
        bind_first(found, clients=20, dim=DIM)
