"""Updates compressed one by one: what survives, what it costs, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import Qsgd, SparseTernary, TopK
from fedcore.codec.compressors import read, write
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError, PeerProtocolError

ENTROPY = ReplayedEntropy(b"compress")
ROUNDED = [Qsgd(4, 16), Qsgd(1, 0), Qsgd(100, 7)]
COMPRESSORS = [TopK(0.1, 8), TopK(1.0, 16), SparseTernary(0.1), *ROUNDED]
updates = arrays(np.float32, st.integers(1, 80), elements=st.floats(-10, 10, width=32))
each = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


def roundtrip(compressor, x, entropy=ENTROPY):
    return compressor.decompress(compressor.compress(x, entropy), len(x))


@each
@settings(deadline=None, max_examples=50)
@given(x=updates)
def test_nothing_grows_beyond_what_it_was(compressor, x):
    y = roundtrip(compressor, x)
    assert y.shape == x.shape
    assert y.dtype == np.float32
    assert (np.sign(y) * np.sign(x) >= 0).all()
    if isinstance(compressor, (TopK, SparseTernary)):
        assert np.abs(y).max() <= np.abs(x).max() * 1.001


@settings(deadline=None, max_examples=50)
@given(x=updates)
def test_top_k_keeps_the_largest_entries_to_within_half_a_step(x):
    y = roundtrip(TopK(0.25, 8), x)
    kept = max(1, round(0.25 * len(x)))
    step = np.abs(x).max() / 127
    assert np.count_nonzero(y) <= kept
    order = np.sort(np.abs(x))[::-1]
    certain = np.abs(x) > (order[kept] if kept < len(x) else -1)
    np.testing.assert_allclose(y[certain], x[certain], atol=step * 0.501 + 1e-30)


def test_sparse_ternary_sends_the_mean_magnitude_of_what_it_keeps():
    x = np.array([5.0, -3.0, 0.1, 0.2, -0.3, 0.0, 0.1, 0.0, 0.2, 0.1], np.float32)
    np.testing.assert_array_equal(roundtrip(SparseTernary(0.2), x), [4, -4] + [0] * 8)


@pytest.mark.parametrize("compressor", ROUNDED, ids=repr)
def test_qsgd_is_unbiased_and_its_variance_is_bounded(compressor):
    x = np.random.default_rng(0).normal(size=50).astype(np.float32)
    runs = np.array(
        [roundtrip(compressor, x, ENTROPY.child(str(i))) for i in range(3000)], np.float64
    )
    deviation = runs.std(0) / np.sqrt(3000) + 1e-6
    assert np.abs((runs.mean(0) - x) / deviation).max() < 4.5
    size = compressor.bucket or 50
    # [AGLTV17, lemma 3.1]: at most min(n/s^2, sqrt(n)/s) times the bucket's norm squared
    worst = min(size / compressor.levels**2, np.sqrt(size) / compressor.levels)
    assert ((runs - x) ** 2).sum(1).mean() <= worst * (x**2).sum() * 1.02


@each
def test_an_update_of_zeros_stays_zero(compressor):
    assert not roundtrip(compressor, np.zeros(30, np.float32)).any()


@each
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_damaged_update_is_finite_or_a_protocol_error(compressor, data):
    x = np.random.default_rng(0).normal(size=40).astype(np.float32)
    damaged = bytearray(compressor.compress(x, ENTROPY))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for candidate in (bytes(damaged), bytes(damaged[:cut])):
        try:
            found = compressor.decompress(candidate, 40)
        except PeerProtocolError:
            continue
        assert found.shape == (40,)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("scale", [np.nan, np.inf, 1e30])
def test_scales_that_would_ruin_the_mean_are_refused(scale):
    data = write(np.array([scale], np.float32), np.array([1, 0, -1]))
    with pytest.raises(PeerProtocolError, match="moderate numbers"):
        read(data, 3, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: TopK(0.0), "compress.fraction"),
        (lambda: TopK(0.1, 1), "compress.bits"),
        (lambda: TopK(0.1, 17), "compress.bits"),
        (lambda: SparseTernary(1.5), "compress.fraction"),
        (lambda: Qsgd(0), "compress.levels"),
        (lambda: Qsgd(4, -1), "compress.bucket"),
    ],
)
def test_values_outside_their_range_are_refused(make, reason):
    with pytest.raises(ConfigurationError, match=reason):
        make()
