from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import Discretize, Quantize, Reals
from fedcore.codec.clip import clip_norm
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError

ENTROPY = ReplayedEntropy(b"quantize")
laws = settings(deadline=None)


@laws
@given(
    x=arrays(np.float64, st.integers(1, 20), elements=st.floats(-2, 2)),
    norm=st.floats(1e-3, 1e3),
    bits=st.integers(2, 32),
)
def test_no_entry_leaves_the_range_and_none_moves_a_whole_step(x, norm, bits):
    x = clip_norm(x * norm, norm)
    codec = Quantize(bits).bind(Reals(len(x), norm=norm))
    y = codec.encode(x, ENTROPY)
    assert np.abs(y).max() <= codec.target.magnitude == 2 ** (bits - 1) - 1
    assert codec.target.scale == pytest.approx(codec.target.magnitude / norm)
    np.testing.assert_allclose(codec.decode(y), x, rtol=0, atol=norm / codec.target.magnitude)


def test_an_entry_a_little_beyond_the_norm_stays_in_the_range():
    codec = Quantize(4).bind(Reals(1000, norm=1.0))
    x = np.repeat([-1.01, 1.01], 500)
    np.testing.assert_array_equal(codec.encode(x, ENTROPY), np.repeat([-7, 7], 500))


@pytest.mark.parametrize(
    "stage",
    [Quantize(4), Discretize(7.0, rounded_norm=2000.0, spread=1.0)],
    ids=["uniform", "norm"],
)
def test_rounding_is_unbiased(stage):
    dim = 100_000
    codec = stage.bind(Reals(dim, norm=1.0))
    for value in (0.0, 0.1, -0.123, 0.5, 1 / 7):
        mean = codec.decode(codec.encode(np.full(dim, value), ENTROPY)).mean()
        assert mean == pytest.approx(value, abs=5 * 0.5 / 7 / sqrt(dim))


@laws
@given(
    x=arrays(np.float64, st.integers(1, 60), elements=st.floats(-2, 2)),
    norm=st.floats(1e-2, 1e2),
    units=st.floats(0.5, 1e5),
    slack=st.floats(0, 1),
    seed=st.binary(max_size=4),
)
def test_a_discretised_vector_never_exceeds_its_rounded_norm(x, norm, units, slack, seed):
    scale = units / norm
    bound = scale * norm + slack * sqrt(len(x))
    x = clip_norm(x * norm, norm)
    codec = Discretize(scale, rounded_norm=bound, spread=1.0).bind(Reals(len(x), norm=norm))
    y = codec.encode(x, ReplayedEntropy(seed))
    assert codec.target.norm == bound
    assert sqrt(sum(entry**2 for entry in y.tolist())) <= bound * (1 + 1e-12)
    np.testing.assert_allclose(codec.decode(y), x, rtol=0, atol=1 / scale * (1 + 1e-9))


def test_a_bound_that_no_draw_meets_falls_back_to_rounding_towards_zero():
    # About 32 of 1000 entries round up to 1, a norm of 5.6: no draw of 64 will meet 1.
    x = np.full(1000, 1 / sqrt(1000))
    codec = Discretize(1.0, rounded_norm=1.0, spread=1.0).bind(Reals(1000, norm=1.0))
    np.testing.assert_array_equal(codec.encode(x, ENTROPY), np.zeros(1000, np.int64))


def test_a_rounded_norm_without_room_for_the_vector_is_refused():
    with pytest.raises(ConfigurationError, match=r"at least scale \* norm = 20, got 19\.5"):
        Discretize(10.0, rounded_norm=19.5, spread=1.0).bind(Reals(3, norm=2.0))


@pytest.mark.parametrize("bits", [1, 33])
def test_a_width_outside_the_range_is_refused(bits):
    with pytest.raises(ConfigurationError, match=rf"quantize\.bits must be in 2\.\.32, got {bits}"):
        Quantize(bits)
