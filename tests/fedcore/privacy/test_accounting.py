"""Published figures, exact divergences of small cases, and limits."""

import subprocess
import sys
from functools import reduce
from itertools import pairwise
from math import exp, log, pi, sqrt

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import ConfigurationError
from fedcore.privacy import epsilon, noise_multiplier_for, sampling_delta, zcdp_epsilon
from fedcore.privacy.accounting import (
    ORDERS,
    discrete_gaussian,
    everything,
    fixed_size_gaussian,
    gaussian,
    nothing,
    poisson_amplified,
    poisson_gaussian,
    sample_amplified,
    skellam,
    tau,
)
from fedcore.privacy.samplers import discrete_gaussian_table, skellam_table

DELTA = 1e-5


def probabilities(table):
    """Return the probabilities of a table as floats, [values]."""
    upper = [0, *table.high.tolist(), 2**64]
    lower = [0, *table.low.tolist(), 0]
    bounds = [(h << 64) | low for h, low in zip(upper, lower, strict=True)]
    return np.array([float(b - a) for a, b in pairwise(bounds)]) * 2.0**-128


def divergence(pmf, shift, order):
    """Return the Rényi divergence between `pmf` and itself moved by `shift`."""
    p, q = pmf[shift:], pmf[:-shift]
    common = (p > 1e-30) & (q > 1e-30)
    return log(np.sum(p[common] ** order * q[common] ** (1 - order))) / (order - 1)


def test_dp_sgd_costs_what_abadi_et_al_2016_report():
    # Figure 2 and section 3: q=0.01, sigma=4, 10000 steps, delta=1e-5, by their conversion.
    curve = 10_000 * poisson_gaussian(4.0, sampling_rate=0.01)
    classic = min(c + log(1 / DELTA) / (a - 1) for c, a in zip(curve, ORDERS, strict=True))
    assert classic == pytest.approx(1.26, rel=0.005)
    assert epsilon(curve, DELTA) < classic


def test_a_hundred_gaussian_rounds_cost_what_the_zcdp_event_says():
    accountant = dp_accounting.rdp.RdpAccountant(ORDERS)
    accountant.compose(dp_accounting.ZCDpEvent(rho=0.5), 100)
    found = epsilon(100 * gaussian(1.0), DELTA)
    assert found == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-12)
    assert found == pytest.approx(96.1163, rel=1e-4)


@pytest.mark.parametrize("rho", [1e-3, 0.1, 0.5, 3.0])
def test_the_napkin_formula_bounds_the_curve_from_above(rho):
    assert epsilon(gaussian(sqrt(1 / (2 * rho))), DELTA) <= zcdp_epsilon(rho, DELTA)


def test_composition_adds_curves_whatever_the_order():
    curves = [gaussian(2.0), poisson_gaussian(1.0, 0.1), skellam(3.0, norm=50.0, dim=10)]
    forward, backward = sum(curves, start=nothing()), sum(reversed(curves), start=nothing())
    np.testing.assert_allclose(forward, backward, rtol=1e-14)
    assert epsilon(forward, DELTA) > max(epsilon(curve, DELTA) for curve in curves)


@pytest.mark.parametrize(
    ("dim", "sigma"), [(4096, 1.79), (2**20, 1.94), (16_000_000, 2.01)], ids=str
)
def test_two_integer_units_of_local_noise_make_the_sum_a_discrete_gaussian(dim, sigma):
    for shares in (2, 100, 10_000_000):
        assert tau(sigma, shares) * dim < 1e-9


@given(sigma=st.floats(0.5, 3.0), shares=st.integers(1, 1000))
def test_tau_is_the_published_sum(sigma, shares):
    terms = [np.exp(-2 * np.pi**2 * sigma**2 * j / (j + 1)) for j in range(1, shares)]
    assert tau(sigma, shares) == pytest.approx(10 * sum(terms), rel=1e-9)


