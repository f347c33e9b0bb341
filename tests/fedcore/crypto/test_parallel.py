import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import Mask, ParallelMasks, ReplayedEntropy, add_masks, parallel
from fedcore.errors import ConfigurationError, LocalProtocolError
from fedcore.ring import Ring

ENTROPY = ReplayedEntropy(b"parallel")
MASKS = [Mask(ENTROPY.draw(str(i), 32), 1 if i % 3 else -1) for i in range(7)]
PAGE = parallel._ALIGNMENT


def vector(ring, dim):
    return ring.reduce(np.random.default_rng(dim).integers(0, 2**63, dim))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("bits", [3, 12, 16, 20, 64])
def test_the_result_is_that_of_one_core_bit_for_bit(bits, workers):
    ring = Ring(bits)
    page = PAGE // ring.dtype.itemsize
    for dim in (0, 1, page, page + 1, 5 * page - 1, 70 * page + 3):
        x = vector(ring, dim)
        before = x.copy()
        masked = ParallelMasks(workers, least_bytes=0)(x, iter(MASKS), ring)
        np.testing.assert_array_equal(masked, add_masks(x, MASKS, ring))
        assert masked.dtype == ring.dtype
        assert masked.flags.writeable
        np.testing.assert_array_equal(x, before)


@settings(deadline=None)
@given(dim=st.integers(0, 20_000), count=st.integers(1, 9), bits=st.integers(1, 64))
def test_parts_tile_the_vector_and_start_at_whole_cipher_blocks(dim, count, bits):
    x = Ring(bits).zeros(dim)
    parts = parallel._parts(x, count)
    assert len(parts) <= count
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(dim))
    assert all(part.start * x.itemsize % 16 == 0 for part in parts)


@pytest.mark.parametrize("at_once", [2, 4096])
def test_the_part_of_a_child_that_dies_is_done_again(at_once, monkeypatch):
    ring, x = Ring(16), vector(Ring(16), 40_000)
    parent, fold = os.getpid(), parallel.fold_streams

    def die_in_children(total, streams, ring):
        if os.getpid() != parent:
            total[:5] = 0
            os._exit(1)
        fold(total, streams, ring)

    monkeypatch.setattr(parallel, "MASKS_AT_ONCE", at_once)
    monkeypatch.setattr(parallel, "fold_streams", die_in_children)
    masked = ParallelMasks(3, least_bytes=0)(x, MASKS, ring)
    np.testing.assert_array_equal(masked, add_masks(x, MASKS, ring))


def test_children_end_when_the_parent_is_interrupted(monkeypatch):
    parent, fold = os.getpid(), parallel.fold_streams

    def interrupt(total, streams, ring):
        if os.getpid() == parent:
            raise KeyboardInterrupt
        fold(total, streams, ring)

    monkeypatch.setattr(parallel, "fold_streams", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ParallelMasks(2, least_bytes=0)(vector(Ring(16), 40_000), MASKS, Ring(16))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("why", ["little work", "no masks", "a daemon", "no fork"])
def test_where_processes_do_not_pay_or_cannot_be_none_is_started(why, monkeypatch):
    def refuse(*_):
        raise AssertionError("forked")

    monkeypatch.setattr(parallel, "_fold_forked", refuse)
    add, masks, ring = ParallelMasks(2, least_bytes=0), MASKS, Ring(16)
    x = vector(ring, 40_000)
    match why:
        case "little work":
            add = ParallelMasks(2, least_bytes=x.nbytes * len(masks) + 1)
        case "no masks":
            masks = []
        case "a daemon":
            monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
        case "no fork":
            monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    np.testing.assert_array_equal(add(x, masks, ring), add_masks(x, masks, ring))


def test_all_usable_cores_are_the_default():
    assert ParallelMasks()._workers == parallel.usable_cores() >= 1


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(workers):
    with pytest.raises(ConfigurationError, match=f"at least 1, got {workers}"):
        ParallelMasks(workers)


def test_bad_arguments_are_refused_before_anything_is_forked():
    add = ParallelMasks(2, least_bytes=0)
    with pytest.raises(LocalProtocolError, match="dtype uint16, found uint8"):
        add(np.zeros(10_000, np.uint8), MASKS, Ring(16))
    with pytest.raises(LocalProtocolError, match="32 bytes, got 3"):
        add(Ring(16).zeros(10_000), [Mask(b"abc")], Ring(16))
