"""Integers in few bytes, exactly; and nothing but integers or a protocol error on the way back."""

import json
from contextlib import suppress
from hashlib import sha256
from math import log, log2, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec.lossless import LARGEST, decode_integers, encode_integers
from fedcore.codec.rice import MOST_BITS, best_parameter, coded_bits, rice_decode, rice_encode
from fedcore.errors import PeerProtocolError

FILE = Path(__file__).parents[2] / "vectors/lossless_v1.json"
VECTORS = json.loads(FILE.read_text())["vectors"]
GOLDEN = (1 + sqrt(5)) / 2
laws = settings(deadline=None, max_examples=200)
small = st.integers(-3, 3)
entries = st.one_of(st.just(0), small, st.integers(-LARGEST + 1, LARGEST - 1))
# Magnitudes alike, as in an update: one huge entry among small ones is legal but long.
vectors = st.one_of(
    arrays(np.int64, st.integers(0, 200), elements=small),
    arrays(np.int64, st.integers(0, 200), elements=st.integers(-LARGEST + 1, LARGEST - 1)),
    st.lists(entries, max_size=8).map(lambda values: np.array(values, np.int64)),
)


@laws
@given(x=vectors)
def test_what_is_read_is_what_was_written(x):
    np.testing.assert_array_equal(decode_integers(encode_integers(x), len(x)), x)


@laws
@given(values=st.lists(st.integers(0, 1000), max_size=300), parameter=st.integers(0, MOST_BITS))
def test_codes_are_exact_at_every_parameter_and_as_long_as_computed(values, parameter):
    x = np.array(values, np.uint64)
    data = rice_encode(x, parameter)
    np.testing.assert_array_equal(rice_decode(data, len(x), parameter, 1001), x)
    padding = 2 * 8  # each of the two streams ends with a whole byte
    assert coded_bits(x, parameter) <= 8 * len(data) < coded_bits(x, parameter) + padding


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_known_answer(vector):
    places, modulus = np.arange(vector["dim"], dtype=np.uint64), vector["modulus"]
    hashed = (places * np.uint64(2654435761) >> np.uint64(7)) % np.uint64(modulus)
    y = hashed.astype(np.int64) - modulus // 2
    x = np.sign(y) * np.maximum(np.abs(y) - vector["shift"], 0)
    data = encode_integers(x)
    assert len(data) == vector["size"]
    if "encoded" in vector:
        assert data.hex() == vector["encoded"]
    else:
        assert sha256(data).hexdigest() == vector["sha256"]
    np.testing.assert_array_equal(decode_integers(data, len(x)), x)


def test_a_known_code():
    # 9 = 2 * 4 + 1: two zeros, a one, remainder 01; 3 = 0 * 4 + 3: a one, remainder 11.
    data = rice_encode(np.array([9, 3], np.uint64), 2)
    assert data == bytes([0b1100, 0b1101])


@pytest.mark.parametrize("mean", [0.01, 0.5, 3.0, 100.0, 1e6])
def test_the_chosen_parameter_is_the_best_one_for_geometric_numbers(mean):
    values = np.random.default_rng(0).geometric(1 / (1 + mean), 5000).astype(np.uint64) - 1
    best = min(range(40), key=lambda parameter: coded_bits(values, parameter))
    assert coded_bits(values, best_parameter(values)) == coded_bits(values, best)


@pytest.mark.parametrize("p", [0.01, 1 / 400])
def test_a_sparse_ternary_vector_costs_what_golomb_computed(p):
    dim = 1_000_000
    rng = np.random.default_rng(0)
    x = np.zeros(dim, np.int64)
    x[rng.choice(dim, round(p * dim), replace=False)] = rng.choice([-1, 1], round(p * dim))
    remainder = 1 + int(log2(log(GOLDEN - 1) / log(1 - p)))  # [SWMS19, equations 15 and 16]
    position = remainder + 1 / (1 - (1 - p) ** (2**remainder))
    theory = round(p * dim) * (position + 1) / 8
    assert len(encode_integers(x)) == pytest.approx(theory, rel=0.03)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 4.0, 50.0])
def test_a_gaussian_vector_costs_little_more_than_its_entropy(sigma):
    x = np.rint(np.random.default_rng(1).normal(0, sigma, 200_000)).astype(np.int64)
    share = np.unique(x, return_counts=True)[1] / len(x)
    entropy = -(share * np.log2(share)).sum() * len(x) / 8
    assert entropy < len(encode_integers(x)) < 1.1 * entropy


def test_one_huge_entry_among_many_small_ones_takes_little_memory():
    x = np.ones(100_001, np.int64)
    x[1] = LARGEST - 1  # not among those that the parameter is judged by
    data = encode_integers(x)
    assert len(data) < 600_000
    np.testing.assert_array_equal(decode_integers(data, len(x)), x)


def test_zeros_cost_almost_nothing():
    assert len(encode_integers(np.zeros(10**6, np.int64))) < 8


@settings(deadline=None, max_examples=400)
@given(x=vectors, data=st.data())
def test_a_changed_encoding_is_another_vector_or_a_protocol_error(x, data):
    encoded = bytearray(encode_integers(x))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(encoded) - 1))
        encoded[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(encoded)))
    for candidate in (bytes(encoded), bytes(encoded[:cut]), bytes(encoded) + b"\0"):
        try:
            found = decode_integers(candidate, len(x))
        except PeerProtocolError:
            continue
        assert found.shape == x.shape
        assert np.abs(found).max(initial=0) <= LARGEST


@settings(deadline=None, max_examples=400)
@given(data=st.binary(max_size=60), dim=st.integers(0, 2**40))
def test_any_bytes_are_a_vector_or_a_protocol_error_and_take_little_memory(data, dim):
    if dim > 1000 and data[:1] == b"\1":
        dim %= 1000  # a sparse vector of that length is what was asked for
    with suppress(PeerProtocolError):
        assert decode_integers(data, dim).shape == (dim,)


@pytest.mark.parametrize(
    ("data", "dim", "reason"),
    [
        (b"", 3, "ended too early"),
        (b"\7", 3, "found form 7"),
        (b"\0", 3, "ended too early"),
        (b"\0\61\0", 3, "remainder must have"),
        (b"\0\0\1\3", 3, "expected 3 codes and nothing behind them, found 2"),
        (b"\0\0\1\7\0", 3, "0 signs take 0 bytes, found 1"),
        (b"\0\0\1\x0a\4", 2, "padding behind the signs"),
        (b"\1\4", 3, "at most 3 positions"),
        (b"\1\xff\xff\xff\xff\xff\xff\xff", 3, "count must take"),
        (b"\1\1\0\0", 3, "take at least"),
        (b"\1\1\0\1\x10", 3, "coded number must be below 3"),
        (b"\1\2\0\1\x0a\0\0\1\3\0", 2, "positions must be below 2"),
        (b"\1\1\0\1\1" * 9, 3, "found form 1 at level 0"),
    ],
)
def test_malformed_bytes_are_refused_with_the_reason(data, dim, reason):
    with pytest.raises(PeerProtocolError, match=reason):
        decode_integers(data, dim)


def test_a_known_encoding():
    # Two of six differ from zero, after gaps of 1 and 2: codes 01 and 001, lowest bit first.
    # Less one they are 0 and 1: codes 1 and 01. The second is negative.
    data = b"\1\2" + b"\0\1" + bytes([0b10010]) + b"\0\0\1" + bytes([0b101]) + b"\2"
    np.testing.assert_array_equal(decode_integers(data, 6), [0, 1, 0, 0, -2, 0])
