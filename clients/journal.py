"""What this device has answered, on disk: the memory that a restart must not lose.

A device that answers the same attempt twice can be unmasked, however good the masks
are: two answers to two lists of survivors open both secrets of a peer. A state in
memory is gone after a crash, and one in a backup comes back. So the device notes an
answer before it gives it:

    claim > file on disk > answer leaves        a crash in between costs one answer

Answers of a run are ordered by (round, attempt, stage), and one is claimed only if it
is later than every claim before it. That keeps the journal to one line a run. Runs are
never forgotten: a journal that is full refuses new runs.

The file is replaced as a whole (`fedcore.durable`), so a process that is killed leaves
the old or the new one. It carries a hash of itself, and is sealed where the node's
configuration names a `state-key` (`clients.at_rest`): a damaged journal, or another
device's, refuses everything until somebody has looked at it. A lock beside it keeps two
processes of one device from claiming the same answer.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

from flwr.app import Context

from clients.at_rest import seal_of
from clients.participation import Spacing
from fedcore.durable import beside, open_private, replace_file
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.sealed import OVERHEAD, Seal

MOST_RUNS: Final = 4096
MOST_ID_BYTES: Final = 128
SEALED_AS: Final = "answers"
_FORMAT: Final = "fedcore answers 1"
_LIMIT: Final = 1 << 48
"""As in a round plan; every smaller number is exact in JSON."""
_MOST_BYTES: Final = MOST_RUNS * (6 * MOST_ID_BYTES + 64) + 1024
"""More than the longest journal takes, however its names are escaped."""


@dataclass(frozen=True, slots=True, order=True)
class Answer:
    """One answer of a device; a later one compares greater.

    Attributes:
        round_number: 1-based.
        attempt: 1-based.
        stage: Counts the messages of one attempt; 0 where an attempt is claimed as a whole.
        taken: How many rounds of the run were answered, this one included; the journal
            counts it.
    """

    round_number: int
    attempt: int
    stage: int = 0
    taken: int = field(default=1, compare=False)

    def __str__(self) -> str:
        return f"round {self.round_number}, attempt {self.attempt}, stage {self.stage}"


@dataclass(frozen=True, slots=True)
class AnsweredJournal:
    """The answers of one device.

    Attributes:
        path: The file; made by the first claim. Its folder must exist, and belongs on a
            disk that is not restored from backups without also retiring the identity.
        seal: The device's key for its files; None writes in the clear.

    Example:
        >>> from tempfile import mkdtemp
        >>> journal = AnsweredJournal(Path(mkdtemp()) / "answers")
        >>> journal.claim("run-1", Answer(round_number=3, attempt=1))
        >>> journal.claim("run-1", Answer(round_number=3, attempt=1))
        Traceback (most recent call last):
        ...
        fedcore.errors.PeerProtocolError: this device answered run 'run-1' up to round 3, \
