"""The folder in which a run is kept between its rounds, and what was spent in between.

    before a round's first message    `round`: its number, and the ledger before it
    before a sum can be known         `round`: the same, and the ledger with its entry
    after the round                   `00000007.checkpoint`: all of it

Each file is replaced as a whole and is on the disk before the run goes on
(`fedcore.durable`), so a process that is killed leaves one of these three. Two checkpoints
are kept: if the later one is damaged, the earlier one is used, and said so.

A round that was begun and is in no checkpoint was interrupted. In the world it is *lost*:
devices answer each round once, and noise is drawn once, so the run goes on with the next
number, with the model from before it, and with the ledger of `round`: a sum that may have
been known is paid for, whether or not a model came of it. In a simulation that is
*repeatable*, where everybody's randomness follows from a seed, the round is held again:
the same devices send the same bits, and what is released is what was.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from logging import getLogger
from math import inf
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from fedcore.durable import replace_file
from fedcore.errors import ConfigurationError
from fedcore.job import Job
from fedcore.privacy import PrivacyLedger, Release
from fedcore.telemetry import skipped
from strategies.checkpoint import Checkpoint
from strategies.progress import Past

log = getLogger(__name__)
FORMAT: Final = "fedcore/round/v1"
KEPT: Final = 2
"""Checkpoints in the folder."""
LOST: Final = (
    "the coordinator was stopped in this round: its model is lost, and what its sum may have "
    "shown is paid for"
)
_SUFFIX: Final = ".checkpoint"


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """Where to keep a run, and what may be done with a round that was interrupted.

    Attributes:
        path: The folder; made if it is not there.
        repeatable: Whether everybody's randomness follows from a seed: never outside of a
            simulation, since a second sum over other noise would be a second release.
    """

    path: Path
    repeatable: bool = False


@dataclass(frozen=True, slots=True)
class Begun:
    """The round that was begun last.

    Attributes:
        job: Digest of what is run.
        round_number: Its number.
        ledger: With the round's entry from the moment on at which a sum could be known.
    """

    job: str
    round_number: int
    ledger: PrivacyLedger

    def to_bytes(self) -> bytes:
        """Return what `from_bytes` reads."""
        note = _Note(FORMAT, self.job, self.round_number, self.ledger.to_json())
        return json.dumps(asdict(note)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Begun:
        """Return the note that `to_bytes` wrote.

        Raises:
            ConfigurationError: `data` is anything else.
        """
        try:
            note = TypeAdapter(_Note).validate_json(data, extra="forbid")
        except ValidationError as error:
            msg = "the note of the last round is malformed"
            raise ConfigurationError(msg) from error
        if note.format != FORMAT or note.round_number < 1:
            msg = f"the note of the last round must have the format {FORMAT}"
            raise ConfigurationError(msg)
        return cls(note.job, note.round_number, PrivacyLedger.from_json(note.ledger))


@dataclass(frozen=True, slots=True)
class _Note:
    """The file."""

    format: str
    job: str
    round_number: int
    ledger: str


def job_digest(job: Job) -> str:
    """Return what a checkpoint says of the job that it belongs to."""
    return hashlib.sha256(job.to_json().encode()).hexdigest()


@dataclass(slots=True)
class Checkpoints:
    """The folder of one run, which no other process writes meanwhile.

    Args:
        folder: Where.
        job: Digest of what is run.

    Raises:
        ConfigurationError: The folder cannot be written, or another process does.
    """

    folder: CheckpointFolder
    job: str
    _begun: Begun | None = None
    _lock: int = field(default=-1, repr=False)

    def __post_init__(self) -> None:
        path = self.folder.path
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # Of this process and not of those that it forks, which may outlive it for a moment.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            msg = (
                f"checkpoints cannot be kept in {path} ({error.strerror}): name a folder that "
                "can be written, and that no other process uses"
            )
            raise ConfigurationError(msg) from error
        self._begun = self._read_begun()

    def close(self) -> None:
        """Let another process have the folder; a second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def begun(self) -> Begun | None:
        """The round that was begun last, in this process or an earlier one."""
        return self._begun

    def latest(self) -> Checkpoint | None:
        """Return the latest checkpoint that is whole; None if there never was one.

        Raises:
            ConfigurationError: All are damaged, or they are of another job.
        """
        paths = self._paths()
        for place, path in enumerate(paths):
            try:
                checkpoint = Checkpoint.from_bytes(path.read_bytes())
            except (ConfigurationError, OSError) as error:
                log.warning("%s is not used: %s", path, error)
                continue
            if checkpoint.job != self.job:
                raise ConfigurationError(_another_job(path, checkpoint.job, self.job))
            if place:
                log.warning("going on from the one before, after round %d", checkpoint.round_number)
            return checkpoint
        if paths:
            msg = (
                f"no checkpoint in {self.folder.path} can be read, the last is {paths[0].name}: "
                "restore one from a backup, or start another run in another folder"
            )
            raise ConfigurationError(msg)
        if self._begun is not None:
            msg = (
                f"{self.folder.path} knows of round {self._begun.round_number}, but has no "
                "checkpoint: restore one from a backup, or start another run in another folder"
            )
            raise ConfigurationError(msg)
        return None

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, durably, and the one before it.

        Raises:
            ConfigurationError: It cannot be written; the earlier ones still are there.
        """
        self._write(f"{checkpoint.round_number:08}{_SUFFIX}", checkpoint.to_bytes())
        for path in self._paths()[KEPT:]:
            path.unlink(missing_ok=True)

    def note(self, round_number: int, ledger: PrivacyLedger) -> None:
        """Note that a round begins, or that its sum may be known from now on, durably.

        What was noted of a round before a repetition stays until it is noted again.

        Raises:
            ConfigurationError: It cannot be written: nothing may be sent.
        """
        last = self._begun
        same = last is not None and last.round_number == round_number
        if last is not None and same and len(last.ledger.releases) > len(ledger.releases):
            return
        begun = Begun(self.job, round_number, ledger)
        self._write("round", begun.to_bytes())
        self._begun = begun

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder.path / name
        try:
            replace_file(path, data)
        except OSError as error:
            msg = (
                f"{path} cannot be written ({error.strerror}), so the run must not go on: make "
                "room, and start again from the last checkpoint"
            )
            raise ConfigurationError(msg) from error

    def _paths(self) -> list[Path]:
        """Return the checkpoints, the latest first."""
        return sorted(self.folder.path.glob(f"*{_SUFFIX}"), reverse=True)

    def _read_begun(self) -> Begun | None:
        path = self.folder.path / "round"
        try:
            begun = Begun.from_bytes(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ConfigurationError, OSError) as error:
            msg = (
                f"{path} says what the last round has spent, and cannot be read ({error}): restore "
                "it from a backup, or start another run in another folder"
            )
            raise ConfigurationError(msg) from error
        if begun.job != self.job:
            raise ConfigurationError(_another_job(path, begun.job, self.job))
        return begun


def after_lost_rounds(
    checkpoint: Checkpoint,
    begun: Begun | None,
    example_release: Release | None,
    *,
    private: bool,
) -> Checkpoint:
    """Return where a run goes on in the world: rounds that were begun are over.

    Args:
        checkpoint: The latest one.
        begun: The round that was begun last.
        example_release: What a round's local training costs an example, if that is counted.
        private: Whether sums have noise that hides a device.
    """
    if begun is None or begun.round_number <= checkpoint.round_number:
        return checkpoint
    examples, past = checkpoint.examples, list(checkpoint.past)
    seconds = past[-1].seconds if past else 0.0
    for number in range(checkpoint.round_number + 1, begun.round_number + 1):
        if examples is not None and example_release is not None:
            examples = examples.record(replace(example_release, round_number=number))
        other = inf if examples is None else examples.epsilon
        epsilon = begun.ledger.epsilon if private else other
        report = skipped(number, 0, LOST, epsilon)
        past.append(Past(report, None, None if examples is None else examples.epsilon, seconds))
    grid = checkpoint.grid
    return replace(
        checkpoint,
        round_number=begun.round_number,
        past=tuple(past),
        ledger=begun.ledger,
        examples=examples,
        grid=None if grid is None else replace(grid, round_number=begun.round_number),
    )


def _another_job(path: Path, found: str, expected: str) -> str:
    return (
        f"{path} belongs to another job ({found[:12]}, this one is {expected[:12]}): go on with "
        "the configuration that wrote it, or start this one in another folder"
    )
