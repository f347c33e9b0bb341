"""A function in a process of its own, so that its memory is its own.

The high-water mark of a process never falls, and a forked child starts with its
parent's. A spawned one starts with its imports; `Memory` counts from there.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class Memory:
    """What this process held at some moment.

    Attributes:
        resident: Bytes.
    """

    resident: int

    @classmethod
    def now(cls) -> Memory:
        """Return the present state."""
        return cls(_status("VmRSS"))

    def growth(self) -> int:
        """Return by how many bytes the highest mark since the start lies above this state."""
        return max(0, _status("VmHWM") - self.resident)


def apart(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what `function` returns in a new process; it must be importable by name.

    Raises:
        RuntimeError: It failed; its own traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, args, kwargs))
    process.start()
    theirs.close()
    try:
        result: R = ours.recv()
    except EOFError:
        process.join()
        name = getattr(function, "__name__", "a measurement")
        msg = f"{name} ended with exit status {process.exitcode} in a process of its own"
        raise RuntimeError(msg) from None
    process.join()
    return result


def _serve(
    pipe: Connection,
    function: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    pipe.send(function(*args, **kwargs))


def _status(field: str) -> int:
    """Return a field of the kernel's report; where there is none, the high-water mark."""
    if not _STATUS.exists():
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    line = next(x for x in _STATUS.read_text("ascii").splitlines() if x.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])