def test_tau_grows_with_every_share_far_beyond_the_explicit_terms():
    values = [tau(0.5, shares) for shares in (1, 2, 99_999, 100_000, 100_001, 10**7)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[-1] == pytest.approx(10 * 1e7 * np.exp(-(np.pi**2) / 2), rel=0.01)


def test_the_discrete_gaussian_costs_what_the_gaussian_does_when_tau_vanishes():
    kwargs = {"norm": 100.0, "shares": 100, "dim": 2**20}
    wide = discrete_gaussian(2.0, sigma_local=20.0, **kwargs)
    np.testing.assert_allclose(wide, gaussian(2.0), rtol=1e-12)
    narrow = discrete_gaussian(2.0, sigma_local=0.6, **kwargs)
    assert (narrow > gaussian(2.0)).all()


def test_skellam_costs_what_the_gaussian_does_when_its_variance_is_large():
    wide = skellam(2.0, norm=1e6, dim=2**20)
    integers = [i for i, order in enumerate(ORDERS) if order.is_integer()]
    np.testing.assert_allclose(wide[integers], gaussian(2.0)[integers], rtol=1e-5)
    # Between integers a chord is a little above the curve.
    assert (wide >= gaussian(2.0)).all()
    np.testing.assert_allclose(wide[50:], gaussian(2.0)[50:], rtol=0.01)


@pytest.mark.parametrize(
    ("variance", "norm", "dim", "order", "expected"),
    [
        (4.0, 1.0, 1, 2.0, 2 / 8 + 9 / 64),  # the first term of the minimum
        (0.5, 1.0, 1, 2.0, 2 + 3),  # the second
        (9.0, 3.0, 4, 3.0, 27 / 18 + (5 * 9 + 6 * 6) / 324),  # l1 norm: sqrt(dim) * norm
        (9.0, 2.0, 100, 3.0, 12 / 18 + (5 * 4 + 6 * 4) / 324),  # l1 norm: norm^2
        (4.0, 1.0, 1, 1.5, 2 / 8 + 9 / 64),  # below 2: as at 2
        (4.0, 1.0, 1, 2.5, ((2 / 8 + 9 / 64) + 2 * (3 / 8 + 11 / 64)) / 2 / 1.5),
    ],
)
def test_the_skellam_curve_is_the_published_formula(variance, norm, dim, order, expected):
    found = skellam(sqrt(variance) / norm, norm=norm, dim=dim, orders=np.array([order]))
    assert found[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("sigma", "shares", "dim"), [(0.5, 50, 10**6), (0.6, 2, 100), (0.9, 9, 4)])
def test_the_discrete_gaussian_curve_is_the_least_of_the_three_published_terms(sigma, shares, dim):
    z, norm = 2.0, 7.0
    gap = 10 * sum(exp(-2 * (pi * sigma) ** 2 * j / (j + 1)) for j in range(1, shares))
    l1 = min(sqrt(dim), norm) / z
    found = discrete_gaussian(z, norm=norm, sigma_local=sigma, shares=shares, dim=dim)
    for order, allowed in zip(ORDERS, found, strict=True):
        additive = order / 2 / z**2 + gap * dim
        mixed = order / 2 * (1 / z**2 + 2 * l1 * gap + gap**2 * dim)
        widened = order / 2 * (1 / z + sqrt(dim) * gap) ** 2
        assert allowed == pytest.approx(min(additive, mixed, widened), rel=1e-9)


@pytest.mark.parametrize("variance", [4.0, 30.0, 400.0])
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_the_skellam_bound_holds_for_the_exact_divergence_in_one_dimension(variance, shift):
    pmf = probabilities(skellam_table(variance))
    bound = skellam(sqrt(variance) / shift, norm=float(shift), dim=1)
    for order, allowed in zip(ORDERS, bound, strict=True):
        if order <= 5:
            exact = divergence(pmf, shift, order)
            assert exact <= allowed * (1 + 1e-9)
            assert allowed < 3 * exact + 1e-3 or not order.is_integer()


@pytest.mark.parametrize(("sigma", "shares"), [(0.5, 3), (0.7, 8), (1.5, 5), (4.0, 4)])
@pytest.mark.parametrize("shift", [1, 3])
def test_the_discrete_gaussian_bound_holds_for_the_exact_sum_of_shares(sigma, shares, shift):
    share = probabilities(discrete_gaussian_table(sigma))
    pmf = reduce(np.convolve, [share] * shares)
    bound = discrete_gaussian(
        sigma * sqrt(shares) / shift,
        norm=float(shift),
        sigma_local=sigma,
        shares=shares,
        dim=1,
    )
    for order, allowed in zip(ORDERS, bound, strict=True):
        if order <= 5:
            assert divergence(pmf, shift, order) <= allowed * (1 + 1e-9)


def test_a_share_of_noise_too_small_for_the_theorem_is_refused():
    with pytest.raises(ConfigurationError, match=r"sigma >= 0.5 integer units, got 0.4"):
        discrete_gaussian(1.0, norm=10.0, sigma_local=0.4, shares=10, dim=10)


@given(z=st.floats(0.5, 20.0), norm=st.floats(1.0, 1e4), dim=st.integers(1, 10**7))
def test_no_integer_mechanism_is_cheaper_than_the_gaussian(z, norm, dim):
    integer = [order.is_integer() for order in ORDERS]
    plain = gaussian(z) * (1 - 1e-12)
    assert (skellam(z, norm=norm, dim=dim)[integer] >= plain[integer]).all()
    assert (discrete_gaussian(z, norm=norm, sigma_local=1.0, shares=50, dim=dim) >= plain).all()


@pytest.mark.parametrize(("budget", "overhead"), [(3.0, 1.14), (10.0, 1.06)])
def test_generic_amplification_costs_some_percent_over_the_gaussian_bound(budget, overhead):
    rate, rounds = 100 / 3400, 1500

    def generic(z):
        return poisson_amplified(lambda orders: gaussian(z, orders), rate)

    found = noise_multiplier_for(budget, 1 / 3400, rounds, curve=generic)
    special = noise_multiplier_for(
        budget, 1 / 3400, rounds, curve=lambda z: poisson_gaussian(z, rate)
    )
    assert found / special == pytest.approx(overhead, abs=0.02)


@pytest.mark.parametrize("rate", [1e-3, 0.03, 0.5])
def test_generic_amplification_lies_between_the_gaussian_bound_and_none(rate):
    generic = poisson_amplified(lambda orders: gaussian(1.0, orders), rate)
    integer = [order.is_integer() for order in ORDERS]
    assert (generic <= gaussian(1.0)).all()
    assert (generic[integer] >= poisson_gaussian(1.0, rate)[integer] * (1 - 1e-9)).all()


def test_sampling_everybody_amplifies_nothing():
    np.testing.assert_allclose(poisson_gaussian(2.0, 1.0), gaussian(2.0))
    # Replacing a unit moves the sum twice as far as removing it.
    np.testing.assert_allclose(fixed_size_gaussian(2.0, 50, 50), gaussian(1.0))


def test_a_small_sample_of_fixed_size_costs_less_than_everybody():
    assert (fixed_size_gaussian(4.0, 10, 1000)[10:60] < gaussian(2.0)[10:60]).all()


@given(budget=st.floats(0.1, 50.0), rounds=st.integers(1, 5000))
def test_the_noise_found_spends_the_budget_and_no_more(budget, rounds):
    z = noise_multiplier_for(budget, DELTA, rounds)
    assert epsilon(rounds * gaussian(z), DELTA) <= budget
    assert epsilon(rounds * gaussian(z * 0.999), DELTA) > budget


def test_a_budget_that_no_noise_keeps_is_refused():
    with pytest.raises(ConfigurationError, match="no noise keeps 3 releases"):
        noise_multiplier_for(1.0, DELTA, 3, curve=lambda _: everything())


def test_releasing_nothing_is_free_and_without_noise_infinitely_expensive():
    assert epsilon(nothing(), DELTA) == 0
    assert epsilon(everything(), DELTA) == epsilon(nothing() + everything(), DELTA) == np.inf


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_a_delta_that_is_no_probability_is_refused(delta):
    with pytest.raises(ConfigurationError, match=r"privacy.delta must be in \(0, 1\)"):
        epsilon(gaussian(1.0), delta)


def test_the_samplers_distance_disappears_beside_any_delta():
    table = discrete_gaussian_table(819.0)
    samples = 1500 * 100 * 2**20
    assert sampling_delta(10.0, distance=table.distance, samples=samples) < 1e-17


def test_importing_privacy_loads_no_heavy_library():
    heavy = ["torch", "opacus", "dp_accounting", "scipy", "mpmath", "flwr"]
    code = f"import sys, fedcore.privacy; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("sigma", "epochs", "published"), [(0.7, 45, 6.86), (1.1, 60, 2.91), (1.3, 15, 1.16)]
)
def test_dp_sgd_costs_what_the_mnist_example_of_opacus_reports(sigma, epochs, published):
    # https://github.com/pytorch/opacus/blob/main/examples/mnist_README.md: a sample rate of
    # 0.004, so 250 steps an epoch, delta 1e-5, by the conversion of [Mir17, Proposition 3].
    steps, rate = 250 * epochs, 0.004
    curve = steps * poisson_gaussian(sigma, rate)
    classic = min(c + log(1 / DELTA) / (a - 1) for c, a in zip(curve, ORDERS, strict=True))
    assert classic == pytest.approx(published, rel=0.005)
    # Ours is smaller by a better conversion, and still not below numerical composition.
    exact = dp_accounting.pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    exact.compose(step, steps)
    assert exact.get_epsilon(DELTA) <= epsilon(curve, DELTA) < classic


