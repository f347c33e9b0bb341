"""Tables against the exact distributions, and inversion at its edges."""

from bisect import bisect_right
from hashlib import sha256

import mpmath
import numpy as np
import pytest
from scipy import stats

from fedcore.errors import ConfigurationError
from fedcore.privacy.samplers import (
    _UNDECIDED,
    MAX_SIGMA,
    _guide,
    _invert,
    _Keystream,
    _lower_halves,
    discrete_gaussian_table,
    sample,
    skellam_table,
)

SEED = sha256(b"noise").digest()
TABLES = {
    "gaussian 0.5": lambda: discrete_gaussian_table(0.5),
    "gaussian 3.25": lambda: discrete_gaussian_table(3.25),
    "gaussian 40": lambda: discrete_gaussian_table(40.0),
    "skellam 0.3": lambda: skellam_table(0.3),
    "skellam 10.5": lambda: skellam_table(10.5),
    "skellam 1600": lambda: skellam_table(1600.0),
}
every_table = pytest.mark.parametrize("build", TABLES.values(), ids=TABLES.keys())


def cumulative(table):
    """Return C_0, C_1, ..., 2^128 as integers."""
    pairs = zip(table.high.tolist(), table.low.tolist(), strict=True)
    return [*((high << 64) | low for high, low in pairs), 1 << 128]


def probabilities(table):
    """Return {value: probability in units of 2^-128}."""
    values = range(table.lowest, table.highest + 1)
    return dict(zip(values, np.diff([0, *cumulative(table)]), strict=True))


def worst_error(table, exact):
    with mpmath.workprec(300):
        return max(abs(mpmath.mpf(p) / 2**128 - exact(x)) for x, p in probabilities(table).items())


@pytest.mark.parametrize("sigma", [0.5, 1.94, 3.25, 40.0, 300.0])
def test_cumulative_differences_are_the_discrete_gaussian_to_100_bits(sigma):
    with mpmath.workprec(300):
        variance = mpmath.mpf(sigma) ** 2
        # The Jacobi theta function is the normalisation, independently of the table.
        total = mpmath.jtheta(3, 0, mpmath.exp(-1 / (2 * variance)))
        table = discrete_gaussian_table(sigma)
        assert worst_error(table, lambda x: mpmath.exp(-(x**2) / (2 * variance)) / total) < 2**-100


@pytest.mark.parametrize("variance", [0.01, 0.3, 10.5, 1600.0])
def test_cumulative_differences_are_the_skellam_distribution_to_100_bits(variance):
    with mpmath.workprec(300):
        mu = mpmath.mpf(variance)
        table = skellam_table(variance)
        assert worst_error(table, lambda x: mpmath.exp(-mu) * mpmath.besseli(abs(x), mu)) < 2**-100


@every_table
def test_a_table_is_symmetric_to_its_last_bits(build):
    bounds = cumulative(build())[:-1]
    assert max(abs(a + b - 2**128) for a, b in zip(bounds, reversed(bounds), strict=True)) <= 1


@every_table
def test_the_stated_distance_covers_what_the_table_leaves_out(build):
    table = build()
    assert len(table.high) * 2.0**-128 < table.distance < 2.0**-100


@every_table
def test_samples_pass_a_chi_square_test_against_the_exact_probabilities(build):
    table, size = build(), 200_000
    expected = {x: float(p) * 2.0**-128 * size for x, p in probabilities(table).items()}
    common = [x for x, count in expected.items() if count >= 10]
    drawn = sample(table, SEED, size)
    observed = [np.count_nonzero(drawn == x) for x in common]
    rest = size - sum(expected[x] for x in common)
    statistic = stats.chisquare(
        [*observed, size - sum(observed)], [*(expected[x] for x in common), rest], sum_check=False
    )
    assert statistic.pvalue > 1e-3


@pytest.mark.parametrize("sigma", [1.0, 20.0, 1000.0, MAX_SIGMA])
def test_both_distributions_have_the_wanted_mean_and_variance(sigma):
    for table in (discrete_gaussian_table(sigma), skellam_table(sigma**2)):
        drawn = sample(table, SEED, 400_000)
        assert abs(drawn.mean()) < 4 * sigma / np.sqrt(drawn.size)
        assert drawn.var() == pytest.approx(sigma**2, rel=0.02)


