"""Keys agreed by all cores: the same keys as one after the other, sooner.

To unmask a round in which many clients disappeared, a coordinator agrees on a key for
every pair of a lost client and a neighbour that is left: 110,000 of them for 1,000
clients of which 300 are lost, some 35 microseconds each. The library holds Python's lock
while it computes, so threads do not help; processes do. They write the keys into memory
that they share with their parent, each into a part of its own.

    parent      cuts the list, forks, does the last part itself
    children    agree and write; no other thread was inside the library when they forked,
                because whoever is holds the lock
    death       the part of a child that did not finish is done again by the parent, which
                then meets the same error, if it was one

See `fedcore.crypto.parallel` for the masks that follow from the keys.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from fedcore.crypto.agreement import KEY_BYTES, Exchange, agree_all
from fedcore.crypto.parallel import may_fork, usable_cores
from fedcore.errors import ConfigurationError, PeerProtocolError

LEAST_EXCHANGES: Final = 2_000
"""Below it one core is as fast: about 70 ms of work, of which a fork takes 5."""


class ParallelAgreement:
    """Agrees with several processes.

    Args:
        workers: Processes that compute, the caller's included; all usable cores if None.
        least_exchanges: How many of them make it worth the while.

    Raises:
        ConfigurationError: `workers` is not positive.

    Example:
        >>> from fedcore.crypto import KeyPair
        >>> pairs = [KeyPair.from_secret(bytes([i]) * 32) for i in range(1, 5)]
        >>> exchanges = [Exchange(pairs[0].secret, pair.public, b"info") for pair in pairs]
        >>> two = ParallelAgreement(2, least_exchanges=0)
        >>> two(exchanges, salt=b"salt") == agree_all(exchanges, salt=b"salt")
        True
    """

    def __init__(
        self, workers: int | None = None, *, least_exchanges: int = LEAST_EXCHANGES
    ) -> None:
        if workers is not None and workers < 1:
            msg = f"workers must be at least 1, got {workers}: pass None for all cores"
            raise ConfigurationError(msg)
        self._workers = usable_cores() if workers is None else workers
        self._least_exchanges = least_exchanges

    def __call__(self, exchanges: Sequence[Exchange], /, *, salt: bytes) -> list[bytes]:
        """Return the key of each exchange; arguments and errors of `agree_all`."""
        count = len(exchanges)
        parts = _parts(count, self._workers)
        if len(parts) < 2 or count < self._least_exchanges or not may_fork():
            return agree_all(exchanges, salt=salt)
        with mmap.mmap(-1, count * KEY_BYTES) as memory:
            lost = _agree_forked(memory, exchanges, parts, salt)
            for part in lost:
                _write(memory, exchanges, part, salt)
            keys = memory.read()
        return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def _parts(count: int, workers: int) -> list[slice]:
    """Cut a list of `count` into at most `workers` parts of equal length, or one less."""
    edges = [index * count // workers for index in range(workers + 1)]
    return [slice(*edge) for edge in pairwise(edges) if edge[0] < edge[1]]


def _write(memory: mmap.mmap, exchanges: Sequence[Exchange], part: slice, salt: bytes) -> None:
    keys = b"".join(agree_all(exchanges[part], salt=salt))
    memory[part.start * KEY_BYTES : part.stop * KEY_BYTES] = keys


def _in_child(memory: mmap.mmap, exchanges: Sequence[Exchange], part: slice, salt: bytes) -> None:
    try:
        _write(memory, exchanges, part, salt)
    except PeerProtocolError:
        os._exit(1)  # the parent meets it again and raises it


def _agree_forked(
    memory: mmap.mmap, exchanges: Sequence[Exchange], parts: Sequence[slice], salt: bytes
) -> list[slice]:
    """Do every part but the last in a child; return the parts whose child did not finish."""
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_in_child, args=(memory, exchanges, part, salt), daemon=True)
        for part in parts[:-1]
    ]
    try:
        for child in children:
            child.start()
        _write(memory, exchanges, parts[-1], salt)
        for child in children:
            child.join()
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
                child.join()
    return [part for part, child in zip(parts, children, strict=False) if child.exitcode != 0]
