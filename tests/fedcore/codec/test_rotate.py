import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.codec import Hadamard, Reals
from fedcore.codec.rotate import rotate, rotate_back, walsh_hadamard
from fedcore.crypto import ReplayedEntropy

ENTROPY = ReplayedEntropy(b"rotate")
laws = settings(deadline=None)


def butterflies(x):
    """Return the transform by its textbook recursion."""
    if len(x) == 1:
        return x
    a, b = butterflies(x[: len(x) // 2]), butterflies(x[len(x) // 2 :])
    return np.concatenate([a + b, a - b]) / np.sqrt(2)


@pytest.mark.parametrize("log_size", range(16))
def test_the_transform_is_the_textbook_one_and_its_own_inverse(log_size):
    x = np.random.default_rng(log_size).normal(size=1 << log_size)
    y = walsh_hadamard(x)
    np.testing.assert_allclose(y, butterflies(x), atol=1e-10)
    np.testing.assert_allclose(walsh_hadamard(y), x, atol=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 31, 64, 100, 129, 200])
def test_the_rotation_is_orthogonal(dim):
    matrix = np.stack([rotate(row, seed=7) for row in np.eye(dim)], axis=1)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-12)
    x = np.random.default_rng(0).normal(size=dim)
    np.testing.assert_allclose(rotate(x, seed=7), matrix @ x, atol=1e-12)


@laws
@given(dim=st.integers(1, 5000), seed=st.integers(-(2**126), 2**126), single=st.booleans())
def test_rotating_back_undoes_the_rotation_and_lengths_stay(dim, seed, single):
    x = np.random.default_rng(dim).normal(size=dim).astype(np.float32 if single else np.float64)
    x.setflags(write=False)
    y = rotate(x, seed)
    y.setflags(write=False)
    assert y.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-6)
    np.testing.assert_allclose(rotate_back(y, seed), x, atol=1e-9)


def test_rotations_of_different_seeds_differ():
    x = np.ones(100)
    assert not np.allclose(rotate(x, 1), rotate(x, 2))


@pytest.mark.parametrize("dim", [1, 2, 64, 1024])
def test_a_spike_is_spread_evenly_over_a_power_of_two(dim):
    codec = Hadamard(5).bind(Reals(dim, norm=3.0))
    spike = np.zeros(dim)
    spike[dim // 3] = -3.0
    np.testing.assert_allclose(np.abs(codec.encode(spike, ENTROPY)), 3.0 * codec.target.peak)


@pytest.mark.parametrize("dim", [48, 64, 100, 127])
@pytest.mark.parametrize("shape", ["spike", "two spikes", "constant", "ramp"])
def test_coordinates_are_sub_gaussian_with_the_promised_peak(dim, shape):
    x = {
        "spike": np.eye(dim)[dim - 1],
        "two spikes": np.eye(dim)[0] + np.eye(dim)[dim // 2],
        "constant": np.ones(dim),
        "ramp": np.arange(dim) - dim / 3,
    }[shape]
    x = x / np.linalg.norm(x)
    peak = Hadamard().bind(Reals(dim, norm=1.0)).target.peak
    assert peak == pytest.approx(2.0 ** -(int(np.log2(dim)) / 2))

    seeds = 3000
    scaled = np.stack([rotate(x, seed) for seed in range(seeds)]) / peak
    # Sub-Gaussian of scale 1: E exp(t y) <= exp(t^2 / 2), with five standard errors of room.
    for t in (-2.0, -1.0, 1.0, 2.0):
        moments = np.exp(t * scaled)
        room = 5 * moments.std(axis=0) / np.sqrt(seeds)
        assert (moments.mean(axis=0) <= np.exp(t * t / 2) + room).all()
    assert (np.abs(scaled) > 4.0).mean() < 2 * np.exp(-8)