@pytest.mark.parametrize("sigma", [1.0, 3.0])
@pytest.mark.parametrize(("sample", "population"), [(1, 4), (2, 6), (2, 20)])
def test_a_known_sample_leaks_at_most_what_is_accounted(sigma, sample, population):
    # Everybody else holds -1; the one that is replaced held 1, or holds nothing.
    y = np.linspace(-25 * sigma - sample, 25 * sigma + sample, 40_001)

    def density(mean):
        return np.exp(-((y - mean) ** 2) / (2 * sigma**2)) / sqrt(2 * pi * sigma**2)

    rate = sample / population
    without = (1 - rate) * density(-sample)
    curve = sample_amplified(lambda orders: gaussian(sigma / 2, orders), rate)
    for value, other in ((1, -1), (1, 0), (-1, 1), (0, 1)):
        p = without + rate * density(value - (sample - 1))
        q = without + rate * density(other - (sample - 1))
        for order in (1.5, 2.0, 3.0, 8.0):
            # p (p / q)^(order - 1), without overflow.
            ratio = np.exp((order - 1) * (np.log(p) - np.log(q)))
            exact = log(np.sum(p * ratio) * (y[1] - y[0])) / (order - 1)
            assert exact <= curve[ORDERS.index(order)]


def test_a_sample_of_everybody_costs_what_replacing_costs():
    curve = sample_amplified(lambda orders: gaussian(3.0, orders), 1.0)
    assert curve.tolist() == gaussian(3.0).tolist()


def test_a_tiny_sample_costs_next_to_nothing_also_without_overflow():
    curve = sample_amplified(lambda orders: gaussian(0.05, orders), 1e-6)
    assert np.isfinite(curve).all()
    quiet = sample_amplified(lambda orders: gaussian(5.0, orders), 1e-4)
    assert quiet[ORDERS.index(2.0)] < 1e-8
