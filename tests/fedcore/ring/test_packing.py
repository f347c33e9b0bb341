import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import PeerProtocolError
from fedcore.ring import Ring, pack, packed_size, unpack

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
