"""The wire does to connections what it says."""

import socket
import threading
from contextlib import contextmanager

import pytest

from tests.chaos.wire import Wire


@contextmanager
def echo():
    """A server that sends back what it gets."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection):
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


@pytest.fixture
def wire():
    with echo() as port:
        found = Wire(port, seed=1)
        yield found
        found.close()


@contextmanager
def connected(wire, seconds=20.0):
    with socket.create_connection(("127.0.0.1", wire.port), timeout=seconds) as connection:
        yield connection


def said_back(connection, data):
    connection.sendall(data)
    found = b""
    while len(found) < len(data):
        part = connection.recv(1 << 16)
        if not part:
            break
        found += part
    return found


def is_closed(connection):
    """Whether the other end is gone; waits for it."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_a_wire_passes_on_what_it_gets(wire):
    data = bytes(range(256)) * 400
    with connected(wire) as connection:
        assert said_back(connection, data) == data


@pytest.mark.parametrize("condition", [{"delay": 0.01}, {"bandwidth": 1e6}])
def test_a_slow_wire_changes_nothing_but_time(wire, condition):
    wire.set(**condition)
    data = bytes(range(256)) * 100
    with connected(wire) as connection:
        assert said_back(connection, data) == data


def test_a_cut_wire_closes_what_is_open_and_takes_nothing(wire):
    with connected(wire) as connection:
        assert said_back(connection, b"one") == b"one"
        wire.set(cut=True)
        assert is_closed(connection)
        with connected(wire) as second:
            assert is_closed(second)
    wire.set()
    with connected(wire) as connection:
        assert said_back(connection, b"three") == b"three"


def test_a_stalled_wire_keeps_what_it_gets_until_it_passes_again(wire):
    wire.set(stalled=True)
    with connected(wire, seconds=0.3) as connection:
        connection.sendall(b"kept")
        with pytest.raises(TimeoutError):
            connection.recv(4)
        wire.set()
        connection.settimeout(20)
        assert connection.recv(4) == b"kept"


def test_a_damaged_wire_flips_bits_and_loses_none(wire):
    wire.set(damaged=1.0)
    data = bytes(1000)
    with connected(wire) as connection:
        found = said_back(connection, data)
    assert len(found) == 1000
    assert found != data
