"""Masks added by all cores: the same result as `add_masks`, sooner.

The cipher holds Python's lock, so threads do not help; processes do. The vector lies
in anonymous shared memory and is cut into one part per core. Every part needs all
streams, each from its own counter on, and no two parts share an element: nothing is
sent, nothing is locked, and the memory is that of one more vector.

    parent      opens the streams of every part, forks, does the last part itself
    children    advance ciphers that exist already and add; they open, import and
                allocate nothing that another thread could have held when they forked
    death       the part of a child that did not finish is done again by the parent

Forking pays from some tenths of a second of work on; below, and where processes
cannot fork, the work is done here. [RFC 3686] is the counter mode that makes every
part of a stream reachable at once.

[RFC 3686] https://www.rfc-editor.org/rfc/rfc3686
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from fedcore.crypto.streams import (
    MASKS_AT_ONCE,
    Mask,
    OpenStream,
    add_masks,
    check_elements,
    check_seeds,
    fold_masks,
    fold_streams,
    open_streams,
)
from fedcore.errors import ConfigurationError
from fedcore.ring import Ring
from fedcore.vectors import RingVector

LEAST_BYTES: Final = 1 << 27
"""Key stream below which one core is as fast: about 20 ms of it, of which a fork takes 5."""
_ALIGNMENT: Final = 1 << 12
"""Parts start at whole pages; that is at whole cipher blocks, too."""


class ParallelMasks:
    """Adds masks with several processes.

    Args:
        workers: Processes that compute, the caller's included; all usable cores if None.
        least_bytes: Key stream from which on they are used.

    Raises:
        ConfigurationError: `workers` is not positive.

    Example:
        >>> ring = Ring(16)
        >>> masks = [Mask(bytes([i]) * 32) for i in range(4)]
        >>> one, two = add_masks(ring.zeros(9), masks, ring), ParallelMasks(2)
        >>> bool((two(ring.zeros(9), masks, ring) == one).all())
        True
    """

    def __init__(self, workers: int | None = None, *, least_bytes: int = LEAST_BYTES) -> None:
        if workers is not None and workers < 1:
            msg = f"workers must be at least 1, got {workers}: pass None for all cores"
            raise ConfigurationError(msg)
        self._workers = usable_cores() if workers is None else workers
        self._least_bytes = least_bytes

    def __call__(self, x: RingVector, masks: Iterable[Mask], ring: Ring, /) -> RingVector:
        """Return `x` plus the signed key streams, reduced; arguments and errors of `add_masks`."""
        check_elements(x, ring)
        listed = check_seeds(masks)
        parts = _parts(x, self._workers)
        work = x.nbytes * len(listed)
        if len(parts) < 2 or work < max(self._least_bytes, 1) or not may_fork():
            return add_masks(x, listed, ring)
        total = np.frombuffer(mmap.mmap(-1, x.nbytes), x.dtype)
        np.copyto(total, x)
        for start in range(0, len(listed), MASKS_AT_ONCE):
            stop = start + MASKS_AT_ONCE
            streams = [open_streams(listed[start:stop], p.start * x.itemsize) for p in parts]
            for part in _fold_forked(total, parts, streams, ring):
                total[part] = x[part]
                fold_masks(total[part], listed[:stop], ring, part.start * x.itemsize)
        return total


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def may_fork() -> bool:
    """Whether children are possible: not on Windows, and not inside a daemon process."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return False
    return not multiprocessing.current_process().daemon


def _parts(x: RingVector, count: int) -> list[slice]:
    """Cut `x` into at most `count` parts of whole pages; the last may be shorter."""
    page = _ALIGNMENT // x.itemsize
    step = max(-(-len(x) // (count * page)), 1) * page
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def _fold_forked(
    total: RingVector, parts: Sequence[slice], streams: Sequence[list[OpenStream]], ring: Ring
) -> list[slice]:
    """Fold every part but the last in a child; return the parts whose child did not finish."""
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=fold_streams, args=(total[part], part_streams, ring), daemon=True)
        for part, part_streams in zip(parts[:-1], streams, strict=False)
    ]
    try:
        for child in children:
            child.start()
        fold_streams(total[parts[-1]], streams[-1], ring)
        for child in children:
            child.join()
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
                child.join()
    return [part for part, child in zip(parts, children, strict=False) if child.exitcode != 0]
