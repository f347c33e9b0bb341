"""Private means through the secure sum, beside the central Gaussian's."""

from math import sqrt

import numpy as np
import pytest
from scipy.stats import chi2

from experiments import bench_mean
from experiments.bench_mean import (
    CLIENTS,
    DELTA,
    DIM,
    NORM,
    Size,
    bound_round,
    central_errors,
    draw_means,
    expected_central_mse,
    measure_means,
    noise_for,
    secure_errors,
    vectors,
)
from fedcore.errors import ConfigurationError
from fedcore.privacy import epsilon

REPETITIONS = 12


@pytest.fixture(scope="module")
def at_ten_bits():
    return secure_errors("distributed_gaussian", 10, 2.0, REPETITIONS, seed=1)


@pytest.mark.parametrize("kind", bench_mean.MECHANISMS)
def test_sixteen_bits_cost_at_most_five_percent_over_the_central_gaussian(kind):
    # The expectation is computed, not measured: rounding adds to the noise of the sum.
    noise = noise_for(kind, 16, 2.0)
    calibration = bound_round(kind, 16, noise, 0).calibration
    assert calibration.minimum_survivors == calibration.clients == CLIENTS
    variance = CLIENTS * (calibration.sigma_local**2 + 1 / 4) / calibration.scale**2
    assert variance / CLIENTS**2 < 1.05 * expected_central_mse(2.0)
    # And the secure sum does what was computed: a sum of 3000 squared noises, over its
    # variance, is nearly chi squared. One run in 10^6 would fail, and this one is fixed.
    errors = secure_errors(kind, 16, 2.0, REPETITIONS, seed=1)
    degrees = REPETITIONS * DIM
    low, high = chi2.ppf([5e-7, 1 - 5e-7], degrees) / degrees
    assert low < errors.mean / expected_central_mse(2.0) < 1.05 * high


def test_ten_bits_cost_a_great_deal_more(at_ten_bits):
    degrees = REPETITIONS * DIM
    assert (
        at_ten_bits.mean > 1.2 * expected_central_mse(2.0) * chi2.ppf(1 - 5e-7, degrees) / degrees
    )


def test_the_noise_spends_the_epsilon_and_no_more():
    for kind in bench_mean.MECHANISMS:
        noise = noise_for(kind, 12, 0.75)
        curve = bound_round(kind, 12, noise, 0).release(CLIENTS).curve
        assert 0.7499 < epsilon(curve, DELTA) <= 0.75


def test_the_rival_adds_the_noise_of_the_same_epsilon():
    errors = central_errors(2.0, 40, seed=3)
    assert errors.mean == pytest.approx(expected_central_mse(2.0), rel=5 * sqrt(2 / 10_000))
    # Three standard errors and the interval of 95 % are nearly the same thing.
    assert errors.halfwidth == pytest.approx(
        2.02 * np.std(errors.values, ddof=1) / sqrt(40), rel=0.01
    )


def test_vectors_lie_on_the_sphere_and_are_new_in_every_repetition():
    first, second = vectors(0, seed=0), vectors(1, seed=0)
    assert np.linalg.norm(first, axis=1) == pytest.approx(NORM)
    assert np.abs(np.sum(first * second, axis=1)).max() < 0.5 * NORM**2
    assert np.array_equal(first, vectors(0, seed=0))


def test_rows_and_picture_show_every_point(monkeypatch):
    size = Size(epsilons=(1.0, 4.0), bits=(10, 16), repetitions=2)
    monkeypatch.setattr(bench_mean, "SIZES", {"quick": size})
    rows = measure_means("quick", seed=0)
    assert [(row["epsilon"], row["mechanism"], row["bits"]) for row in rows] == [
        (budget, kind, bits)
        for budget in (1.0, 4.0)
        for kind in bench_mean.MECHANISMS
        for bits in (10, 16)
    ]
    assert all(row["ratio"] == pytest.approx(row["mse"] / row["central_mse"], 1e-3) for row in rows)
    assert draw_means(rows).startswith(b"\x89PNG")


def test_a_size_that_does_not_exist_is_refused():
    with pytest.raises(ConfigurationError, match="size must be one of quick, full, got 'huge'"):
        measure_means("huge")
