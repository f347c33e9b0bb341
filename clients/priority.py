"""A device's own work goes first: how a node lowers what its training may take.

A node configuration sets `nice`, 0 to 19, and `oom-score`, 0 to 1000. Linux derives the
priority of input and output from the niceness where none is set [IOPRIO], so that one
number lowers both. The score makes the kernel end this process before others when memory
runs out; the coordinator then sees a lost client. Both hold for the process, are set
before each training and are only ever raised: nobody needs a privilege for that.

[IOPRIO] https://man7.org/linux/man-pages/man2/ioprio_set.2.html (I/O priority 4 + nice / 5)
[OOM]    https://man7.org/linux/man-pages/man5/proc_pid_oom_score_adj.5.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore.errors import ConfigurationError

_SCORE: Final = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True, slots=True)
class Priority:
    """How far a process stands back.

    Attributes:
        nice: Niceness at least, 0..19.
        oom_score: Adjustment of the kernel's badness score at least, 0..1000.
    """

    nice: int = 0
    oom_score: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        for key, value, most in (("nice", self.nice, 19), ("oom-score", self.oom_score, 1000)):
            if type(value) is not int or not 0 <= value <= most:
                msg = f"{key} must be a whole number in [0, {most}], got {value!r:.40}"
                raise ConfigurationError(msg)

    def take(self, score: Path = _SCORE) -> None:
        """Lower the priority of this process to this one, where it is higher.

        Args:
            score: Of this process; written only if it must be raised.

        Raises:
            ConfigurationError: The score cannot be read or written.
        """
        if os.getpriority(os.PRIO_PROCESS, 0) < self.nice:
            os.setpriority(os.PRIO_PROCESS, 0, self.nice)
        if not self.oom_score:
            return
        try:
            if int(score.read_text(encoding="ascii")) < self.oom_score:
                score.write_text(str(self.oom_score), encoding="ascii")
        except (OSError, ValueError) as error:
            msg = f"oom-score needs {score}, which says {error}: leave oom-score out"
            raise ConfigurationError(msg) from error


def priority_of(config: Mapping[str, object]) -> Priority:
    """Return the priority that a node configuration sets; by default no change.

    Raises:
        ConfigurationError: A value is no whole number in its range.
    """
    return Priority(config.get("nice", 0), config.get("oom-score", 0))  # type: ignore[arg-type]
