"""Devices ask often while something happens, seldom when nothing does, and never in step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.edge.pace import SHARE, SPREAD, Pace, Patience
from fedcore.errors import ConfigurationError

chances = st.floats(0, 1, exclude_max=True)


@given(st.floats(0, 1e6), chances)
def test_a_pause_stays_within_its_bounds_and_the_spread(quiet, chance):
    pause = Pace(0.1, 3.0).pause(quiet, chance)
    assert 0.1 * (1 - SPREAD) <= pause <= 3.0 * (1 + SPREAD)


@given(st.floats(1, 1e6), chances)
def test_no_message_waits_longer_than_its_share_of_the_silence(quiet, chance):
    assert Pace(0.01, 3600).pause(quiet, chance) <= SHARE * quiet * (1 + SPREAD) + 1e-9


def test_an_idle_hour_costs_few_questions_more_than_an_idle_minute():
    def questions(seconds):
        pace, quiet, asked = Pace(0.1, 3600.0), 0.0, 0
        while quiet < seconds:
            quiet, asked = quiet + pace.pause(quiet, 0.5), asked + 1
        return asked

    assert questions(3600) < questions(60) + 50


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (1.0, 3601.0), (float("nan"), 1.0)])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(ConfigurationError, match="must ask every"):
        Pace(*bounds)


@given(st.integers(1, 1000), chances)
def test_patience_grows_to_its_bound_and_no_further(failures, chance):
    wait = Patience(1.0, 15.0).wait(failures, chance)
    assert min(2.0 ** (failures - 1), 15.0) * (1 - SPREAD) <= wait <= 15.0 * (1 + SPREAD)
