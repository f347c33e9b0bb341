"""The search for the least noise, on projections whose answer is known."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.privacy import least_noise
from fedcore.privacy.target import rounded_up


def between(lowest, highest, cost):
    """A mechanism that works from `lowest` to `highest` and costs `cost` / noise."""
    return lambda noise: cost / noise if lowest <= noise <= highest else None


noises = st.floats(0.01, 1000)


@given(lowest=st.floats(0.1, 1000), width=st.floats(1.5, 1e4), cost=noises, target=noises)
def test_the_least_noise_is_found_within_what_works(lowest, width, cost, target):
    highest = lowest * width
    found = least_noise(between(lowest, highest, cost), target)
    needed = max(lowest, cost / target)
    if needed <= highest * (1 - 1e-5):
        assert found.epsilon <= target
        assert found.noise_multiplier == pytest.approx(needed, rel=3e-6)
    elif needed > highest:
        assert found.epsilon > target
        assert found.noise_multiplier == pytest.approx(highest, rel=3e-6)


def test_a_generous_target_needs_next_to_no_noise():
    found = least_noise(lambda noise: 1 / noise, target=5000.0)
    assert found.noise_multiplier == pytest.approx(1 / 5000, rel=1e-5)


def test_nothing_is_found_where_nothing_works():
    assert least_noise(lambda _: None, target=1.0) is None


def test_noise_that_never_helps_is_told_apart_from_noise_that_does_not_work():
    assert least_noise(lambda _: inf, target=1.0).epsilon == inf


@given(st.floats(1e-6, 1e9))
def test_what_is_rounded_up_is_never_below(epsilon):
    assert epsilon <= rounded_up(epsilon) <= epsilon * 1.0011
