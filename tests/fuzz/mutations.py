"""Descendants of valid inputs that are almost valid themselves.

Random bytes die at the first check. What gets further differs from a real message in one
or two places, and in ways that its structure suggests:

    bytes     a bit, a byte, a slice; cut, extended, spliced with a relative
    fields    an integer of 1, 2, 4 or 8 bytes that lies: off by one, an edge, huge
    sections  a map's entry, say, that is there twice, missing, moved or a relative's
    tokens    the same for JSON: a value of another type, a number beyond every range,
              a key that is there twice, brackets without end

The choices come from one `random.Random`, so a seed names a whole campaign.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

EDGES = (
    *(0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 65_519, 65_520, 65_521, 1 << 16),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
)
WIDTHS = (1, 2, 4, 4, 4, 8)
SECTIONS = (1, 2, 4, 8, 16, 32, 36, 40, 64, 68, 80, 88, 92, 96, 130)
"""Keys, shares, boxes, signatures, and the entries of maps of them."""
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[\[\]{}:,]')
SPOILS = (
    *(b"0", b"-1", b"-0", b"-0.0", b"1.0", b"0.5", b"1e999", b"-1e999", b"1e-400", b"NaN"),
    *(b"Infinity", b"-Infinity", b"null", b"true", b"false", b'""', b'"\\ud800"', b'"\\u0000"'),
    *(b'"inf"', b'"nan"', b'"1"', b"[]", b"{}", b"[[]]", b'{"a":1}', b"1e308", b"4.9e-324"),
    *(b"2147483648", b"9223372036854775808", b"18446744073709551616", b"9" * 400, b"9" * 5000),
    *(b"[" * 3000, b'{"a":' * 3000, b'"' + b"a" * 1000 + b'"', b"\xff\xfe", b"\xed\xa0\x80"),
)

Random = random.Random
Change = Callable[[Random, bytearray, bytes], None]


def descendants(
    corpus: Sequence[bytes],
    donors: Sequence[bytes],
    count: int,
    rng: Random,
    *,
    text: bool = False,
) -> Iterator[bytes]:
    """Yield `count` inputs, each one to three changes away from one of `corpus`.

    Args:
        corpus: What is changed.
        donors: Whose parts may take the place of its own.
        count: How many.
        rng: Makes every choice.
        text: Whether the inputs are JSON.
    """
    changes = (*CHANGES_OF_TEXT, *CHANGES_OF_TEXT, *CHANGES) if text else CHANGES
    for _ in range(count):
        data, donor = bytearray(rng.choice(corpus)), rng.choice(donors)
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            rng.choice(changes)(rng, data, donor)
        yield bytes(data)


def _flip(rng: Random, data: bytearray, donor: bytes) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _byte(rng: Random, data: bytearray, donor: bytes) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.randrange(256)


def _lie(rng: Random, data: bytearray, donor: bytes) -> None:
    """Let an integer be an edge of some range."""
    at, width = _at(rng, data), rng.choice(WIDTHS)
    data[at : at + width] = (rng.choice(EDGES) & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def _off_by_some(rng: Random, data: bytearray, donor: bytes) -> None:
    """Let an integer, a count perhaps, be a little more or less than it should."""
    at, width = _at(rng, data), rng.choice(WIDTHS)
    value = int.from_bytes(data[at : at + width], "little") + rng.choice((-2, -1, 1, 2, 255))
    data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def _cut(rng: Random, data: bytearray, donor: bytes) -> None:
    del data[_at(rng, data) :]


def _extend(rng: Random, data: bytearray, donor: bytes) -> None:
    data += rng.randbytes(rng.choice(SECTIONS))


def _drop(rng: Random, data: bytearray, donor: bytes) -> None:
    at = _at(rng, data)
    del data[at : at + rng.choice(SECTIONS)]


def _repeat(rng: Random, data: bytearray, donor: bytes) -> None:
    at, size = _at(rng, data), rng.choice(SECTIONS)
    section = data[at : at + size]
    to = at + size if rng.random() < 0.5 else _at(rng, data)
    data[to:to] = section * rng.choice((1, 1, 2, 50))


def _swap(rng: Random, data: bytearray, donor: bytes) -> None:
    size = rng.choice(SECTIONS)
    if len(data) >= 2 * size:
        first = rng.randrange(len(data) - 2 * size + 1)
        second = rng.randrange(first + size, len(data) - size + 1)
        one, other = data[first : first + size], data[second : second + size]
        data[first : first + size], data[second : second + size] = other, one


def _splice(rng: Random, data: bytearray, donor: bytes) -> None:
    at = _at(rng, data)
    data[at:] = donor[at if rng.random() < 0.5 else _at(rng, donor) :]


def _graft(rng: Random, data: bytearray, donor: bytes) -> None:
    size = rng.choice(SECTIONS)
    start, at = _at(rng, donor), _at(rng, data)
    data[at : at + size] = donor[start : start + size]


def _fill(rng: Random, data: bytearray, donor: bytes) -> None:
    at, size = _at(rng, data), rng.choice(SECTIONS)
    fillings = (bytes(size), b"\xff" * size, rng.randbytes(size))
    data[at : at + size] = rng.choice(fillings)[: len(data) - at]


def _noise(rng: Random, data: bytearray, donor: bytes) -> None:
    """Keep a header at most."""
    keep = rng.choice((0, 1, 2, 4, 36))
    data[keep:] = rng.randbytes(rng.choice((0, 1, 3, 31, 32, 64, 100, len(data))))


def _at(rng: Random, data: bytes | bytearray) -> int:
    """Return a place; every other time one where a word may start."""
    at = rng.randrange(len(data) + 1)
    return at & ~3 if rng.random() < 0.5 else at


CHANGES: tuple[Change, ...] = (
    *(_flip, _byte, _lie, _off_by_some, _cut, _extend, _drop, _repeat, _swap),
    *(_splice, _graft, _fill, _noise),
)


def _spoil(rng: Random, data: bytearray, donor: bytes) -> None:
    """Put another value where a token was."""
    start, end = _token(rng, bytes(data))
    data[start:end] = rng.choice(SPOILS)


def _exchange(rng: Random, data: bytearray, donor: bytes) -> None:
    """Put a token of a relative, or of another place, where a token was."""
    start, end = _token(rng, bytes(data))
    other, stop = _token(rng, donor)
    data[start:end] = donor[other:stop]


def _omit(rng: Random, data: bytearray, donor: bytes) -> None:
    start, end = _token(rng, bytes(data))
    del data[start:end]


def _stutter(rng: Random, data: bytearray, donor: bytes) -> None:
    """Let a run of tokens, an entry with its key perhaps, be there twice."""
    spans = _tokens(bytes(data))
    if spans:
        first = rng.randrange(len(spans))
        last = min(first + rng.choice((0, 1, 2, 3, 7)), len(spans) - 1)
        section = bytes(data[spans[first][0] : spans[last][1]])
        to = spans[last][1]
        data[to:to] = rng.choice((b"", b",")) + section


CHANGES_OF_TEXT: tuple[Change, ...] = (_spoil, _spoil, _exchange, _omit, _stutter)


def _token(rng: Random, data: bytes) -> tuple[int, int]:
    spans = _tokens(data)
    return rng.choice(spans) if spans else (len(data), len(data))


@lru_cache(maxsize=256)
def _tokens(data: bytes) -> list[tuple[int, int]]:
    return [match.span() for match in TOKEN.finditer(data)]
