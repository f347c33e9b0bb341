"""Every device ends with the coordinator's broadcast model, bit for bit, or with an error."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.codec.broadcast import NO_VERSION, Broadcast, Delta, apply_update, version_of
from fedcore.errors import ConfigurationError, PeerProtocolError

LAYERS = (60, 0, 7, 33)
DIM = sum(LAYERS)


def initial(bits=8, seed=0):
    model = np.random.default_rng(seed).normal(0, 0.1, DIM).astype(np.float32)
    return Broadcast.of(LAYERS, bits).towards(model)


def walk(broadcast, rounds, size=0.01, seed=1):
    """Return all broadcasts of a strategy that moves its model at random."""
    rng, history = np.random.default_rng(seed), [broadcast]
    target = broadcast.model.copy()
    for _ in range(rounds):
        target = target + rng.normal(0, size, DIM).astype(np.float32)
        history.append(history[-1].towards(target))
    return history, target


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_every_device_has_the_broadcast_model_bit_for_bit_after_every_round(bits):
    history, _ = walk(initial(bits), 20)
    device = apply_update(None, history[0].update_from(NO_VERSION), LAYERS, history[0].version)
    for before, after in pairwise(history):
        device = apply_update(device, after.update_from(before.version), LAYERS, after.version)
        assert device.tobytes() == after.model.tobytes()


@settings(deadline=None, max_examples=60)
@given(bits=st.sampled_from([3, 4, 8]), slept=st.integers(0, 60), seed=st.integers(0, 99))
def test_a_device_that_slept_catches_up(bits, slept, seed):
    history, _ = walk(initial(bits), 60, seed=seed)
    last = history[-1]
    asleep = history[60 - slept]
    data = last.update_from(asleep.version)
    assert apply_update(asleep.model, data, LAYERS, last.version).tobytes() == last.model.tobytes()
    assert len(data) <= len(last.update_from(NO_VERSION))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_rounding_lost_goes_out_with_later_deltas(bits):
    history, target = walk(initial(bits), 10)
    current = history[-1]
    for _ in range(40):
        current = current.towards(target)
    step = np.abs(target - history[-1].model).max() / (2 ** (bits - 1) - 1)
    assert np.abs(current.model - target).max() < 0.01 * step + 1e-7


def test_the_history_never_takes_more_than_the_model_itself():
    history, _ = walk(initial(4), 200)
    assert sum(len(step.data) for step in history[-1].steps) <= history[-1].model.nbytes
    assert len(history[-1].steps) > 1


def test_many_rounds_of_changes_take_few_bits_more_than_one():
    history, _ = walk(initial(2, seed=3), 30)
    one = len(history[-1].update_from(history[-2].version))
    all_of_them = sum(len(step.data) for step in history[-1].steps[-16:])
    merged = len(history[-1].update_from(history[-17].version))
    assert one < merged < all_of_them / 3


def test_a_layer_that_grows_beyond_its_steps_is_sent_anew_and_stays_exact():
    small = np.full(DIM, 1e-9, np.float32)
    first = Broadcast.of(LAYERS, 8).towards(small)
    grown = first.towards(small + np.float32(1)).towards(np.full(DIM, 3.0, np.float32))
    data = grown.update_from(first.version)
    assert data[:1] == b"w"
    assert apply_update(first.model, data, LAYERS, grown.version).tobytes() == grown.model.tobytes()
    history, target = walk(grown, 20)
    assert np.abs(history[-1].model - target).max() < 0.05
    for before in history:
        update = history[-1].update_from(before.version)
        found = apply_update(before.model, update, LAYERS, history[-1].version)
        assert found.tobytes() == history[-1].model.tobytes()


@settings(deadline=None, max_examples=100)
@given(data=st.data(), bits=st.integers(2, 16))
def test_any_sequence_of_models_reaches_every_sleeper_bit_for_bit(data, bits):
    size = st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from([0.0, 1e-30, -1.0, 3e4])
    layers = (2, 0, 3)
    broadcast = Broadcast.of(layers, bits)
    history = [broadcast]
    for _ in range(data.draw(st.integers(1, 8))):
        target = np.array(data.draw(st.lists(size, min_size=5, max_size=5)), np.float32)
        history.append(history[-1].towards(target))
    last = history[-1]
    for before in history:
        found = apply_update(before.model, last.update_from(before.version), layers, last.version)
        assert found.tobytes() == last.model.tobytes()
    found = apply_update(None, last.update_from(NO_VERSION), layers, last.version)
    assert found.tobytes() == last.model.tobytes()


def test_an_unknown_version_gets_the_whole_model():
    history, _ = walk(initial(), 5)
    data = history[-1].update_from(version_of(np.ones(DIM, np.float32)))
    assert apply_update(None, data, LAYERS, history[-1].version).tobytes() == (
        history[-1].model.tobytes()
    )


def test_a_target_that_is_reached_makes_no_new_version():
    broadcast = initial()
    assert broadcast.towards(broadcast.model) is broadcast
    assert broadcast.update_from(broadcast.version) == b"c"


def test_a_device_with_another_base_notices():
    history, _ = walk(initial(), 3)
    data = history[-1].update_from(history[-2].version)
    assert data[:1] == b"c"
    for base in (history[0].model, history[-2].model + np.float32(1e-7), None, np.zeros(3, "f4")):
        with pytest.raises(PeerProtocolError, match=r"digest|changes to one"):
            apply_update(base, data, LAYERS, history[-1].version)


def test_a_model_that_is_not_finite_is_not_sent():
    broadcast = initial()
    target = broadcast.model.copy()
    target[3] = np.nan
    with pytest.raises(ConfigurationError, match="training diverged"):
        broadcast.towards(target)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), whole=st.booleans())
def test_a_damaged_update_is_noticed(data, whole):
    history, _ = walk(initial(), 3)
    last = history[-1]
    update = bytearray(last.update_from(NO_VERSION if whole else history[0].version))
    update[data.draw(st.integers(0, len(update) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(update) - 1))
    for candidate in (bytes(update), bytes(update[:cut]), bytes(update) + b"\0"):
        try:
            found = apply_update(history[0].model, candidate, LAYERS, last.version)
        except PeerProtocolError:
            continue
        assert found.tobytes() == last.model.tobytes()  # e.g. an exponent of an empty layer


@pytest.mark.parametrize("bits", [1, 17])
def test_a_width_outside_the_range_is_refused(bits):
    with pytest.raises(ConfigurationError, match=r"downlink\.bits must be in 2\.\.16"):
        Delta(bits)
