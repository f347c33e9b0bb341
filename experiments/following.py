"""Following a run to its true end, over the deaths of all who hold it.

Three processes hold a run, and each may be killed: the SuperLink, the ServerApp, and the
command that follows them. What outlives them is the run's folder:

    job.json, run.json     what is run, and under which number Flower knows it
    checkpoint/            where it goes on (`strategies.checkpoints`)
    summary.json           written last, by a ServerApp that came to an end of its own

So the end of a run is what two witnesses say together, the SuperLink's status and the
summary, since `flwr run` ends with status 0 also when the ServerApp crashed. A run that
ended without a summary was killed, and is started again from its checkpoint: devices know
it by its first name, and the ledger goes on. A SuperLink that does not answer is waited
for. A ServerApp that died is known at once by the lock of the checkpoint, which the system
takes from the dead; the SuperLink takes a minute to notice.

Both kinds of patience end: an outage may last so long, and a run may be started so often
without a round between two starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from fedcore.durable import replace_file
from fedcore.errors import ConfigurationError, FedcoreError

T = TypeVar("T")
CHECKPOINT: Final = "checkpoint"
JOB: Final = "job.json"
SUMMARY: Final = "summary.json"
_RUN: Final = "run.json"
_POLL_SECONDS: Final = 2.0
_ASK_EVERY: Final = 10
"""Looks at the run's files before the SuperLink is asked: each question starts a process."""
_LOOKS_GONE: Final = 3
"""In a row without a ServerApp, before it counts as dead."""
_FLOCK: Final = "@hhqqi"
"""Linux's struct flock: type, whence, start, length, process."""
_RELEASE_SECONDS: Final = 120.0
"""For a ServerApp that the SuperLink gave up to let go of its checkpoint."""


class RunFailedError(FedcoreError):
    """A run ended without all of its rounds."""


class UnreachableError(ConfigurationError):
    """The SuperLink does not answer at all."""


