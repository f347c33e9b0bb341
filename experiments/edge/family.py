"""Forking on Linux: children that follow their parent, and what a child must not inherit."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Child:
    """A process that was forked.

    Attributes:
        pid: Its number.
        link: The way to it; ends when it ends.
    """

    pid: int
    link: socket.socket

    def end(self) -> int:
        """End it now, and with it what follows it; return its status."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.reap()

    def reap(self) -> int:
        """Wait for its end; return its exit status, or minus the signal that ended it."""
        self.link.close()
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def fork(
    work: Callable[[socket.socket], int], log: int, close: Sequence[socket.socket] = ()
) -> Child:
    """Run `work` in a new process, with a link to this one and its output in a file.

    Args:
        work: Returns an exit status.
        log: Descriptor of the file.
        close: What belongs to this process alone.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        there.close()
        return Child(pid, here)
    status = 1
    try:
        follow_parent()
        here.close()
        for mine in close:
            mine.close()
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides
        signal.set_wakeup_fd(-1)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = work(there)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001 - the process ends here, whatever it was
        import traceback  # noqa: PLC0415 - only where something went wrong

        traceback.print_exc()
    finally:
        os._exit(status)


def follow_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """End this process when its parent ends, also if that is killed; on Linux.

    Args:
        number: The signal that ends it.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, number.value)
    if os.getppid() != parent:
        os._exit(1)
