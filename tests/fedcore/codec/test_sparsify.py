import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcore.codec import RandomK, Reals
from fedcore.codec.public import public_words
from fedcore.codec.rotate import rotate
from fedcore.codec.sparsify import support
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError

FILE = Path(__file__).parents[2] / "vectors/public_v1.json"
VECTORS = json.loads(FILE.read_text())["vectors"]
ENTROPY = ReplayedEntropy(b"sparsify")


def independent_words(purpose, seed, count):
    framed = b"".join(
        len(part).to_bytes(8, "little") + part
        for part in (f"fedcore/v1/{purpose}".encode(), seed.to_bytes(16, "little", signed=True))
    )
    blocks = b"".join(i.to_bytes(16, "big") for i in range(-(-count // 2)))
    key = sha256(framed).digest()
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_known_answer_on_every_platform(vector):
    seed, dim, kept = vector["seed"], vector["dim"], vector["kept"]
    words = public_words("support", seed, 3).tolist()
    assert [f"{word:016x}" for word in words] == vector["words"]
    assert words == independent_words("support", seed, 3)
    assert support(seed, dim, kept).tolist() == vector["support"]
    order = np.argsort(np.array(independent_words("support", seed, dim), np.uint64))
    assert sorted(order[:kept].tolist()) == vector["support"]
    np.testing.assert_allclose(rotate(np.arange(1.0, 7.0), seed), vector["rotated"], rtol=1e-12)


@settings(deadline=None)
@given(seed=st.integers(-(2**126), 2**126), dim=st.integers(1, 200), fraction=st.floats(1e-3, 1))
def test_a_support_is_increasing_and_has_the_promised_size(seed, dim, fraction):
    codec = RandomK(fraction, seed).bind(Reals(dim, norm=2.0))
    kept = codec.target.dim
    assert kept == max(1, round(fraction * dim))
    assert codec.target.norm == 2.0
    positions = support(seed, dim, kept)
    assert len(positions) == kept
    assert (np.diff(positions) > 0).all()
    assert 0 <= positions[0] <= positions[-1] < dim
    x = np.arange(dim) + 1.0
    np.testing.assert_array_equal(codec.encode(x, ENTROPY), x[positions])


def test_supports_are_uniform_over_seeds():
    seeds, dim, kept = 3000, 20, 5
    chosen = np.zeros((seeds, dim))
    for seed in range(seeds):
        chosen[seed, support(seed, dim, kept)] = 1
    # Without replacement the counts are a little too regular for chi-square: correct for it.
    counts, expected = chosen.sum(0), seeds * kept / dim
    statistic = ((counts - expected) ** 2 / expected).sum() * (dim - 1) / (dim - kept)
    assert 1e-3 < stats.chi2.sf(statistic, dim - 1) < 1 - 1e-3
    together = (chosen.T @ chosen)[np.triu_indices(dim, 1)] / seeds
    share = kept * (kept - 1) / (dim * (dim - 1))
    assert np.abs(together - share).max() < 4.5 * np.sqrt(share / seeds)


def test_the_unbiased_decoding_has_the_vector_as_its_mean_over_seeds():
    x, seeds = np.linspace(-1, 1, 30), 4000
    total = np.zeros(30)
    for seed in range(seeds):
        codec = RandomK(0.2, seed, unbiased=True).bind(Reals(30))
        total += codec.decode(codec.encode(x, ENTROPY))
    deviation = np.abs(x) * np.sqrt(5 - 1) / np.sqrt(seeds)
    assert (np.abs(total / seeds - x) <= 4.5 * deviation + 1e-12).all()


def test_the_cached_support_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        support(0, 10, 3)[0] = 1


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_the_range_is_refused(fraction):
    with pytest.raises(ConfigurationError, match=r"sparsify\.fraction must be in \(0, 1\]"):
        RandomK(fraction)
