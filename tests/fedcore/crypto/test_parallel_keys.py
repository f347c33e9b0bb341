import multiprocessing
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto import (
    Exchange,
    KeyPair,
    ParallelAgreement,
    ReplayedEntropy,
    agree,
    agree_all,
    parallel_keys,
)
from fedcore.errors import ConfigurationError, PeerProtocolError

ENTROPY = ReplayedEntropy(b"parallel keys")
PAIRS = [KeyPair.generate(ENTROPY, f"pair {i}") for i in range(5)]
EXCHANGES = [
    Exchange(one.secret, other.public, b"%d" % i)
    for i, one in enumerate(PAIRS)
    for other in PAIRS
    if other is not one
]
SALT = b"the round"
KEYS = [agree(e.secret, e.peer, salt=SALT, info=e.info) for e in EXCHANGES]


def test_each_key_is_that_of_its_own_agreement():
    assert agree_all(EXCHANGES, salt=SALT) == KEYS
    assert agree_all(EXCHANGES[::-1], salt=SALT) == KEYS[::-1]
    assert agree_all(EXCHANGES, salt=b"another") != KEYS
    assert agree_all([], salt=SALT) == []
    assert len(set(KEYS)) == len(KEYS)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
def test_several_processes_agree_on_the_same_keys_in_the_same_order(workers):
    assert ParallelAgreement(workers, least_exchanges=0)(EXCHANGES, salt=SALT) == KEYS
    assert ParallelAgreement(workers, least_exchanges=0)([], salt=SALT) == []


@given(count=st.integers(0, 500), workers=st.integers(1, 40))
def test_parts_tile_the_list_and_are_of_equal_length_or_one_less(count, workers):
    parts = parallel_keys._parts(count, workers)
    sizes = {part.stop - part.start for part in parts}
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    assert len(parts) == min(count, workers)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


@pytest.mark.parametrize("spoil", [b"", b"short", bytes(range(32))])
def test_the_part_of_a_child_that_dies_is_done_again(monkeypatch, spoil):
    parent, write = os.getpid(), parallel_keys._write

    def die_in_children(memory, exchanges, part, salt):
        if os.getpid() != parent:
            at = part.start * 32
            memory[at : at + len(spoil)] = spoil
            os._exit(1)
        write(memory, exchanges, part, salt)

    monkeypatch.setattr(parallel_keys, "_write", die_in_children)
    assert ParallelAgreement(3, least_exchanges=0)(EXCHANGES, salt=SALT) == KEYS


@pytest.mark.parametrize("at", [0, len(EXCHANGES) - 1])
def test_a_bad_key_is_the_peers_fault_whoever_meets_it(at, capfd):
    bad = list(EXCHANGES)
    bad[at] = Exchange(PAIRS[0].secret, bytes(32), b"")
    with pytest.raises(PeerProtocolError, match="32 bytes of a point of large order"):
        ParallelAgreement(2, least_exchanges=0)(bad, salt=SALT)
    assert not multiprocessing.active_children()
    assert capfd.readouterr().err == ""


def test_children_end_when_the_parent_is_interrupted(monkeypatch):
    parent, write = os.getpid(), parallel_keys._write

    def interrupt(memory, exchanges, part, salt):
        if os.getpid() == parent:
            raise KeyboardInterrupt
        write(memory, exchanges, part, salt)

    monkeypatch.setattr(parallel_keys, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ParallelAgreement(2, least_exchanges=0)(EXCHANGES, salt=SALT)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("why", ["one core", "little work", "a daemon", "no fork"])
def test_where_processes_do_not_pay_or_cannot_be_none_is_started(why, monkeypatch):
    def refuse(*_):
        raise AssertionError("forked")

    monkeypatch.setattr(parallel_keys, "_agree_forked", refuse)
    agree_here = ParallelAgreement(2, least_exchanges=0)
    match why:
        case "one core":
            agree_here = ParallelAgreement(1, least_exchanges=0)
        case "little work":
            agree_here = ParallelAgreement(2, least_exchanges=len(EXCHANGES) + 1)
        case "a daemon":
            monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
        case "no fork":
            monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert agree_here(EXCHANGES, salt=SALT) == KEYS


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(workers):
    with pytest.raises(ConfigurationError, match=f"at least 1, got {workers}"):
        ParallelAgreement(workers)


def test_an_exchange_keeps_its_secret_to_itself():
    assert repr(EXCHANGES[0].secret)[2:-1] not in repr(EXCHANGES[0])
