"""What this process costs the board: its memory, and what it has loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

FOREIGN: Final = frozenset(
    {"flwr", "hydra", "jax", "onnx", "opacus", "pandas", "ray", "scipy", "sklearn", "tensorflow"}
    | {"torch"}
)
"""Packages of the training side; a device that loads one is built wrongly."""


def foreign_modules() -> list[str]:
    """Return the packages of the training side that this process has imported."""
    return sorted(FOREIGN & sys.modules.keys())


def peak_memory_mb() -> float:
    """Return the largest resident set of this process so far, in MB (10^6 bytes).

    On Linux from the kernel's record of this program; the `getrusage` counter would
    include the memory of the process that started it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        status = ""
    found = re.search(r"^VmHWM:\s*([0-9]+) kB$", status, re.MULTILINE)
    if found:
        return int(found.group(1)) * 1024 / 1e6
    import resource  # noqa: PLC0415  (does not exist on every platform)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
