"""The matrix mechanism: its noise, its sensitivity, and what a run of it costs."""

from itertools import combinations
from math import ceil, log2, sqrt

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from fedcore.errors import BudgetExhaustedError, ConfigurationError
from fedcore.privacy import CorrelatedNoise, MatrixGaussian, PrivacyLedger, Release
from fedcore.privacy.matrix import (
    prefix_errors,
    released_spread,
    row_seed,
    sensitivity,
    spent_participations,
    square_root_coefficients,
    stream_name,
)
from fedcore.privacy.samplers import standard_normals

SEED = bytes(range(32))
bands = st.integers(1, 12)


def dense(coefficients, rounds):
    """C as a matrix."""
    column = np.zeros(max(rounds, len(coefficients)))
    column[: len(coefficients)] = coefficients
    return toeplitz(column[:rounds], np.zeros(rounds))


def mechanism(**changes):
    values = {"noise_multiplier": 1.3, "delta": 1e-5, "bands": 4, "min_separation": 5}
    return MatrixGaussian(**({**values, "participations": 3} | changes))


def release_of(round_number, stream="a", **changes):
    values = {
        "round_number": round_number,
        "unit": "device",
        "mechanism": "matrix_gaussian",
        "noise_multiplier": 1.3,
        "sigma_local": 1.3,
        "participations": 3,
        "separation": 5,
        "stream": stream,
    }
    return Release(**(values | changes))


@given(rounds=st.integers(1, 40))
def test_the_coefficients_are_the_square_root_of_prefix_sums(rounds):
    root = dense(square_root_coefficients(rounds), rounds)
    np.testing.assert_allclose(root @ root, np.tril(np.ones((rounds, rounds))), atol=1e-12)


@given(bands=bands, rounds=st.integers(1, 40), dim=st.integers(1, 5))
def test_the_recurrence_solves_the_dense_system(bands, rounds, dim):
    noise = CorrelatedNoise(SEED, bands=bands, dim=dim)
    rows = np.array([noise.next() for _ in range(rounds)])
    z = np.array([standard_normals(row_seed(SEED, t), dim) for t in range(1, rounds + 1)])
    matrix = dense(square_root_coefficients(bands), rounds)
    np.testing.assert_allclose(rows, np.linalg.solve(matrix, z), atol=1e-10)


@given(bands=bands, before=st.integers(0, 20))
def test_a_restart_continues_with_the_same_noise(bands, before):
    whole = CorrelatedNoise(SEED, bands=bands, dim=3)
    rows = [whole.next() for _ in range(before + 5)]
    again = CorrelatedNoise(SEED, bands=bands, dim=3)
    again.skip_to(before)
    assert again.rows == before
    np.testing.assert_array_equal([again.next() for _ in range(5)], rows[before:])


def test_a_returned_row_is_the_callers_own():
    noise, other = (CorrelatedNoise(SEED, bands=3, dim=4) for _ in range(2))
    row = noise.next()
    row[:] = 1e9
    other.next()
    np.testing.assert_array_equal(noise.next(), other.next())


def test_another_seed_or_row_gives_unrelated_noise():
    assert row_seed(SEED, 1) != row_seed(SEED, 2) != row_seed(bytes(32), 2)
    assert stream_name(SEED) != stream_name(bytes(32))
    assert SEED.hex() not in stream_name(SEED)