class Link(Protocol):
    """What is asked of a SuperLink; each call may raise `UnreachableError`."""

    def start(self) -> str:
        """Start the run of the folder and return its id."""
        ...

    def stop(self, run_id: str) -> None:
        """Stop a run."""
        ...

    def statuses(self) -> Mapping[str, tuple[str, str]]:
        """Return status and details of every run, by id."""
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How much goes wrong before a run is given up.

    Attributes:
        outage_seconds: How long a SuperLink may be away.
        restarts: How often a run is started again without a round in between.
    """

    outage_seconds: float = 1800.0
    restarts: int = 5


@dataclass(frozen=True, slots=True)
class _Note:
    """What run.json holds: the last start of this folder's run.

    Attributes:
        run_id: As the SuperLink knows it; empty from before the start until it is known.
        before: Runs that were there before: another one is ours, whoever was told its id.
        rehearsal: As in `experiments.submission.Submission`.
    """

    run_id: str
    before: tuple[str, ...]
    rehearsal: bool

    def write(self, output: Path) -> None:
        fields = {"run": self.run_id, "before": list(self.before), "rehearsal": self.rehearsal}
        replace_file(output / _RUN, json.dumps(fields).encode())


@dataclass(slots=True)
class Following:
    """One run, followed from its first start or from where an earlier command left it.

    Attributes:
        link: To the SuperLink.
        output: The run's folder.
        say: Told every line that a person should see.
        rehearsal: As in `experiments.submission.Submission`.
        patience: When it is given up.
        sleep: Waits.
        now: Tells the time, in seconds from anywhere.
    """

    link: Link
    output: Path
    say: Callable[[str], None]
    rehearsal: bool = False
    patience: Patience = field(default_factory=Patience)
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic
    _told: int = 0
    _held: int = 0

    def start(self) -> dict[str, Any]:
        """Start the run and return its summary when it is over.

        Raises:
            ConfigurationError: The SuperLink does not answer, or refuses the run.
            RunFailedError: It ended without all of its rounds.
        """
        return self._hold(self._start())

    def resume(self) -> dict[str, Any]:
        """Follow a run that another command started; start it again if it is not going on.

        Raises:
            ConfigurationError: The SuperLink refuses the run, or the folder is damaged.
            RunFailedError: It ended without all of its rounds.
        """
        note = read_note(self.output)
        self._tell()
        if note is not None:
            found = self._patiently(self.link.statuses)
            run_id = note.run_id or _newest(found, note.before)
            status, _ = found.get(run_id, ("unknown", ""))
            self.say(f"run {run_id or '(not started)'} is {status}")
            whole = _is_whole(read_summary(self.output))
            if run_id in found and (whole or not status.startswith("finished")):
                return self._hold(run_id)
        return self._hold(self._again())

    def _hold(self, run_id: str) -> dict[str, Any]:
        """Follow a run, and start it again whenever it was killed."""
        fruitless = 0
        while True:
            held = self._held
            self.say(f"run {run_id}: {self.output}")
            try:
                status, details = self._watch(run_id)
            except KeyboardInterrupt:
                try:
                    self.link.stop(run_id)
                except ConfigurationError as error:
                    self.say(f"run {run_id} may go on, it could not be stopped: {error}")
                raise
            if self._is_final(status):
                summary = judge(self.output, status, details)
                shutil.rmtree(self.output / CHECKPOINT, ignore_errors=True)
                return summary
            fruitless = 1 if self._held > held else fruitless + 1
            if fruitless > self.patience.restarts:
                msg = (
                    f"the run was started {fruitless} times without holding a round, and ended as "
                    f"{status}: {details or 'it was killed'}; {_how_to_go_on(self.output)}"
                )
                raise RunFailedError(msg)
            self.say(f"run {run_id} is lost ({details or status}): going on from its checkpoint")
            run_id = self._again()

    def _is_final(self, status: str) -> bool:
        """Tell whether to start the run again would end in the same way."""
        if status in {"finished:stopped", "finished:completed"}:
            return status == "finished:stopped" or (self.output / SUMMARY).exists()
        # With all rounds and no status, it ended between its last word and Flower's.
        summary = read_summary(self.output)
        return bool(summary) and not _is_whole(summary)

    def _again(self) -> str:
        """Start the run again from its checkpoint."""
        deadline = self.now() + _RELEASE_SECONDS
        while holder := user_of(self.output / CHECKPOINT):
            if self.now() >= deadline:
                msg = (
                    f"process {holder} still writes {self.output / CHECKPOINT}, though its run was "
                    f"given up: end it; {_how_to_go_on(self.output)}"
                )
                raise RunFailedError(msg)
            self.sleep(_POLL_SECONDS)
        (self.output / SUMMARY).unlink(missing_ok=True)
        return self._patiently(self._start)

    def _start(self) -> str:
        """Start the run, once: an answer that got lost is looked for among all runs."""
        note = read_note(self.output)
        found = self.link.statuses()
        run_id = "" if note is None or note.run_id else _newest(found, note.before)
        if not run_id:
            _Note("", tuple(found), self.rehearsal).write(self.output)
            run_id = self.link.start()
        _Note(run_id, (), self.rehearsal).write(self.output)
        return run_id

    def _watch(self, run_id: str) -> tuple[str, str]:
        """Return how the SuperLink, or the silence of its ServerApp, says that a run ended."""
        seen, gone = False, 0
        while True:
            for _ in range(_ASK_EVERY):
                self._tell()
                at_work = user_of(self.output / CHECKPOINT) != 0
                seen, gone = seen or at_work, 0 if at_work or not seen else gone + 1
                if (self.output / SUMMARY).exists() or gone >= _LOOKS_GONE:
                    break
                self.sleep(_POLL_SECONDS)
            status, details = self._patiently(self.link.statuses).get(run_id, ("unknown", ""))
            if status.startswith("finished") or status == "unknown":
                self._tell()
                return status, details
            if gone >= _LOOKS_GONE and not (self.output / SUMMARY).exists():
                self._patiently(lambda: self._stop(run_id))
                return status, "its ServerApp died"
            self.sleep(_POLL_SECONDS)  # it has written its summary and is about to end

    def _stop(self, run_id: str) -> None:
        """Stop a run that may have been stopped meanwhile."""
        try:
            self.link.stop(run_id)
        except UnreachableError:
            raise
        except ConfigurationError:
            return

    def _patiently(self, ask: Callable[[], T]) -> T:
        """Ask a SuperLink that may be away for some time."""
        since: float | None = None
        while True:
            try:
                answer = ask()
            except UnreachableError as error:
                if since is None:
                    since = self.now()
                    self.say("the SuperLink does not answer: waiting for it")
                if self.now() - since >= self.patience.outage_seconds:
                    away = self.patience.outage_seconds / 60
                    msg = (
                        f"the SuperLink did not answer for {away:g} min: start it; "
                        f"{_how_to_go_on(self.output)}"
                    )
                    raise RunFailedError(msg) from error
                self.sleep(_POLL_SECONDS)
                continue
            if since is not None:
                self.say(f"the SuperLink is back after {self.now() - since:.0f} s")
            return answer

    def _tell(self) -> None:
        """Say what is new in the metrics."""
        lines = read_metrics(self.output)
        for line in lines[self._told :]:
            self.say(describe_round(line))
        # A ServerApp that goes on writes the file anew: for a moment it is shorter.
        self._told = max(self._told, len(lines))
        self._held = max(self._held, sum(bool(line["survivors"]) for line in lines))


def read_note(output: Path) -> _Note | None:
    """Return what is known of the last start; None if there was none.

    Raises:
        ConfigurationError: The note is damaged.
    """
    try:
        found = json.loads((output / _RUN).read_text(encoding="utf-8"))
        before = tuple(str(run_id) for run_id in found["before"])
        return _Note(str(found["run"]), before, found["rehearsal"] is True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = (
            f"{output / _RUN} cannot be read: remove it if no run of this folder is going on "
            "(status), and resume again"
        )
        raise ConfigurationError(msg) from error


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """Return the rounds that a run has told of so far."""
    try:
        text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]  # the last may be half a line


def user_of(checkpoint: Path) -> int:
    """Return the living process that writes these checkpoints; 0 if there is none.

    It is asked of the lock, and the lock is not taken for it, not even for a moment: a
    ServerApp that just starts would find it taken.
    """
    try:
        lock = os.open(checkpoint / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, holder = struct.unpack(_FLOCK, fcntl.fcntl(lock, fcntl.F_GETLK, wanted))
    finally:
        os.close(lock)
    return 0 if kind == fcntl.F_UNLCK else int(holder)


def read_summary(output: Path) -> dict[str, Any]:
    """Return what the ServerApp wrote last; empty if it did not."""
    try:
        return dict(json.loads((output / SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def judge(output: Path, status: str, details: str = "") -> dict[str, Any]:
    """Return the summary of a run that finished; both witnesses must say so.

    Args:
        output: Its folder.
        status: What the SuperLink says.
        details: What it says beside.

    Raises:
        RunFailedError: One of them says otherwise.
    """
    summary = read_summary(output)
    if status == "finished:completed" and _is_whole(summary):
        return summary
    done, wanted = summary.get("completed_rounds", 0), summary.get("rounds", "all")
    why = summary.get("stopped") or details or "the ServerApp could not begin, see `flwr log`"
    msg = f"the run is {status} after {done} of {wanted} rounds: {why}"
    raise RunFailedError(msg)


def describe_round(line: Mapping[str, Any]) -> str:
    """Return a round as a person wants to read it."""
    accuracy = line["accuracy"]
    tested = "" if accuracy is None else f", accuracy {accuracy:.4f}"
    epsilon = line["epsilon"]
    spent = f"{epsilon:.3g}" if isinstance(epsilon, float) else epsilon
    aborted = f", aborted: {line['aborted'][-1]}" if line["aborted"] else ""
    said = "".join(f"; {count} said: {text}" for text, count in line.get("refusals", {}).items())
    return (
        f"round {line['round']}: {line['survivors']} of {line['invited']} devices{tested}, "
        f"epsilon {spent}, {line['seconds']:.0f} s{aborted}{said}"
    )


def _is_whole(summary: Mapping[str, Any]) -> bool:
    """Tell whether all rounds were held."""
    done = summary.get("completed_rounds", 0)
    return bool(summary) and done == summary.get("rounds") and not summary.get("stopped")


def _newest(found: Mapping[str, Any], before: Sequence[str]) -> str:
    """Return the run that was not there before; empty if there is none."""
    return next((run_id for run_id in found if run_id not in before), "")


def _how_to_go_on(output: Path) -> str:
    return f"`submit --resume {output}` goes on from the checkpoint"
