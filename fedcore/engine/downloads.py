"""Replies of a SuperLink, each downloaded by itself, so that none waits for another.

A device announces a reply before it uploads the parts of it. Flower's grid takes announced
replies one after the other and waits for the parts of each: three minutes for a device that
died in between, longer for one that is slow on purpose. What the others have sent waits
behind it, past every deadline, and one device is enough to spoil a round for all.

    pull_messages(ids)    asks what is announced, starts a download of each, in a thread
                          returns what is whole by now; the rest comes with a later call

How much is held at a time stays bounded: nothing more is asked for while as many downloads
are going on. One that has stalled counts no more: each holds its own reply at most.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from flwr.app import Message
from flwr.serverapp import Grid

from fedcore.engine.flower_private import announced_replies, is_networked
from fedcore.engine.wrapped import WrappedGrid

AT_ONCE: Final = 16
PROMPT_SECONDS: Final = 0.5
"""How long a call waits for what was just announced: most of it is there already."""
STALLED_SECONDS: Final = 5.0
ABANDONED_SECONDS: Final = 300.0
"""After which a reply that nobody asks for is dropped; who waits for one asks all the time."""


def unblocked_for_good(grid: Grid) -> Grid:
    """Return a grid whose replies do not wait for each other; the same if they never do."""
    return UnblockedGrid(grid) if is_networked(grid) else grid


@contextmanager
def unblocked(grid: Grid) -> Iterator[Grid]:
    """Let replies not wait for each other inside of a block; wait for none after it."""
    found = unblocked_for_good(grid)
    try:
        yield found
    finally:
        if isinstance(found, UnblockedGrid):
            found.close()


@dataclass(slots=True)
class _Download:
    """One announced reply.

    Attributes:
        fetch: Returns it when all of it is there, or an error in its place; does not raise.
        began: When it was announced, by `time.monotonic`.
        ready: Set when `reply` is.
    """

    fetch: Callable[[], Message]
    began: float
    ready: threading.Event = field(default_factory=threading.Event)
    reply: Message | None = None

    def run(self) -> None:
        """Fetch it."""
        self.reply = self.fetch()
        self.ready.set()


class UnblockedGrid(WrappedGrid):
    """Hands over each reply as soon as all of it is there.

    Args:
        grid: Flower's, over a network.
        now: Tells the time in seconds.
    """

    def __init__(self, grid: Grid, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(grid)
        self._now = now
        self._downloads: dict[str, _Download] = {}
        self._closed = threading.Event()

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages that are whole by now.

        Args:
            message_ids: Of the messages that are asked about.
        """
        wanted = set(message_ids)
        self._drop_abandoned(wanted)
        going_on = [one for one in self._downloads.values() if not self._stalled(one)]
        asked = wanted - self._downloads.keys()
        if asked and len(going_on) < AT_ONCE:
            started = [
                self._start(*one) for one in announced_replies(self._grid, asked, self._closed)
            ]
            deadline = self._now() + PROMPT_SECONDS
            for download in started:
                download.ready.wait(max(deadline - self._now(), 0.0))
        found = [key for key in wanted & self._downloads.keys() if self._downloads[key].reply]
        return [reply for key in found if (reply := self._downloads.pop(key).reply) is not None]

    def close(self) -> None:
        """Wait for nothing any more: what is not there by now would hold up the process's end."""
        self._closed.set()

    def _start(self, message_id: str, fetch: Callable[[], Message]) -> _Download:
        """Download one reply, in a thread that keeps no process alive."""
        download = self._downloads[message_id] = _Download(fetch, self._now())
        threading.Thread(target=download.run, name=f"reply {message_id}", daemon=True).start()
        return download

    def _stalled(self, download: _Download) -> bool:
        return not download.ready.is_set() and self._now() >= download.began + STALLED_SECONDS

    def _drop_abandoned(self, wanted: set[str]) -> None:
        for key, download in list(self._downloads.items()):
            old = self._now() >= download.began + ABANDONED_SECONDS
            if old and key not in wanted and download.ready.is_set():
                del self._downloads[key]
