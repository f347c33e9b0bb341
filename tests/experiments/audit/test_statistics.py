"""The audit's figures, against other ways to compute them."""

from math import exp, inf

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from experiments.audit.gaussians import Normal, epsilon_between, estimate
from experiments.audit.one_run import bound_from_scores, lower_bound, p_value

DELTA = 1e-3
SPREADS = st.floats(0.5, 2.0)


@pytest.mark.parametrize("noise", [0.2, 0.7, 1.0, 5.0, 30.0])
def test_two_gaussians_of_one_spread_are_the_gaussian_mechanism(noise):
    expected = dp_accounting.get_epsilon_gaussian(noise, DELTA)
    found = epsilon_between(Normal(0, 1), Normal(1 / noise, 1), DELTA)
    assert found == pytest.approx(expected, abs=1e-6)


@given(shift=st.floats(-4, 4), p=SPREADS, q=SPREADS)
def test_epsilon_is_where_the_integral_over_the_likelihood_ratio_is_delta(shift, p, q):
    first, second = Normal(shift, p), Normal(0, q)
    found = epsilon_between(first, second, DELTA)
    x = np.linspace(-25, 25, 100_001)
    logs = [norm.logpdf(x, normal.mean, normal.std) for normal in (first, second)]
    deltas = [
        float(np.maximum(0, np.exp(a) - np.exp(found + b)).sum() * (x[1] - x[0]))
        for a, b in (logs, logs[::-1])
    ]
    assert max(deltas) <= DELTA * 1.01
    assert found == 0 or max(deltas) >= DELTA * 0.99


@given(shift=st.floats(-4, 4), p=SPREADS, q=SPREADS, scale=st.floats(1e-3, 1e3))
def test_epsilon_depends_neither_on_order_nor_on_units(shift, p, q, scale):
    plain = epsilon_between(Normal(shift, p), Normal(0, q), DELTA)
    swapped = epsilon_between(Normal(0, q), Normal(shift, p), DELTA)
    scaled = epsilon_between(
        Normal(scale * (shift + 1), scale * p), Normal(scale, scale * q), DELTA
    )
    assert plain == pytest.approx(swapped, rel=1e-6, abs=1e-6)
    assert plain == pytest.approx(scaled, rel=1e-6, abs=1e-6)


def test_statistics_without_any_spread_are_told_apart_with_certainty():
    assert epsilon_between(Normal(0, 1), Normal(1, 0), DELTA) == inf
    assert epsilon_between(Normal(1, 0), Normal(1, 0), DELTA) == 0


def test_the_estimate_finds_the_epsilon_of_its_samples():
    seen = np.random.default_rng(0).normal(2, 1, 4000)
    found = estimate(seen, Normal(0, 1), DELTA, seed=0)
    true = epsilon_between(Normal(0, 1), Normal(2, 1), DELTA)
    assert found.shift.low < true < found.shift.high
    assert found.fit.low < true < found.fit.high
    assert found.shift.epsilon == pytest.approx(true, rel=0.05)


def test_the_interval_is_wider_with_fewer_canaries():
    seen = np.random.default_rng(0).normal(2, 1, 1000)
    many, few = (estimate(seen[:n], Normal(0, 1), DELTA, seed=0).shift for n in (1000, 20))
    assert few.high - few.low > 3 * (many.high - many.low)


def test_without_delta_the_bound_is_that_of_a_binomial_test():
    found = lower_bound(80, 50, 45, delta=0.0, allowed=0.05)
    right = exp(found) / (1 + exp(found))
    assert binom.sf(44, 50, right) == pytest.approx(0.05, rel=1e-6)


@given(correct=st.integers(0, 60), epsilon=st.floats(0, 5), delta=st.floats(0, 0.1))
def test_a_larger_delta_or_epsilon_refutes_less(correct, epsilon, delta):
    found = p_value(100, 60, correct, epsilon, delta)
    assert p_value(100, 60, correct, epsilon, 0.0) <= found
    assert found <= p_value(100, 60, correct, epsilon + 1, delta) + 1e-12


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.5])
def test_randomized_response_is_rarely_proved_to_leak_more_than_it_does(epsilon):
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(100):
        coins = rng.random(60) < 0.5
        truthful = rng.random(60) < exp(epsilon) / (1 + exp(epsilon))
        answers = np.where(truthful, coins, ~coins)
        scores = answers + 0.01 * rng.random(60)
        wrong += bound_from_scores(scores, coins, 0.0).epsilon > epsilon + 1e-9
    assert wrong <= 0.05 * 100 + 3 * (100 * 0.05 * 0.95) ** 0.5


def test_scores_that_tell_all_prove_as_much_as_the_number_of_units_allows():
    coins = np.random.default_rng(2).random(400) < 0.5
    small, large = (bound_from_scores(coins[:n] + 0.0, coins[:n], 1e-5) for n in (50, 400))
    assert small.epsilon == small.ceiling
    assert large.epsilon == large.ceiling > small.epsilon + 1.5


def test_scores_that_tell_nothing_prove_nothing():
    rng = np.random.default_rng(3)
    assert bound_from_scores(rng.random(200), rng.random(200) < 0.5, 1e-5).epsilon == 0
