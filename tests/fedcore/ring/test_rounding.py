import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.ring import round_stochastically


@settings(deadline=None)
@given(
    x=arrays(np.float64, st.integers(0, 20), elements=st.floats(-(2.0**62), 2.0**62, width=64)),
    seed=st.integers(0, 2**32),
)
def test_an_entry_goes_to_one_of_its_two_neighbouring_integers(x, seed):
    rounded = round_stochastically(x, np.random.default_rng(seed))
    assert rounded.dtype == np.int64
    for value, result in zip(x.tolist(), rounded.tolist(), strict=True):
        assert result in (np.floor(value), np.ceil(value))


@pytest.mark.parametrize("magnitude", [0, 1, 2**20, 2**31, 2**40, 2**52 + 1, 2**61])
def test_a_whole_number_never_moves(magnitude):
    x = np.repeat([-float(magnitude), float(magnitude)], 50_000)
    np.testing.assert_array_equal(round_stochastically(x, np.random.default_rng(0)), x)


@pytest.mark.parametrize("value", [0.0, 1e-3, 0.25, -0.25, 0.5, -7.9, 12345.678])
def test_the_mean_is_the_value(value):
    count = 400_000
    rounded = round_stochastically(np.full(count, value), np.random.default_rng(1))
    fraction = value - np.floor(value)
    deviation = np.sqrt(fraction * (1 - fraction) / count)
    assert abs(rounded.mean() - value) <= 5 * deviation + 1e-12


def test_the_coins_of_a_long_vector_are_those_of_one_draw():
    x = np.random.default_rng(2).normal(0, 50, 70_001)
    coins = np.random.default_rng(3).random(len(x))
    expected = np.floor(x) + (x - np.floor(x) + coins >= 1)
    np.testing.assert_array_equal(round_stochastically(x, np.random.default_rng(3)), expected)


def test_float32_and_the_input_are_left_alone():
    x = np.linspace(-3, 3, 101, dtype=np.float32)
    before = x.copy()
    round_stochastically(x, np.random.default_rng(0))
    np.testing.assert_array_equal(x, before)
