"""The published operating points, and the demands that every calibration meets."""

import re
from math import exp, hypot, sqrt

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedcore.errors import ConfigurationError
from fedcore.privacy import calibrate
from fedcore.privacy.accounting import gaussian, noise_multiplier_for, poisson_amplified
from fedcore.privacy.samplers import MAX_SIGMA

EMNIST = {"clip": 0.03, "dim": 2**20, "peak": 2.0**-10, "clients": 100, "minimum_survivors": 100}
SMALL = {
    "clip": 1.0,
    "dim": 4096,
    "peak": 1 / 64,
    "clients": 20,
    "minimum_survivors": 16,
    "noise_multiplier": 1.0,
    "ring_bits": 16,
}


@pytest.fixture(scope="module")
def emnist_noise():
    """Return the noise for 1500 rounds of 100 out of 3400 clients, for two budgets."""

    def noise(budget):
        return noise_multiplier_for(
            budget,
            1 / 3400,
            1500,
            curve=lambda z: poisson_amplified(lambda orders: gaussian(z, orders), 100 / 3400),
        )

    return {budget: noise(budget) for budget in (3.0, 10.0)}


@pytest.mark.parametrize(
    ("budget", "tails", "bits", "published"),
    [
        (10.0, 4, 14, 1.026),
        (10.0, 4, 16, 1.0016),
        (10.0, 4, 18, 1.0001),
        (3.0, 4, 14, 1.128),
        (3.0, 4, 16, 1.007),
        (3.0, 4, 18, 1.0004),
        (10.0, 3, 12, 1.35),
        (10.0, 3, 14, 1.015),
        (10.0, 3, 16, 1.0009),
        (3.0, 3, 14, 1.066),
        (3.0, 3, 16, 1.004),
        (3.0, 3, 18, 1.0003),
    ],
)
def test_total_noise_over_central_noise_is_as_published_for_emnist(
    emnist_noise, budget, tails, bits, published
):
    z = emnist_noise[budget]
    found = calibrate(**EMNIST, noise_multiplier=z, ring_bits=bits, tails=tails)
    total = hypot(found.central_sigma(100), sqrt(100) / 2)  # the noise, and rounding
    overhead = total / (z * found.clip * found.scale)
    assert overhead - 1 == pytest.approx(published - 1, rel=0.05, abs=6e-4)


def test_the_rule_of_thumb_holds_where_inflation_is_small(emnist_noise):
    for z in emnist_noise.values():
        for bits in (15, 16, 17, 18):
            found = calibrate(**EMNIST, noise_multiplier=z, ring_bits=bits)
            assert found.inflation == pytest.approx(
                sqrt(1 + EMNIST["dim"] * 16 * z**2 / 4**bits), rel=0.01
            )


def test_fewer_coordinates_make_a_narrow_ring_sufficient(emnist_noise):
    published = {0.10: 1.049, 0.05: 1.027, 0.01: 1.010}
    for fraction, overhead in published.items():
        support = {**EMNIST, "dim": int(fraction * 2**20), "peak": (fraction * 2**20) ** -0.5}
        found = calibrate(**support, noise_multiplier=emnist_noise[10.0], ring_bits=12)
        total = hypot(found.central_sigma(100), sqrt(100) / 2)
        found_overhead = total / (found.noise_multiplier * found.clip * found.scale)
        assert found_overhead == pytest.approx(overhead, abs=0.008)


SETTINGS = st.fixed_dictionaries(
    {
        "clip": st.floats(1e-6, 1e6),
        "dim": st.integers(1, 10**8),
        "peak": st.floats(1e-4, 1.0),
        "clients": st.integers(2, 10_000),
        "noise_multiplier": st.floats(1e-3, 30.0),
        "ring_bits": st.integers(4, 40),
        "tails": st.floats(1.0, 8.0),
        "beta": st.floats(0.01, 0.99),
    }
)


def calibrated(data, settings):
    minimum = data.draw(st.integers(1, settings["clients"]))
    colluders = data.draw(st.integers(0, minimum - 1))
    try:
        return calibrate(**settings, minimum_survivors=minimum, colluders=colluders)
    except ConfigurationError:
        assume(False)


@given(data=st.data(), settings=SETTINGS)
def test_dropping_clients_never_lowers_the_noise_of_a_completed_round(data, settings):
    found = calibrated(data, settings)
    survivors = data.draw(st.integers(found.minimum_survivors, found.clients))
    assert found.noise_multiplier_at(survivors) >= settings["noise_multiplier"] * (1 - 1e-12)