@given(
    bands=st.integers(1, 4), more=st.integers(0, 2), rounds=st.integers(1, 11),
    participations=st.integers(1, 4), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_no_pattern_of_participations_moves_the_encoded_stream_further(
    bands, more, rounds, participations, seed
):
    coefficients = square_root_coefficients(bands)
    matrix = dense(coefficients, rounds)
    bound = sensitivity(coefficients, participations)
    rng = np.random.default_rng(seed)
    most = 0.0
    for count in range(1, participations + 1):
        for pattern in combinations(range(rounds), count):
            if np.any(np.diff(pattern) < bands + more):
                continue
            # Vectors of any direction, aligned ones included.
            for x in (np.ones((count, 1)), _unit(rng.normal(size=(count, 3)))):
                moved = np.linalg.norm(matrix[:, pattern] @ x)
                assert moved <= bound * (1 + 1e-12)
                most = max(most, moved)
    # The bound is reached as soon as there is room for whole columns.
    if rounds >= (participations - 1) * (bands + more) + bands:
        assert most == pytest.approx(bound)


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_closer_participations_would_move_it_further():
    coefficients = square_root_coefficients(4)
    overlapping = np.linalg.norm(dense(coefficients, 12)[:, [0, 3]].sum(axis=1))
    assert overlapping > sensitivity(coefficients, 2) * 1.05


def test_what_is_released_has_the_stated_deviation():
    for count in (1, 2, 3):
        noise = CorrelatedNoise(SEED, bands=6, dim=20_000)
        noise.skip_to(60)
        total = sum(noise.next() for _ in range(count))
        assert total.std() == pytest.approx(released_spread(6, count), rel=0.02)


@given(bands=bands, rounds=st.integers(1, 30))
def test_the_error_of_a_prefix_is_the_norm_of_its_row(bands, rounds):
    coefficients = square_root_coefficients(bands)
    factor = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(dense(coefficients, rounds))
    expected = np.linalg.norm(factor, axis=1)
    np.testing.assert_allclose(prefix_errors(coefficients, rounds), expected, rtol=1e-9)


def tree_error(rounds):
    """Largest error of binary-tree aggregation: nodes in a prefix, levels above a leaf."""
    nodes = max(round_number.bit_count() for round_number in range(1, rounds + 1))
    return sqrt(nodes) * sqrt(ceil(log2(rounds)) + 1)


@pytest.mark.parametrize("rounds", [64, 128, 256, 512, 1024, 2000])
def test_at_equal_privacy_the_square_root_beats_the_tree_and_the_tree_independent_noise(rounds):
    """One participation a device: all errors are relative to the same sensitivity."""
    root = square_root_coefficients(rounds)
    banded = square_root_coefficients(rounds // 4)
    error_of_root = prefix_errors(root, rounds).max() * np.linalg.norm(root)
    error_of_band = prefix_errors(banded, rounds).max() * np.linalg.norm(banded)
    assert error_of_root < error_of_band < tree_error(rounds) < sqrt(rounds)
    # Within the best possible by a constant: 1 + ln(n) / pi [FHU23, theorem 1].
    assert error_of_root < 1 + np.log(rounds) / np.pi + 0.1


def test_over_many_participations_bands_beat_independent_noise_too():
    banded, independent = square_root_coefficients(64), square_root_coefficients(1)
    of_band, of_none = (
        prefix_errors(column, 1024).max() * sensitivity(column, 16)
        for column in (banded, independent)
    )
    assert of_band < of_none / 5
    # Without a limit on participations every round is paid for: sqrt(1024 / 16) more.
    assert of_none == pytest.approx(sqrt(1024) * sqrt(16))


def test_a_whole_run_costs_what_one_gaussian_mechanism_costs():
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(1.3))
    ledger = PrivacyLedger(delta=1e-5)
    for round_number in range(1, 31):
        ledger = ledger.record(release_of(round_number))
    assert ledger.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    projected = PrivacyLedger(delta=1e-5).projected_epsilon(release_of(1), 30)
    assert ledger.epsilon == pytest.approx(projected, rel=1e-12)


def test_a_prefix_costs_the_participations_that_fit_into_it():
    ledger, spent = PrivacyLedger(delta=1e-5), []
    for round_number in range(1, 17):
        ledger = ledger.record(release_of(round_number))
        spent.append(ledger.epsilon)
    assert spent == sorted(spent)
    assert len(set(spent)) == 3
    changes = [t + 1 for t in range(1, 16) if spent[t] > spent[t - 1]]
    assert changes == [6, 11]
    # One of three participations: a Gaussian of sqrt(3) times the multiplier.
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(1.3 * sqrt(3)))
    assert spent[0] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)


def test_rounds_that_published_nothing_do_not_make_later_ones_cheaper():
    every, some = PrivacyLedger(delta=1e-5), PrivacyLedger(delta=1e-5)
    for round_number in range(1, 12):
        every = every.record(release_of(round_number))
    for round_number in (1, 11):
        some = some.record(release_of(round_number))
    assert some.epsilon == every.epsilon


def test_other_noise_and_other_mechanisms_are_paid_for_apart():
    one = PrivacyLedger(delta=1e-5).record(release_of(20))
    two = one.record(release_of(20, stream="b"))
    both = PrivacyLedger(delta=1e-5, releases=two.releases)
    assert one.epsilon < two.epsilon == pytest.approx(both.epsilon)
    alone = Release(round_number=1, unit="device", mechanism="gaussian", noise_multiplier=1.3)
    assert one.record(alone).epsilon == pytest.approx(two.epsilon)
    assert PrivacyLedger.from_json(two.to_json()) == two


def test_the_budget_ends_a_stream_where_the_next_participation_begins():
    budget = PrivacyLedger(delta=1e-5).record(release_of(10)).epsilon * 1.001
    ledger = PrivacyLedger(delta=1e-5, epsilon_budget=budget)
    for round_number in range(1, 11):
        ledger = ledger.record(release_of(round_number))
    with pytest.raises(BudgetExhaustedError, match="round 11 would raise epsilon"):
        ledger.record(release_of(11))


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 20))
def test_participations_that_fit_are_those_of_the_densest_pattern(rounds, separation, most):
    densest = len(range(1, rounds + 1, separation))
    spent = spent_participations(rounds, separation=separation, participations=most)
    assert spent == min(most, densest)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"delta": 1.0}, "delta"),
        ({"epsilon_budget": 0.0}, "epsilon_budget"),
        ({"bands": 0}, "bands"),
        ({"bands": 6}, "min_separation"),
        ({"participations": 0}, "participations"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change, field):
    with pytest.raises(ConfigurationError, match=rf"privacy\.{field} must be"):
        mechanism(**change)


def test_amplification_is_never_claimed_for_correlated_noise():
    with pytest.raises(ConfigurationError, match="must not be claimed for correlated noise"):
        release_of(1, sampling="poisson", sampling_rate=0.1, amplification_claimed=True)


def test_a_stream_does_not_claim_more_noise_than_it_adds():
    with pytest.raises(ConfigurationError, match="is claimed"):
        release_of(1, sigma_local=1.2)
