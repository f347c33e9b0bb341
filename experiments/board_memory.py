"""How much memory the processes of a board hold together, from the kernel's own books.

PSS (proportional set size) counts a page that several processes share in equal parts, so
the sum over a board's processes counts every page once:

    for p in $(pgrep -f STATE/board.json); do grep ^Pss: /proc/$p/smaps_rollup; done

Where several boards run on one machine, as in a rehearsal, they share the pages of
libraries, and each one's sum is too small. `alone` adds them back: pages of files count
once for the board, whoever else has them. It is what the board would hold by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")
_FIELDS: Final = 6
"""Of the first line of a mapping that has a file."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a process tree holds.

    Attributes:
        pss: Sum of the proportional shares, in MB of 2^20 bytes.
        alone: The same, if nobody else used the same files.
        processes: How many there are.
    """

    pss: float
    alone: float
    processes: int


def held(pid: int) -> Held:
    """Return what a process and its descendants hold at this moment."""
    pss, own, count = 0, 0, 0
    files: dict[str, int] = {}
    for member in tree(pid):
        try:
            rollup = _sizes((_PROC / str(member) / "smaps_rollup").read_text())
            text = (_PROC / str(member) / "smaps").read_text(encoding="utf-8", errors="replace")
        except OSError:  # ended meanwhile
            continue
        count += 1
        pss += rollup["Pss"]
        own += rollup["Pss_Anon"] + rollup["Pss_Shmem"]  # shared with relatives only
        for name, resident in _files(text):
            files[name] = max(files.get(name, 0), resident)
    return Held(pss / 1024, (own + sum(files.values())) / 1024, count)


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process tree, ended children included, in seconds."""
    total = 0
    for member in tree(pid):
        try:
            fields = (_PROC / str(member) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))  # utime, stime and those of children waited for
    return total / _TICKS


def tree(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    for task in (_PROC / str(pid) / "task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def _files(text: str) -> Iterator[tuple[str, int]]:
    """Yield each mapped file and how many kB of its pages are resident, copies left out."""
    name, lines = "", list[str]()
    for line in [*text.splitlines(), "end end"]:
        if " " in line.partition(":")[0]:  # addresses perms offset dev inode path
            sizes = _sizes("\n".join(lines))
            if name.startswith("/") and not name.endswith("(deleted)"):
                yield f"{name} {sizes['Size']}", sizes["Rss"] - sizes["Anonymous"]
            parts, lines = line.split(maxsplit=5), []
            name = parts[5] if len(parts) == _FIELDS else ""
        else:
            lines.append(line)


def _sizes(text: str) -> dict[str, int]:
    """Return what the lines `Name: number kB` say."""
    pairs = (line.split() for line in text.splitlines() if line.endswith(" kB"))
    return {key.rstrip(":"): int(number) for key, number, _ in pairs}
