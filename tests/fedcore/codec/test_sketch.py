import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.codec import Integers, Reals, Sketch
from fedcore.codec.sketch import assignment
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError

ENTROPY = ReplayedEntropy(b"sketch")
shapes = {"dim": st.integers(1, 200), "fraction": st.floats(1e-3, 1), "seed": st.integers(0, 2**62)}


def project(codec, x):
    return codec.decode(codec.encode(x, ENTROPY))


@settings(deadline=None)
@given(**shapes)
def test_the_sum_of_sketches_decodes_to_the_sum_of_what_each_decodes_to(dim, fraction, seed):
    codec = Sketch(fraction, seed).bind(Reals(dim, norm=2.0))
    xs = np.random.default_rng(dim).normal(size=(3, dim))
    together = codec.decode(sum(codec.encode(x, ENTROPY) for x in xs))
    np.testing.assert_allclose(together, sum(project(codec, x) for x in xs), atol=1e-9)


@settings(deadline=None)
@given(**shapes)
def test_a_sketch_is_an_orthogonal_projection(dim, fraction, seed):
    codec = Sketch(fraction, seed).bind(Reals(dim, norm=2.0))
    x = np.random.default_rng(seed % 1000).normal(size=dim)
    assert codec.target == Reals(max(1, round(fraction * dim)), norm=2.0)
    assert codec.encode(x, ENTROPY).shape == (codec.target.dim,)
    assert np.linalg.norm(codec.encode(x, ENTROPY)) <= np.linalg.norm(x) * (1 + 1e-12)
    once = project(codec, x)
    np.testing.assert_allclose(project(codec, once), once, atol=1e-9)
    assert abs(once @ (x - once)) < 1e-9


def test_the_unbiased_decoding_has_the_vector_as_its_mean_over_seeds():
    x = np.random.default_rng(0).normal(size=40)
    codecs = (Sketch(0.2, seed, unbiased=True).bind(Reals(40)) for seed in range(4000))
    decoded = np.array([project(codec, x) for codec in codecs])
    error = decoded.mean(0) - x
    assert np.abs(error / (decoded.std(0) / np.sqrt(4000))).max() < 4.5


def test_one_bucket_holds_everything_and_its_unbiased_mean_is_exact():
    x = np.random.default_rng(0).normal(size=7)
    codecs = (Sketch(0.01, seed, unbiased=True).bind(Reals(7)) for seed in range(4000))
    decoded = np.array([project(codec, x) for codec in codecs])
    error = decoded.mean(0) - x
    assert np.abs(error / (decoded.std(0) / np.sqrt(4000) + 1e-12)).max() < 4.5


def test_error_feedback_over_a_sketch_sends_everything_in_the_end():
    x = np.random.default_rng(0).normal(size=100)
    sent, residual = np.zeros(100), np.zeros(100)
    for seed in range(400):
        codec = Sketch(0.1, seed).bind(Reals(100))
        compensated = residual + x
        part = project(codec, compensated)
        sent, residual = sent + part, compensated - part
    np.testing.assert_allclose(sent / 400, x, atol=0.2)


def test_buckets_are_even_and_signs_are_fair():
    buckets, weights = assignment(3, 100_000, 100)
    sizes = np.bincount(buckets, minlength=100)
    assert sizes.std() < 1.4 * np.sqrt(1000)
    np.testing.assert_allclose(np.abs(weights), 1 / np.sqrt(sizes[buckets]))
    assert abs((weights > 0).mean() - 0.5) < 0.01


def test_known_answer_on_every_platform():
    buckets, weights = assignment(1, 8, 3)
    assert buckets.tolist() == [1, 1, 2, 2, 2, 1, 2, 0]
    assert np.sign(weights).astype(int).tolist() == [-1, 1, -1, -1, -1, -1, 1, 1]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_outside_the_range_is_refused(fraction):
    with pytest.raises(ConfigurationError, match=r"sparsify\.fraction must be in"):
        Sketch(fraction)


def test_integers_are_not_sketched():
    with pytest.raises(ConfigurationError, match="sketch before quantising"):
        Sketch().bind(Integers(3, 1))
