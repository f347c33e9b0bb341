"""What one process of a board writes the other reads, whole or not at all."""

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.edge.parcels import (
    App,
    Connected,
    Ended,
    Task,
    new_file,
    read,
    receive,
    send,
    write,
)
from fedcore.errors import LocalProtocolError

APP = App("/apps/one", "fedcore/fedcore", "0.1.0", "ab" * 32)


@pytest.fixture
def link():
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield pair
    for end in pair:
        end.close()


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_a_parcel_is_read_as_it_was_written(parts):
    file = new_file()
    try:
        write(file, parts)
        assert read(file) == parts
    finally:
        os.close(file)


def test_half_a_parcel_is_none():
    file = new_file()
    try:
        with pytest.raises(LocalProtocolError, match="not finished"):
            read(file)
        write(file, [b"first", b"second"])
        os.ftruncate(file, os.fstat(file).st_size - 1)
        with pytest.raises(LocalProtocolError, match="not finished"):
            read(file)
    finally:
        os.close(file)


@pytest.mark.parametrize("order", [Task(7, APP), Ended(7, -9), Connected(2**64 - 1)])
def test_an_order_arrives_as_it_was_sent(link, order):
    assert send(link[0], order)
    assert receive(link[1]) == (order, [])


def test_a_memory_file_travels_with_its_order(link):
    file = new_file()
    write(file, [b"a message"])
    send(link[0], Task(1, APP), [file])
    os.close(file)
    _, (arrived,) = receive(link[1])
    assert read(arrived) == [b"a message"]
    os.close(arrived)


def test_the_end_of_a_process_is_the_end_of_its_link(link):
    link[0].close()
    assert receive(link[1]) is None
    assert not send(link[1], Ended(1, 0))


@pytest.mark.parametrize("data", [b"{}", b"[1]", b"\xff", b'{"Task": 1}', b'{"Rest": {}}'])
def test_another_order_is_refused(link, data):
    link[0].send(data)
    with pytest.raises(LocalProtocolError, match="expected a task"):
        receive(link[1])
