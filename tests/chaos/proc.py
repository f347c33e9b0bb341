"""Processes by way of /proc: who started whom, and how it was called."""

import os
from contextlib import suppress
from pathlib import Path


def tree(pid: int) -> list[int]:
    """Return a process and all that it started and that still live, itself first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            parent, state = _parent_and_state(int(entry.name))
            if state not in {"Z", ""}:
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid] if _parent_and_state(pid)[1] not in {"Z", ""} else []
    while waiting:
        found.append(waiting.pop(0))
        waiting += sorted(children.get(found[-1], []))
    return found


def command_line(pid: int) -> str:
    """Return how a process was called; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def send(pids: list[int], number: int) -> int:
    """Send a signal to those that still live; return to how many."""
    sent = 0
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, number)
            sent += 1
    return sent


def _parent_and_state(pid: int) -> tuple[int, str]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return int(fields[1]), fields[0]