attempt 1, stage 0 and answers later ones only, asked for round 3, attempt 1, stage 0
    """

    path: Path
    seal: Seal | None = None

    def claim(self, run_id: str, answer: Answer, spacing: Spacing | None = None) -> None:
        """Note `answer` durably; only then may it be given.

        Raises:
            PeerProtocolError: It was claimed before, or a later one was, or it cannot be one, or
                `spacing` leaves no room for its round.
            ConfigurationError: The journal is damaged, full, or cannot be written: nothing
                may be answered.
        """
        _check(run_id, answer)
        try:
            with self._locked():
                answers = self._read()
                self._refuse(run_id, answer, answers)
                counted = _count(answer, answers.get(run_id), spacing)
                self._write(_format({**answers, run_id: counted}))
        except OSError as error:
            msg = (
                f"the journal {self.path} cannot be kept ({error.strerror}), so nothing may be "
                "answered: give the device a writable folder on a disk with room"
            )
            raise ConfigurationError(msg) from error

    def last(self, run_id: str) -> Answer | None:
        """Return the latest answer claimed in a run.

        Raises:
            ConfigurationError: The journal is damaged or cannot be read.
        """
        try:
            return self._read().get(run_id)
        except OSError as error:
            msg = f"the journal {self.path} cannot be read: {error.strerror}"
            raise ConfigurationError(msg) from error

    def _refuse(self, run_id: str, answer: Answer, answers: Mapping[str, Answer]) -> None:
        """Refuse an answer that is not the latest of its run, and a run too many."""
        last = answers.get(run_id)
        if last is not None and answer <= last:
            msg = (
                f"this device answered run {run_id!r} up to {last} and answers later ones only, "
                f"asked for {answer}"
            )
            raise PeerProtocolError(msg)
        if last is None and len(answers) >= MOST_RUNS:
            msg = (
                f"the journal {self.path} holds {MOST_RUNS} runs, as many as it keeps, and "
                "forgets none: enroll the device anew, with a new journal"
            )
            raise ConfigurationError(msg)

    def _read(self) -> dict[str, Answer]:
        try:
            with self.path.open("rb") as file:
                data = file.read(_MOST_BYTES + OVERHEAD + 1)
        except FileNotFoundError:
            return {}
        try:
            return _parse(data if self.seal is None else self.seal.open(SEALED_AS, data))
        except (ValueError, TypeError, PeerProtocolError, RecursionError) as error:
            msg = (
                f"the journal {self.path} is damaged, so nothing may be answered: restore the "
                "disk, or enroll the device anew, with a new identity and a new journal"
            )
            raise ConfigurationError(msg) from error

    def _write(self, data: bytes) -> None:
        if self.seal is None:
            replace_file(self.path, data)
        else:
            self.seal.write(self.path, SEALED_AS, data)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the device's lock; the system drops it if the process dies."""
        # A file of its own: the journal itself is replaced, and its lock with it.
        with open_private(beside(self.path, ".lock"), os.O_RDWR) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield


JournalSource: TypeAlias = Callable[[Context], AnsweredJournal | None]
"""Gives a node its journal; None if it keeps none."""


def journal_of(context: Context) -> AnsweredJournal | None:
    """Return the journal that the node's configuration names; None if it names none."""
    path = context.node_config.get("journal")
    if not isinstance(path, str):
        return None
    return AnsweredJournal(Path(path), seal_of(context.node_config))


def _format(answers: Mapping[str, Answer]) -> bytes:
    """Return three lines: the format, the hash of the third, and the answers as JSON."""
    runs = {run: [a.round_number, a.attempt, a.stage, a.taken] for run, a in answers.items()}
    body = json.dumps(runs, separators=(",", ":"), sort_keys=True)
    return f"{_FORMAT}\n{_digest(body)}\n{body}\n".encode("ascii")


def _parse(data: bytes) -> dict[str, Answer]:
    header, digest, body, end = data.decode("ascii").split("\n")
    if header != _FORMAT or digest != _digest(body) or end:
        msg = "the format or the hash is another"
        raise ValueError(msg)
    runs = json.loads(body)
    if not isinstance(runs, dict):
        msg = "the answers are no object"
        raise TypeError(msg)
    answers = {run: Answer(*values) for run, values in runs.items()}
    for run, answer in answers.items():
        _check(run, answer)
    return answers


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode("ascii")).hexdigest()


def _count(answer: Answer, last: Answer | None, spacing: Spacing | None) -> Answer:
    """Return `answer` with the number of rounds, if the noise of the run hides so many."""
    if last is None:
        return replace(answer, taken=1)
    if spacing is not None:
        spacing.check(answer.round_number, last=last.round_number, taken=last.taken)
    return replace(answer, taken=last.taken + (answer.round_number != last.round_number))


def _check(run_id: str, answer: Answer) -> None:
    """Refuse what no round plan has."""
    numbers = (answer.round_number, answer.attempt, answer.stage, answer.taken)
    whole = all(type(number) is int and 0 <= number < _LIMIT for number in numbers)
    if not whole or answer.taken == 0:
        msg = f"round, attempt and stage must be whole numbers in 0..2^48, found {numbers}"
        raise PeerProtocolError(msg)
    if not 1 <= len(run_id.encode("utf-8", "surrogatepass")) <= MOST_ID_BYTES:
        msg = f"a run's name must have 1 to {MOST_ID_BYTES} bytes, found {len(run_id)} letters"
        raise PeerProtocolError(msg)
