"""Small layers travel whole, whatever sends the others; the sum decodes to the sum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import (
    Integers,
    PartlyDense,
    PublicTopK,
    RandomK,
    Reals,
    Sketch,
    Support,
    outside,
    small_layers,
)
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError

ENTROPY = ReplayedEntropy(b"partly dense")
KINDS = {
    "random_k": lambda rest: RandomK(0.3, 5),
    "unbiased": lambda rest: RandomK(0.3, 5, unbiased=True),
    "sketch": lambda rest: Sketch(0.4, 5),
    "public_top_k": lambda rest: Support(PublicTopK(0.3).choose(None, rest, 5)),
}
OF_EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def stage_of(kind, layers, below):
    """The stage for such layers, and how many coordinates are not sent whole."""
    whole = small_layers(layers, below)
    rest = sum(size for size in layers if size >= below)
    return PartlyDense(KINDS[kind](rest), whole), rest


@OF_EVERY_KIND
@given(layers=sizes, clients=st.integers(1, 4), data=st.data())
def test_the_sum_has_small_layers_whole_and_of_the_others_what_the_stage_inside_sends(
    kind, layers, clients, data
):
    layers, dim = [*layers, 13], sum(layers) + 13  # one that is never small
    below = data.draw(st.integers(0, 13))
    stage, rest = stage_of(kind, layers, below)
    codec, alone = stage.bind(Reals(dim, norm=2.0)), stage.rest.bind(Reals(rest))
    xs = data.draw(arrays(np.float64, (clients, dim), elements=st.floats(-1e3, 1e3)))
    total = sum(codec.encode(x, ENTROPY) for x in xs)
    decoded, others = codec.decode(total), outside(stage.whole, dim)

    assert codec.target == Reals(dim - rest + alone.target.dim, norm=2.0)
    assert total.shape == (codec.target.dim,)
    inside = np.setdiff1d(np.arange(dim), others)
    np.testing.assert_allclose(decoded[inside], xs.sum(axis=0)[inside], atol=1e-9)
    expected = alone.decode(sum(alone.encode(x[others], ENTROPY) for x in xs))
    np.testing.assert_allclose(decoded[others], expected, atol=1e-8)


@OF_EVERY_KIND
@given(layers=sizes, below=st.integers(0, 13), seed=st.integers(0, 99))
def test_it_never_lengthens_a_vector_so_the_clip_behind_it_bounds_what_is_sent(
    kind, layers, below, seed
):
    stage, _ = stage_of(kind, [*layers, 13], below)
    x = np.random.default_rng(seed).normal(size=sum(layers) + 13)
    sent = stage.bind(Reals(len(x))).encode(x, ENTROPY)
    assert np.linalg.norm(sent) <= np.linalg.norm(x) * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["random_k", "public_top_k"])
@given(layers=sizes, below=st.integers(0, 13))
def test_what_is_sent_of_a_layer_stays_together(kind, layers, below):
    layers, dim = [*layers, 13], sum(layers) + 13
    stage, _ = stage_of(kind, layers, below)
    x = np.arange(dim) + 1.0
    positions = stage.positions(dim)
    assert (np.diff(positions) > 0).all()
    np.testing.assert_array_equal(stage.bind(Reals(dim)).encode(x, ENTROPY), x[positions])


def test_layers_below_the_size_and_no_others_are_small():
    assert small_layers([6, 3, 5, 2], 5) == ((6, 9), (14, 16))
    assert small_layers([6, 3, 5, 2], 0) == ()
    assert small_layers(iter([6]), 7) == ((0, 6),)
    assert outside(((1, 3), (4, 5)), 6).tolist() == [0, 3, 5]


@pytest.mark.parametrize("whole", [((0, 20),), ((3, 21),), ((0, 10), (10, 20))])
def test_ranges_that_leave_nothing_or_do_not_fit_are_refused(whole):
    with pytest.raises(ConfigurationError, match="must leave some of 20 coordinates"):
        PartlyDense(RandomK(), whole).bind(Reals(20))


def test_only_real_vectors_can_be_sparsified():
    with pytest.raises(ConfigurationError, match="sparsify before quantising"):
        PartlyDense(RandomK(), ((0, 1),)).bind(Integers(3, 1))


def test_a_sketch_sends_no_single_coordinates():
    with pytest.raises(ConfigurationError, match="choose sparsify=random_k"):
        PartlyDense(Sketch(), ((0, 1),)).positions(9)


@pytest.mark.parametrize("kind", [RandomK, Sketch, PublicTopK])
@pytest.mark.parametrize("below", [-1, 1 << 48])
def test_a_size_that_no_layer_falls_below_is_refused(kind, below):
    with pytest.raises(ConfigurationError, match=r"sparsify\.dense_below must be in 0\.\.2\^48"):
        kind(dense_below=below)
