import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.codec import Tally
from fedcore.codec.tally import VALUE_BITS
from fedcore.errors import ConfigurationError
from fedcore.ring import Ring

laws = settings(deadline=None)


def summed(tally, rows):
    """Add up in the ring's dtype, reduced as an unmasked sum is."""
    total = tally.ring.zeros(tally.dim)
    for row in rows:
        encoded = tally.encode(row)
        assert encoded.dtype == tally.ring.dtype
        assert encoded.shape == (tally.dim,)
        total = total + encoded
    return tally.decode(tally.ring.reduce(total))


@laws
@given(data=st.data(), clients=st.integers(1, 30), slots=st.integers(0, 4))
def test_sums_of_signed_numbers_are_exact(data, clients, slots):
    bits = data.draw(st.integers(clients.bit_length() + 1, 64))
    tally = Tally(slots, clients, Ring(bits))
    numbers = st.integers(-tally.limit, tally.limit)
    row = st.lists(numbers, min_size=slots, max_size=slots)
    rows = data.draw(st.lists(row, max_size=clients))
    assert summed(tally, rows) == tuple(sum(row[slot] for row in rows) for slot in range(slots))


@pytest.mark.parametrize("clients", [1, 2, 3, 100, 1000, 4095])
@pytest.mark.parametrize("bits", [13, 16, 32, 64])
def test_a_full_cohort_at_the_limit_is_still_exact(clients, bits):
    tally = Tally(2, clients, Ring(bits))
    total = tally.encode([tally.limit, -tally.limit]).astype(np.uint64) * np.uint64(clients)
    sums = tally.decode(tally.ring.reduce(total))
    assert sums == (clients * tally.limit, -clients * tally.limit)
    assert clients * tally.limit < 2 ** (VALUE_BITS - 1) <= clients * (tally.limit + 1)


@laws
@given(value=st.integers(-(2**80), 2**80), clients=st.integers(1, 1000))
def test_a_number_beyond_the_limit_is_cut_to_it(value, clients):
    tally = Tally(1, clients, Ring(16))
    assert summed(tally, [[value]]) == (max(-tally.limit, min(tally.limit, value)),)


@given(clients=st.integers(1, 10**6), slots=st.integers(1, 5), bits=st.integers(21, 64))
def test_the_digits_fit_the_ring_and_cover_the_number(clients, slots, bits):
    tally = Tally(slots, clients, Ring(bits))
    assert clients * (2**tally.digit_bits - 1) < 2**bits
    assert (tally.digits - 1) * tally.digit_bits < VALUE_BITS <= tally.digits * tally.digit_bits
    assert tally.dim == slots * tally.digits


def test_no_slots_append_nothing_in_any_ring():
    tally = Tally(0, 1000, Ring(4))
    assert tally.dim == 0
    assert summed(tally, [[], []]) == ()


def test_a_ring_without_room_for_a_digit_is_refused():
    assert Tally(1, 100, Ring(8)).digit_bits == 1
    with pytest.raises(ConfigurationError, match="100 clients: it needs more than 7 bits"):
        Tally(1, 100, Ring(7))
