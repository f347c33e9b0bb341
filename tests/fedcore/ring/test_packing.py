import json
import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import PeerProtocolError
from fedcore.ring import Ring, pack, packed_size, packing, unpack

VECTORS = json.loads((Path(__file__).parents[2] / "vectors/packing_v1.json").read_text())["vectors"]

rings = st.builds(Ring, st.integers(1, 64))
laws = settings(deadline=None)


def elements(ring, dim, seed=0):
    words = np.random.default_rng(seed).integers(0, 2**64, dim, np.uint64)
    return ring.reduce(words)


def bit_string(x, ring):
    """Return the specification: one integer whose bits [i*b, (i+1)*b) are element i."""
    value = sum(element << (i * ring.bits) for i, element in enumerate(x.tolist()))
    return value.to_bytes(packed_size(len(x), ring.bits), "little")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_known_answer(vector):
    ring = Ring(vector["bits"])
    x = np.array([int(element, 16) for element in vector["elements"]], ring.dtype)
    assert pack(x, ring).hex() == vector["packed"]
    assert unpack(bytes.fromhex(vector["packed"]), len(x), ring).tolist() == x.tolist()


@pytest.mark.parametrize("bits", range(1, 65))
def test_every_width_packs_into_one_little_endian_bit_string_and_back(bits):
    ring = Ring(bits)
    for dim in (*range(18), 63, 64, 65):
        x = elements(ring, dim, seed=dim)
        x[: dim // 3] = ring.mask
        data = pack(x, ring)
        assert data == bit_string(x, ring)
        assert len(data) == packed_size(dim, bits) == -(-dim * bits // 8)
        back = unpack(data, dim, ring)
        assert back.dtype == ring.dtype
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
    ("bits", "digest"),
    [
        (4, "9a423577e4e305d00f2fc941923f57a722c44c0dfc9d9ad1df508cb3a3bd38b9"),
        (7, "d0c60c1d60a7a6f482da95a8c1514ecb346551d74716b81d3c54aea192710200"),
        (12, "d28a97a87aa65699c3a00c4d40028fc6fd21e6f8e543f8c35a174e843e7974b5"),
        (20, "8bd54c8a39e9eba6f4256ab789edf0ff89c3ca106e32ef89875e5b0ce6aafeae"),
        (33, "c9b2ca444314148c2070a31f8a08a564cc7b61b94bf57ca4068a13c44681b7c8"),
    ],
)
def test_a_long_vector_of_several_blocks_has_a_known_packing(bits, digest):
    ring = Ring(bits)
    hashed = np.arange(300_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = ring.reduce(hashed >> np.uint64(64 - bits))
    data = pack(x, ring)
    assert sha256(data).hexdigest() == digest
    np.testing.assert_array_equal(unpack(data, len(x), ring), x)


def test_packing_leaves_its_input_alone_and_unpacks_into_writable_memory():
    for ring in (Ring(12), Ring(16)):
        x = elements(ring, 100)
        before = x.copy()
        back = unpack(pack(x, ring), 100, ring)
        back += ring.dtype.type(1)
        np.testing.assert_array_equal(x, before)


@settings(deadline=None, max_examples=300)
@given(data=st.binary(max_size=64), dim=st.integers(0, 40), ring=rings)
def test_arbitrary_bytes_are_the_packing_of_what_they_unpack_to_or_the_peers_fault(data, dim, ring):
    try:
        x = unpack(data, dim, ring)
    except PeerProtocolError:
        surplus = 8 * len(data) - dim * ring.bits
        assert len(data) != packed_size(dim, ring.bits) or data[-1] >> (8 - surplus)
    else:
        assert pack(x, ring) == data


@laws
@given(ring=rings, dim=st.integers(1, 40), data=st.data())
def test_every_single_set_padding_bit_is_refused(ring, dim, data):
    surplus = -dim * ring.bits % 8
    if not surplus:
        dim, ring = 1, Ring(7)
        surplus = 1
    packed = bytearray(pack(elements(ring, dim), ring))
    packed[-1] |= 0x80 >> data.draw(st.integers(0, surplus - 1))
    with pytest.raises(PeerProtocolError, match=f"the last {surplus} padding bits"):
        unpack(bytes(packed), dim, ring)


@pytest.mark.parametrize("bits", [1, 8, 12, 32, 64])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_byte_too_few_or_too_many_is_refused(bits, change):
    size = packed_size(9, bits)
    with pytest.raises(PeerProtocolError, match=f"take {size} bytes, found {size + change}"):
        unpack(bytes(size + change), 9, Ring(bits))


@pytest.mark.parametrize("bits", [1, 3, 7, 8, 12, 15, 16, 17, 21, 22, 31, 33, 57, 58, 61, 63, 64])
def test_block_boundaries_leave_no_trace(bits, monkeypatch):
    ring = Ring(bits)
    x = elements(ring, 200, seed=bits)
    whole = pack(x, ring)
    monkeypatch.setattr(packing, "_BLOCK_BYTES", 64 * ring.dtype.itemsize)
    for dim in (0, 1, 63, 64, 65, 127, 128, 129, 200):
        data = pack(x[:dim], ring)
        assert data == bit_string(x[:dim], ring)
        assert unpack(data, dim, ring).tolist() == x[:dim].tolist()
    assert data == whole


@pytest.mark.parametrize("bits", [1, 12, 16, 24])
def test_a_prefix_stands_in_front_of_the_packing(bits):
    ring = Ring(bits)
    for dim in (0, 1, 17):
        x = elements(ring, dim)
        assert pack(x, ring, prefix=b"head") == b"head" + pack(x, ring)


@pytest.mark.parametrize("bits", [12, 16, 20])
def test_views_unpack_as_bytes_do(bits):
    ring = Ring(bits)
    x = elements(ring, 100)
    data = memoryview(b"?" + pack(x, ring))[1:]
    assert unpack(data, 100, ring).tolist() == x.tolist()


def test_a_vector_that_nobody_writes_to_needs_no_memory_of_its_own():
    data = pack(elements(Ring(16), 100), Ring(16))
    x = unpack(data, 100, Ring(16), writable=False)
    assert np.shares_memory(x, np.frombuffer(data, np.uint8))
    assert x.dtype == np.uint16
    assert x.tolist() == unpack(data, 100, Ring(16)).tolist()


@pytest.mark.parametrize("bits", [12, 16, 20])
def test_beside_its_result_packing_takes_a_block(bits):
    ring = Ring(bits)
    x = ring.zeros(1 << 21)
    tracemalloc.start()
    data = pack(x, ring, prefix=b"head")
    packing_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    unpack(memoryview(data)[4:], len(x), ring)
    unpacking_peak = tracemalloc.get_traced_memory()[1] - len(data)
    tracemalloc.stop()
    assert packing_peak < 1.2 * len(data)
    assert unpacking_peak < 1.2 * x.nbytes
