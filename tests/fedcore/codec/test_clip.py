import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import Clip, Reals
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError

ENTROPY = ReplayedEntropy(b"clip")
vectors = arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e6, 1e6))


def clip(x, norm):
    return Clip(norm).bind(Reals(len(x))).encode(x, ENTROPY)


@settings(deadline=None)
@given(x=vectors, norm=st.floats(1e-6, 1e6))
def test_a_clipped_vector_keeps_its_direction_and_never_exceeds_the_norm(x, norm):
    y = clip(x, norm)
    length = np.linalg.norm(x)
    assert np.linalg.norm(y) <= norm * (1 + 1e-12)
    if length <= norm:
        np.testing.assert_array_equal(y, x)
    else:
        np.testing.assert_allclose(y * length, x * norm, rtol=1e-9, atol=1e-300)


def test_the_bound_is_sharp():
    np.testing.assert_array_equal(clip(np.array([2 + 1e-9]), 2.0), [2.0])
    np.testing.assert_array_equal(clip(np.array([2 - 1e-9]), 2.0), [2 - 1e-9])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_vector_that_is_not_finite_becomes_zero(bad, dtype):
    np.testing.assert_array_equal(clip(np.array([1, bad, 2], dtype), 1.0), np.zeros(3))
    np.testing.assert_array_equal(clip(np.array([-bad, bad], dtype), 1.0), np.zeros(2))


def test_a_vector_whose_norm_overflows_becomes_zero():
    np.testing.assert_array_equal(clip(np.array([1e200, 1.0]), 1.0), np.zeros(2))


def test_the_largest_float32_values_are_clipped_in_double_precision():
    y = clip(np.array([3e38, -3e38], np.float32), 2.0)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, [np.sqrt(2), -np.sqrt(2)])


@pytest.mark.parametrize("norm", [0.0, -1.0, np.inf, np.nan])
def test_a_norm_that_bounds_nothing_is_refused(norm):
    with pytest.raises(ConfigurationError, match=r"clip\.norm must be positive and finite"):
        Clip(norm)
