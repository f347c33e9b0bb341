"""Time as an argument: real for deployments, virtual for tests.

A round loop with deadlines reads `now` and calls `sleep`, nothing else. Under
`VirtualClock` a second costs nothing and passes only when somebody sleeps, so a
test of a one-hour deadline is instant and gives the same result on every machine.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time that never runs backwards."""

    def now(self) -> float:
        """Return seconds since an arbitrary origin; only differences mean something."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Return once `seconds` have passed."""
        ...


class SystemClock:
    """The monotonic clock of the machine."""

    def now(self) -> float:
        """Return `time.monotonic()`, which no adjustment of the wall clock moves."""
        return time.monotonic()

    def sleep(self, seconds: float, /) -> None:
        """Block for `seconds`, at least 0."""
        time.sleep(seconds)


class VirtualClock:
    """A clock that stands still until someone sleeps on it.

    Example:
        >>> clock = VirtualClock()
        >>> clock.sleep(3600.0)
        >>> clock.now()
        3600.0
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """Return the start plus everything slept so far, in seconds."""
        return self._now

    def sleep(self, seconds: float, /) -> None:
        """Move time forward by `seconds`, at once.

        Raises:
            ValueError: `seconds` is negative, as for `time.sleep`.
        """
        if seconds < 0:
            msg = f"sleep length must be non-negative, got {seconds}"
            raise ValueError(msg)
        self._now += seconds
