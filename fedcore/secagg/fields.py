"""Fixed-width fields: the vocabulary that wire messages and stored states share."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from fedcore.errors import PeerProtocolError
from fedcore.secagg.plan import MOST_CLIENTS

_U32: Final = struct.Struct("<I")
T = TypeVar("T")


def write_u32(value: int) -> bytes:
    """Return four little-endian bytes."""
    return _U32.pack(value)


def write_map(entries: Mapping[int, bytes]) -> bytes:
    """Return the count, then each peer with its bytes, by increasing peer."""
    parts = [_U32.pack(len(entries))]
    parts += [_U32.pack(peer) + entries[peer] for peer in sorted(entries)]
    return b"".join(parts)


def write_set(clients: Iterable[int]) -> bytes:
    """Return the count, then each peer in increasing order."""
    return write_map(dict.fromkeys(clients, b""))


@dataclass(slots=True)
class Reader:
    """A cursor over untrusted bytes; every method raises `PeerProtocolError` or returns."""

    data: bytes
    offset: int = 0

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        part = self.data[self.offset : self.offset + size]
        if len(part) != size:
            msg = f"expected {size} more bytes at offset {self.offset}, found {len(part)}"
            raise PeerProtocolError(msg)
        self.offset += size
        return part

    def rest(self) -> memoryview:
        """Return all bytes that are left, without a copy: they may be a whole vector."""
        start, self.offset = self.offset, len(self.data)
        return memoryview(self.data)[start:]

    def end(self, what: str) -> None:
        """Check that nothing is left of `what`."""
        if self.offset != len(self.data):
            msg = f"{what} ends after {self.offset} bytes, found {len(self.data)}"
            raise PeerProtocolError(msg)

    def u32(self) -> int:
        """Return the next unsigned integer of four bytes."""
        return int(_U32.unpack(self.take(_U32.size))[0])

    def map(self, value: Callable[[], T]) -> dict[int, T]:
        """Return the next map, each of its values read by `value`."""
        count, last = self.u32(), -1
        entries: dict[int, T] = {}
        for _ in range(count):
            peer = self.u32()
            if not last < peer < MOST_CLIENTS:
                msg = f"peers must increase strictly and stay below {MOST_CLIENTS}, found {peer}"
                raise PeerProtocolError(msg)
            entries[peer] = value()
            last = peer
        return entries

    def bytes_map(self, size: int) -> dict[int, bytes]:
        """Return the next map, each of its values `size` bytes."""
        return self.map(lambda: self.take(size))
