"""What the processes of a board pass to each other: small orders, and parcels of bytes.

An order is one datagram of JSON over a socket between relatives (`socketpair`): it
arrives whole or not at all, and the end of a process is the end of its socket. A message
and its answer may be as long as a model. They lie in memory files without a name
(`memfd_create`), which travel as descriptors beside the order: no copy on a disk, no port
that anybody else could reach, no password between the processes of one board.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, TypeAlias

from fedcore.errors import LocalProtocolError

_MOST_ORDER_BYTES: Final = 16 << 10
_LENGTH_BYTES: Final = 8
Parcel: TypeAlias = Sequence[bytes]


@dataclass(frozen=True, slots=True)
class App:
    """An app that was unpacked on this board.

    Attributes:
        path: Its folder.
        identity: Its publisher and name, as its bundle says.
        version: As its bundle says.
        digest: SHA-256 of the bundle.
    """

    path: str
    identity: str
    version: str
    digest: str


@dataclass(frozen=True, slots=True)
class Task:
    """One message to answer: from the SuperNode's process to the app's.

    Attributes:
        number: Counts the tasks of one SuperNode's process.
        app: What is to answer.
    """

    number: int
    app: App


@dataclass(frozen=True, slots=True)
class Ended:
    """The way back: the process that had a task is gone.

    Attributes:
        number: Of the task.
        status: Of its end; 0 says that the answer is complete.
    """

    number: int
    status: int


@dataclass(frozen=True, slots=True)
class Connected:
    """The SuperLink has taken the node.

    Attributes:
        node: Its number.
    """

    node: int


Order: TypeAlias = Task | Ended | Connected


def send(to: socket.socket, order: Order, descriptors: Sequence[int] = ()) -> bool:
    """Send an order; tell whether there is still somebody to take it."""
    data = json.dumps({type(order).__name__: asdict(order)}).encode("utf-8")
    try:
        socket.send_fds(to, [data], list(descriptors))
    except OSError:
        return False
    return True


def receive(source: socket.socket) -> tuple[Order, list[int]] | None:
    """Return the next order and the descriptors that came with it; None at the end.

    Raises:
        LocalProtocolError: It is none: the processes do not fit together.
        TimeoutError: The socket has a time limit, and it passed.
    """
    try:
        data, descriptors, _, _ = socket.recv_fds(source, _MOST_ORDER_BYTES, 2)
    except (ConnectionError, BrokenPipeError):
        return None
    if not data:
        return None
    try:
        ((kind, values),) = json.loads(data).items()
        match kind:
            case "Task":
                return Task(values["number"], App(**values["app"])), descriptors
            case "Ended":
                return Ended(**values), descriptors
            case "Connected":
                return Connected(**values), descriptors
    except (ValueError, TypeError, KeyError, AttributeError):
        kind = "nothing readable"
    msg = f"expected a task, its end or a connection from another process, found {kind!r:.40}"
    raise LocalProtocolError(msg)


def new_file() -> int:
    """Return the descriptor of an empty memory file; it is gone with its last descriptor."""
    return os.memfd_create("fedcore", os.MFD_CLOEXEC)


def write(descriptor: int, parcel: Parcel) -> None:
    """Write a parcel into an empty memory file; its length comes last, so half is nothing."""
    head = b"".join(len(part).to_bytes(_LENGTH_BYTES, "little") for part in parcel)
    offset = 2 * _LENGTH_BYTES
    for part in (head, *parcel):
        rest = memoryview(part)
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written
    total = len(parcel).to_bytes(_LENGTH_BYTES, "little")
    os.pwrite(descriptor, offset.to_bytes(_LENGTH_BYTES, "little") + total, 0)


def read(descriptor: int) -> list[bytes]:
    """Return the parts of a parcel.

    Raises:
        LocalProtocolError: The file does not hold a whole one.
    """
    size = os.fstat(descriptor).st_size
    if size < 2 * _LENGTH_BYTES:
        msg = f"a parcel has at least {2 * _LENGTH_BYTES} bytes, found {size}: it was not finished"
        raise LocalProtocolError(msg)
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as data:
        count = _number(data, 1)
        lengths_end = (2 + count) * _LENGTH_BYTES
        if _number(data, 0) != size or lengths_end > size:
            msg = f"a parcel of {_number(data, 0)} bytes has {size}: it was not finished"
            raise LocalProtocolError(msg)
        lengths = [_number(data, 2 + index) for index in range(count)]
        if lengths_end + sum(lengths) != size:
            msg = f"the parts of a parcel of {size} bytes have {lengths_end + sum(lengths)}"
            raise LocalProtocolError(msg)
        parts, start = [], lengths_end
        for length in lengths:
            parts.append(data[start : start + length])
            start += length
        return parts


def _number(data: mmap.mmap, index: int) -> int:
    return int.from_bytes(data[index * _LENGTH_BYTES : (index + 1) * _LENGTH_BYTES], "little")
