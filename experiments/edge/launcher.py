"""The first process of a board: has Flower imported, forks the others, restarts them.

    launcher --.-- SuperNode's process       as long as the board runs     `node`
               '-- app's process             while messages come           `zygote`
                     '-- a process for each message

What is imported before a fork is in memory once, for all of them. The launcher never
imports an app, starts no thread, and reads nothing that comes from the network.

The app's process is ended some time after its last message, and with it torch and the
model: an idle board holds Flower's client and no more. A SuperNode that ended is started
again, after a pause that doubles, and finds the app as it was: a link that comes and goes
does not cost its imports. One that the SuperLink refuses is an error that somebody has to
look at.
"""

from __future__ import annotations

import gc
import os
import random
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from experiments.edge.family import Child, fork
from experiments.edge.node import REFUSED, run_node, say
from experiments.edge.pace import Patience
from experiments.edge.parcels import App, Connected, Ended, Task, receive, send
from experiments.edge.settings import Settings
from experiments.edge.zygote import keep_warm

Node = Callable[[Settings, socket.socket], int]
Answer = Callable[[App, socket.socket, Callable[[str], None]], int]
STOP_SECONDS: Final = 20.0
"""For the SuperNode to take its leave."""
_RESTART: Final = Patience(first=1.0, longest=60.0)
_TAIL_BYTES: Final = 4096
_TAIL_LINES: Final = 8


@dataclass(slots=True)
class Launcher:
    """The processes of a board.

    Attributes:
        settings: Of the board.
        tell: Takes what its owner should know.
        node: What the SuperNode's process does.
        answer: What an app's process does.
        now: A clock in seconds.
    """

    settings: Settings
    tell: Callable[[str], None]
    node: Node = run_node
    answer: Answer = keep_warm
    now: Callable[[], float] = time.monotonic
    _log: int = -1
    _supernode: Child | None = None
    _zygote: Child | None = None
    _app: App | None = None
    _task: int | None = None
    _last: float = 0.0
    _failures: int = 0
    _restart_at: float = 0.0
    _stopping: bool = False
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def run(self) -> int:
        """Keep the board running until SIGINT or SIGTERM; return the exit status."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._log = os.open(self.settings.log, flags, 0o600)
        waker, waking = socket.socketpair()
        for end in (waker, waking):
            end.settimeout(0)
        handlers = {
            number: signal.signal(number, self._ask_to_stop)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        signal.set_wakeup_fd(waking.fileno())
        self._selector.register(waker, selectors.EVENT_READ)
        try:
            while not self._stopping:
                if self._supernode is None and self.now() >= self._restart_at:
                    self._start_supernode()
                for key, _ in self._selector.select(self.timeout()):
                    if key.fileobj is waker:
                        waker.recv(64)
                    elif (status := self._hear(key.fileobj)) is not None:
                        return status
                self.end_idle()
            self.tell("stopped")
            return 0
        finally:
            self._end_all()
            signal.set_wakeup_fd(-1)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self._selector.close()
            waker.close()
            waking.close()
            os.close(self._log)

    def timeout(self) -> float | None:
        """Return how long nothing has to be done, in seconds; None for as long as it likes."""
        due = []
        if self._supernode is None:
            due.append(self._restart_at)
        if self._zygote is not None and self._task is None:
            due.append(self._last + self.settings.warm_seconds)
        return max(0.0, min(due) - self.now()) if due else None

    def end_idle(self) -> None:
        """End the app's process if it has had nothing to do for long enough."""
        idle = self._zygote is not None and self._task is None
        if idle and self.now() >= self._last + self.settings.warm_seconds:
            self._end_zygote()

    def _ask_to_stop(self, *_: object) -> None:
        self._stopping = True

    def _start_supernode(self) -> None:
        gc.collect()
        gc.freeze()  # so that no collection in a child copies what all share
        others = [] if self._zygote is None else [self._zygote.link]
        self._supernode = fork(partial(self.node, self.settings), self._log, others)
        self._selector.register(self._supernode.link, selectors.EVENT_READ)

    def _hear(self, link: object) -> int | None:
        """Deal with one order, or with the end of a process; a status ends the board."""
        if self._supernode is not None and link is self._supernode.link:
            return self._hear_supernode(self._supernode)
        if self._zygote is not None and link is self._zygote.link:
            self._hear_zygote(self._zygote)
        return None

    def _hear_supernode(self, supernode: Child) -> int | None:
        order = receive(supernode.link)
        if order is None:
            return self._supernode_ended(supernode)
        what, descriptors = order
        if isinstance(what, Connected):
            self._failures = 0
            self.tell(f"connected to {self.settings.superlink}, logs in {self.settings.state}")
        elif isinstance(what, Task):
            if self._zygote is None or self._app != what.app:
                self._start_zygote(what.app, supernode)
            self._task = what.number
            if self._zygote is not None:  # if it just died, its link says so next
                send(self._zygote.link, what, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def _supernode_ended(self, supernode: Child) -> int | None:
        self._selector.unregister(supernode.link)
        status = supernode.reap()
        self._supernode = None
        if self._task is not None:  # nobody is left to take its answer
            self._end_zygote()
        if status == REFUSED:
            self.tell(f"error: supernode ended with status {status}: {self._tail()}")
            return 1
        self._failures += 1
        seconds = _RESTART.wait(self._failures, random.random())  # noqa: S311 - only spreads
        self._restart_at = self.now() + seconds
        self.tell(f"supernode ended with status {status}: again in {seconds:.0f} s")
        return None

    def _start_zygote(self, app: App, supernode: Child) -> None:
        self._end_zygote()
        work = partial(_work, self.answer, app)
        self._zygote, self._app = fork(work, self._log, [supernode.link]), app
        self._selector.register(self._zygote.link, selectors.EVENT_READ)

    def _hear_zygote(self, zygote: Child) -> None:
        order = receive(zygote.link)
        if order is None:
            self._selector.unregister(zygote.link)
            status, self._zygote = zygote.reap(), None
            self._pass_on(status or 1)  # a task that it took is not answered
        elif isinstance(order[0], Ended) and order[0].number == self._task:
            self._pass_on(order[0].status)

    def _pass_on(self, status: int) -> None:
        """Tell the SuperNode how its task ended, if it has one."""
        self._last = self.now()
        if self._task is not None and self._supernode is not None:
            number, self._task = self._task, None
            send(self._supernode.link, Ended(number, status))

    def _end_zygote(self) -> None:
        if self._zygote is not None:
            self._selector.unregister(self._zygote.link)
            self._zygote.end()
        self._zygote = self._task = None

    def _end_all(self) -> None:
        self._end_zygote()
        if self._supernode is None:
            return
        os.kill(self._supernode.pid, signal.SIGTERM)
        self._supernode.link.settimeout(STOP_SECONDS)
        try:
            while receive(self._supernode.link) is not None:
                pass
        except TimeoutError:
            pass
        self._supernode.end()

    def _tail(self) -> str:
        """Return the last lines of the log as one."""
        data = Path(self.settings.log).read_bytes()[-_TAIL_BYTES:].decode("utf-8", "replace")
        lines = [line.strip() for line in data.splitlines() if line.strip()]
        return " / ".join(lines[-_TAIL_LINES:]) or "it said nothing"


def _work(answer: Answer, app: App, link: socket.socket) -> int:
    return answer(app, link, say)
