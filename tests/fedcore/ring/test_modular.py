import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import ConfigurationError
from fedcore.ring import Ring

rings = st.builds(Ring, st.integers(1, 64))
laws = settings(deadline=None)


def signed(ring):
    return st.integers(-(2 ** (ring.bits - 1)), 2 ** (ring.bits - 1) - 1)


@pytest.mark.parametrize("bits", range(1, 65))
def test_the_dtype_is_the_narrowest_that_holds_an_element(bits):
    ring = Ring(bits)
    assert ring.mask == 2**bits - 1 <= np.iinfo(ring.dtype).max
    narrower = [d for d in (np.uint8, np.uint16, np.uint32) if np.iinfo(d).max >= ring.mask]
    assert all(np.dtype(d).itemsize >= ring.dtype.itemsize for d in narrower)
    assert ring.zeros(3).dtype == ring.dtype


@laws
@given(data=st.data(), ring=rings)
def test_lift_undoes_reduce_on_the_signed_representatives(data, ring):
    values = np.array(data.draw(st.lists(signed(ring))), np.int64)
    elements = ring.reduce(values)
    assert elements.dtype == ring.dtype
    assert (elements <= ring.mask).all()
    np.testing.assert_array_equal(ring.lift(elements), values)


@laws
@given(
    ring=rings,
    values=st.lists(st.integers(-(2**63), 2**63 - 1)) | st.lists(st.integers(0, 2**64 - 1)),
)
def test_reduce_is_the_remainder_for_every_sign_and_width(ring, values):
    wide = np.array(values, np.uint64 if any(v >= 2**63 for v in values) else np.int64)
    assert ring.reduce(wide).tolist() == [value % 2**ring.bits for value in values]


@laws
@given(data=st.data(), ring=rings, count=st.integers(1, 40))
def test_sums_and_differences_wrap_as_integers_modulo_the_ring(data, ring, count):
    values = data.draw(st.lists(signed(ring), min_size=count, max_size=count))
    signs = data.draw(st.lists(st.sampled_from((1, -1)), min_size=count, max_size=count))
    total = ring.zeros(1)
    for value, sign in zip(values, signs, strict=True):
        element = ring.reduce(np.array([value]))
        total = total + element if sign > 0 else total - element

    exact = sum(sign * value for value, sign in zip(values, signs, strict=True))
    assert total.dtype == ring.dtype
    assert ring.reduce(total).tolist() == [exact % 2**ring.bits]
    # Lifting needs no reduction first: the surplus high bits are shifted out.
    half = 2 ** (ring.bits - 1)
    assert ring.lift(total).tolist() == [(exact + half) % 2**ring.bits - half]


def test_reduce_returns_a_copy():
    ring = Ring(12)
    x = np.array([0xFFFF, 1], np.uint16)
    reduced = ring.reduce(x)
    reduced[1] = 7
    assert reduced[0] == 0xFFF
    assert x.tolist() == [0xFFFF, 1]


@pytest.mark.parametrize("bits", [-1, 0, 65])
def test_a_ring_of_other_widths_is_refused(bits):
    with pytest.raises(ConfigurationError, match=rf"ring\.bits must be in 1\.\.64, got {bits}"):
        Ring(bits)