def test_the_sum_of_shares_has_the_sum_of_the_variances():
    shares, sigma = 25, 7.0
    for table in (discrete_gaussian_table(sigma), skellam_table(sigma**2)):
        total = sum(sample(table, bytes([i]) * 32, 50_000) for i in range(shares))
        assert total.var() == pytest.approx(shares * sigma**2, rel=0.03)


@every_table
def test_inversion_is_right_next_to_every_boundary(build):
    table = build()
    bounds = cumulative(table)[:-1]
    edges = {0, 2**128 - 1, *(b + d for b in bounds for d in (-1, 0, 1))}
    edges |= {b ^ (1 << 64) for b in bounds}
    uniforms = sorted(u for u in edges if 0 <= u < 2**128)
    upper = np.array([u >> 64 for u in uniforms], dtype=np.uint64)
    lower = np.array([u & (2**64 - 1) for u in uniforms], dtype=np.uint64)
    expected = [table.lowest + bisect_right(bounds, u) for u in uniforms]
    assert _invert(table, upper, lambda: lower).tolist() == expected


@pytest.mark.parametrize(("boundary", "undecided"), [(2**52 - 1, 0), (2**52, 1), (2**53 - 1, 1)])
def test_a_bucket_is_undecided_when_a_boundary_is_its_first_or_last_word(boundary, undecided):
    guide, bits = _guide(np.array([boundary], dtype=np.uint64), lowest=7)
    assert bits == 12
    assert np.flatnonzero(guide == _UNDECIDED).tolist() == [undecided]
    assert set(guide[:undecided].tolist()) <= {7}
    assert set(guide[undecided + 1 :].tolist()) == {8}


def test_lower_halves_are_not_drawn_when_the_upper_halves_decide():
    table = discrete_gaussian_table(3.25)
    words = _Keystream(SEED, stream=0).words(10_000)
    assert _invert(table, words, lambda: pytest.fail("drawn")).shape == (10_000,)


def test_lower_halves_belong_to_positions_and_differ_from_upper_halves():
    upper, lower = (_Keystream(SEED, stream=stream).words(40_000) for stream in (0, 1))
    np.testing.assert_array_equal(_lower_halves(SEED, 32_768, 40_000), lower[32_768:])
    assert not np.intersect1d(upper, lower).size


def test_known_answer():
    drawn = sample(discrete_gaussian_table(10.0), bytes(range(32)), 100_000)
    assert drawn[:8].tolist() == [9, 0, 13, -7, 6, 3, -9, -4]
    assert sha256(drawn.astype("<i8").tobytes()).hexdigest() == (
        "edf07a03e8ad9c9c7431bad86d0a358054eff8e8996d3c364b6cdc082395c6e6"
    )


@pytest.mark.parametrize("size", [0, 1, 1000, 32_768, 32_769])
def test_a_shorter_draw_is_a_prefix_of_a_longer_one(size):
    table = discrete_gaussian_table(5.0)
    drawn = sample(table, SEED, size)
    assert drawn.dtype == np.int64
    np.testing.assert_array_equal(drawn, sample(table, SEED, 70_000)[:size])


def test_another_seed_gives_other_noise():
    table = skellam_table(100.0)
    assert (sample(table, SEED, 1000) != sample(table, bytes(32), 1000)).mean() > 0.9


def test_tables_cannot_be_written_to():
    table = discrete_gaussian_table(2.0)
    for array in (table.high, table.low, table.guide):
        assert not array.flags.writeable


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_seed_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match=f"seed must be 32 bytes, got {length}"):
        sample(discrete_gaussian_table(1.0), bytes(length), 1)


@pytest.mark.parametrize("sigma", [0.0, -1.0, 2 * MAX_SIGMA, float("inf"), float("nan")])
def test_a_spread_without_a_table_is_refused(sigma):
    with pytest.raises(ConfigurationError, match=r"sigma must be in \(0, 16384\]"):
        discrete_gaussian_table(sigma)
    with pytest.raises(ConfigurationError, match=r"sqrt\(variance\) must be in \(0, 16384\]"):
        skellam_table(sigma * abs(sigma))
