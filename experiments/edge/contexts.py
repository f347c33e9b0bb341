"""What apps leave for their next message, kept where a power cut does not reach it.

Flower keeps a Context in the memory of the SuperNode. Between two stages of a round it holds
the keys of the protocol; without it, a device that was restarted is out of the round, and
its error feedback and its last answer are gone. Here it is on the disk before the answer
leaves, sealed (`fedcore.sealed`), one file for each series of runs.

An older Context is no way to make a device answer twice: the journal of answers is on the
disk too, and is written before the Context (`clients.journal`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore.errors import ConfigurationError
from fedcore.sealed import BrokenSealError, Seal

FOLDER: Final = "contexts"
KEPT: Final = 8
"""Series of runs; the one that was answered longest ago is forgotten first."""
KEPT_DAYS: Final = 30
_DAY: Final = 24 * 3600


@dataclass(frozen=True, slots=True)
class Contexts:
    """The Contexts of one device.

    Attributes:
        folder: For them alone; made by the first one.
        seal: The device's key for its files.
    """

    folder: Path
    seal: Seal

    def load(self, series: int, say: Callable[[str], None]) -> bytes | None:
        """Return the last Context of a series; None for none, or one that does not open.

        Args:
            series: Of runs, as the SuperLink counts them.
            say: Takes the reason why one does not open. The device goes on without it, as
                after a restart of Flower's SuperNode.
        """
        path = self._path(series)
        try:
            return self.seal.open(_name(series), path.read_bytes())
        except FileNotFoundError:
            return None
        except (BrokenSealError, OSError) as error:
            say(f"{path} is left out: {error}")
            return None

    def save(self, series: int, context: bytes) -> None:
        """Keep a Context durably.

        Raises:
            ConfigurationError: It cannot be written; nothing may be answered.
        """
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self.seal.write(self._path(series), _name(series), context)
        except OSError as error:
            msg = (
                f"the Context cannot be kept in {self.folder} ({error.strerror}), so nothing may "
                "be answered: give the device a writable folder on a disk with room"
            )
            raise ConfigurationError(msg) from error

    def clean(self, now: float) -> None:
        """Remove what is old, what is too many, and what a crash has left half-written.

        Args:
            now: Unix time in seconds.
        """
        if not self.folder.is_dir():
            return
        for path in self.folder.glob("*.new"):
            path.unlink(missing_ok=True)
        newest = sorted(
            ((path.stat().st_mtime, path) for path in self.folder.iterdir()), reverse=True
        )
        for index, (written, path) in enumerate(newest):
            if index >= KEPT or now - written > KEPT_DAYS * _DAY:
                path.unlink(missing_ok=True)

    def _path(self, series: int) -> Path:
        return self.folder / str(series)


def _name(series: int) -> str:
    return f"contexts of series {series}"
