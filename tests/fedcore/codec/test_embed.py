import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedcore.codec import Embed, Integers, narrowest_ring
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError, HeadroomError
from fedcore.ring import Ring

ENTROPY = ReplayedEntropy(b"embed")
magnitudes = st.integers(1, 2**20)
clients = st.integers(1, 10_000)


def sum_of_equals(bits, value, count):
    """Return what `count` clients with the same entry decode to."""
    codec = Embed(bits, count).bind(Integers(1, abs(value)))
    encoded = codec.encode(np.array([value]), ENTROPY).astype(np.uint64)
    return int(codec.decode(Ring(bits).reduce(encoded * np.uint64(count)))[0])


@given(magnitude=magnitudes, count=clients)
def test_the_narrowest_ring_holds_the_extreme_sums_and_one_bit_less_is_refused(magnitude, count):
    source = Integers(1, magnitude)
    bits = narrowest_ring(source, count)
    assert sum_of_equals(bits, magnitude, count) == count * magnitude
    assert sum_of_equals(bits, -magnitude, count) == -count * magnitude

    with pytest.raises(HeadroomError) as refused:
        Embed(bits - 1, count).bind(source)
    assert refused.value.needed_bits == bits
    assert f"needs a ring of {bits} bits, got {bits - 1}" in str(refused.value)
    # The refusal is exact: in that ring the largest sum would come back as another number.
    narrow = Ring(bits - 1)
    assert narrow.lift(narrow.reduce(np.array([count * magnitude]))) != count * magnitude


@given(
    magnitude=st.integers(0, 2**20),
    count=clients,
    spread=st.floats(1e-12, 1e6),
    tails=st.floats(0.5, 10),
)
@example(magnitude=1, count=1, spread=1e-12, tails=4.0)
def test_a_ring_has_room_for_hard_bounds_and_tails(magnitude, count, spread, tails):
    source = Integers(1, magnitude, spread=spread)
    bits = narrowest_ring(source, count, tails)
    assert bits >= narrowest_ring(Integers(1, magnitude), count)
    needed = 2 * (count * magnitude + tails * spread)
    assert needed <= 2**bits * (1 + 1e-8)
    if bits > narrowest_ring(Integers(1, magnitude), count):
        assert needed > 2 ** (bits - 1)
        with pytest.raises(HeadroomError) as refused:
            Embed(bits - 1, count, tails).bind(source)
        assert refused.value.needed_bits == bits
    assert Embed(bits, count, tails).bind(source).target.bits == bits


def test_the_message_says_what_is_needed_and_what_to_do():
    with pytest.raises(
        HeadroomError,
        match=r"^a sum of 100 vectors with entries up to 127 needs a ring of 15 bits, got 8: "
        r"raise ring\.bits or lower quantize\.bits$",
    ):
        Embed(8, 100).bind(Integers(3, 127))


@pytest.mark.parametrize("bits", [0, 65])
def test_a_ring_that_does_not_exist_is_refused(bits):
    with pytest.raises(ConfigurationError, match=r"ring\.bits must be in 1\.\.64"):
        Embed(bits, 1).bind(Integers(1, 1))