@given(data=st.data(), settings=SETTINGS)
def test_signal_and_noise_fit_the_ring_and_the_sampler(data, settings):
    found = calibrated(data, settings)
    n, scaled_clip = found.clients, found.clip * found.scale
    spread = sqrt((settings["peak"] * scaled_clip * n) ** 2 + n / 4 + n * found.sigma_local**2)
    assert found.spread == pytest.approx(spread, rel=1e-9)
    assert 2 * settings["tails"] * found.spread <= 2 ** settings["ring_bits"] * (1 + 1e-9)
    assert found.sigma_local <= MAX_SIGMA * (1 + 1e-9)
    assert 1 < found.inflation <= 2


@given(data=st.data(), settings=SETTINGS)
def test_the_finest_scale_uses_up_the_ring_or_the_sampler(data, settings):
    found = calibrated(data, settings)
    used = 2 * settings["tails"] * found.spread / 2 ** settings["ring_bits"]
    assert max(used, found.sigma_local / MAX_SIGMA) == pytest.approx(1, rel=1e-6)


@given(u=st.floats(0.1, 100.0), dim=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_stochastic_rounding_keeps_to_the_bound_at_least_as_often_as_beta_says(u, dim, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(dim)
    x *= u / np.linalg.norm(x)
    bounds = (u + sqrt(dim), sqrt(u**2 + dim / 4 + u + sqrt(dim) / 2))  # for beta = exp(-1/2)
    norms = np.linalg.norm(np.floor(x + rng.random((200, dim))), axis=1)
    assert norms.max() <= bounds[0]
    assert (norms > min(bounds)).mean() < exp(-0.5)


def test_the_bound_on_the_rounded_norm_is_the_smaller_of_the_two():
    for dim in (1, 10, 10_000):
        found = calibrate(**{**SMALL, "dim": dim, "ring_bits": 24})
        u = found.clip * found.scale
        first, second = u + sqrt(dim), sqrt(u**2 + dim / 4 + u + sqrt(dim) / 2)
        assert found.rounded_norm == pytest.approx(min(first, second), rel=1e-12)


def test_a_ring_too_narrow_is_refused_with_the_smallest_that_would_do():
    with pytest.raises(ConfigurationError, match=r"raise quantize\.bits to") as refusal:
        calibrate(**{**SMALL, "ring_bits": 4})
    needed = int(re.search(r"needs at least (\d+) bits, got 4", str(refusal.value))[1])
    assert calibrate(**{**SMALL, "ring_bits": needed}).inflation <= 2
    with pytest.raises(ConfigurationError, match=f"at least {needed} bits, got {needed - 1}"):
        calibrate(**{**SMALL, "ring_bits": needed - 1})


def test_noise_too_wide_for_the_sampler_is_refused_for_every_ring():
    with pytest.raises(ConfigurationError, match="raise minimum_survivors"):
        calibrate(**{**SMALL, "noise_multiplier": 1e6, "ring_bits": 64})


def test_without_noise_the_ring_holds_the_signal_alone():
    found = calibrate(**{**SMALL, "noise_multiplier": 0.0})
    assert found.sigma_local == found.central_sigma(20) == found.noise_multiplier_at(20) == 0
    assert 8 * found.spread == pytest.approx(2**16)


def test_colluders_are_paid_for_by_the_others():
    honest = calibrate(**SMALL)
    wary = calibrate(**SMALL, colluders=4)
    assert wary.sigma_local / wary.rounded_norm == pytest.approx(
        honest.sigma_local / honest.rounded_norm * sqrt(16 / 12)
    )
    assert wary.noise_multiplier_at(16) == pytest.approx(1.0)


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.2, 0.3])
def test_covering_dropout_costs_the_root_of_what_may_be_missing(dropout):
    minimum = round(100 * (1 - dropout))
    found = calibrate(**{**SMALL, "clients": 100, "minimum_survivors": minimum, "ring_bits": 24})
    assert found.noise_multiplier_at(100) == pytest.approx(1 / sqrt(1 - dropout))


@pytest.mark.parametrize(
    "change",
    [
        {"clip": 0.0},
        {"clip": float("inf")},
        {"dim": 0},
        {"peak": 0.0},
        {"peak": 1.5},
        {"minimum_survivors": 0},
        {"minimum_survivors": 21},
        {"colluders": 16},
        {"colluders": -1},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"ring_bits": 0},
        {"ring_bits": 65},
        {"tails": 0.0},
        {"beta": 0.0},
        {"beta": 1.0},
        {"max_inflation": 1.0},
    ],
)
def test_an_argument_out_of_range_is_refused_by_name(change):
    (name,) = change
    with pytest.raises(ConfigurationError, match=name.replace("_", "[_.]")):
        calibrate(**{**SMALL, **change})
