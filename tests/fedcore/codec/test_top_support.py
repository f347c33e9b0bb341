import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.codec import Integers, PublicTopK, Reals, Support
from fedcore.codec.lossless import decode_positions, encode_positions
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError, PeerProtocolError

ENTROPY = ReplayedEntropy(b"support")
last = np.arange(-50.0, 50.0)


def positions_of(support, dim=100):
    codec = Support(support).bind(Reals(dim))
    return codec.encode(np.arange(dim), ENTROPY).tolist()


@settings(deadline=None)
@given(dim=st.integers(1, 300), chosen=st.data())
def test_positions_survive_the_way_over_the_wire(dim, chosen):
    positions = np.array(sorted(chosen.draw(st.sets(st.integers(0, dim - 1)))), np.int64)
    data = encode_positions(positions)
    np.testing.assert_array_equal(decode_positions(data, dim), positions)
    with pytest.raises(PeerProtocolError):
        decode_positions(data + b"\0", dim)


@settings(deadline=None)
@given(
    fraction=st.floats(0.01, 1),
    exploration=st.floats(0.01, 1),
    seed=st.integers(0, 2**62),
    known=st.booleans(),
)
def test_a_support_has_the_promised_size(fraction, exploration, seed, known):
    support = PublicTopK(fraction, exploration).choose(last if known else None, 100, seed)
    positions = positions_of(support)
    assert len(positions) == max(1, round(fraction * 100))
    assert positions == sorted(set(positions))


def test_the_largest_entries_are_always_there_and_the_rest_is_fresh():
    largest = set(np.argsort(np.abs(last))[-8:])
    seen = set()
    for seed in range(60):
        positions = set(positions_of(PublicTopK(0.1, 0.2).choose(last, 100, seed)))
        assert largest <= positions
        seen |= positions
    assert len(seen) > 60


def test_entries_that_did_not_move_are_not_preferred():
    still = np.zeros(100)
    chosen = {
        tuple(positions_of(PublicTopK(0.1, 0.2).choose(still, 100, seed))) for seed in range(5)
    }
    assert len(chosen) == 5


def test_the_sum_on_a_support_is_the_sum_of_the_coordinates():
    codec = Support(PublicTopK(0.1, 0.2).choose(last, 100, 0)).bind(Reals(100, norm=3.0))
    xs = np.random.default_rng(0).normal(size=(3, 100))
    total = codec.decode(sum(codec.encode(x, ENTROPY) for x in xs))
    kept = np.flatnonzero(total)
    np.testing.assert_allclose(total[kept], xs.sum(0)[kept])
    assert len(kept) == 10
    assert codec.target == Reals(10, norm=3.0)


@pytest.mark.parametrize("support", ["", "?", "AAAA", PublicTopK(1.0).choose(None, 200, 0)])
def test_a_support_that_does_not_fit_is_refused(support):
    with pytest.raises(ConfigurationError, match="support must"):
        Support(support).bind(Reals(100))


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: PublicTopK(0.0), "fraction"), (lambda: PublicTopK(0.1, 0.0), "exploration")],
)
def test_values_outside_their_range_are_refused(make, name):
    with pytest.raises(ConfigurationError, match=name):
        make()


def test_integers_have_no_support():
    with pytest.raises(ConfigurationError, match="sparsify before quantising"):
        Support(PublicTopK().choose(None, 3, 0)).bind(Integers(3, 1))
