"""Look for bytes that a decoder mishandles: `python -m tests.fuzz --minutes 10 --seed 1`.

Every decoder of bytes from the network or from disk is given descendants of valid inputs
(`mutations`), and has to return a value or raise the one error it documents (`law`). What
it mishandles is written to a file; the command that repeats it is printed.

The work is done by child processes. Each notes what it is about to try in memory that it
shares with its parent, so that even an input that ends or blocks the process is known.
"""

import argparse
import hashlib
import mmap
import os
import struct
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from tests.fuzz.campaign import all_targets, inputs, shares
from tests.fuzz.law import Target, examine, limits

FINDINGS = Path("fuzz-findings")
AT_ONCE = 20_000
"""Inputs, over all targets, between two looks at the clock."""
BLOCKED_SECONDS = 90
"""After which a child waits for something that does not come."""
_HEAD = struct.Struct("<QII")
_MOST_BYTES = 1 << 20


class Note:
    """What a child is trying: written by it, read by its parent."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD.size + _MOST_BYTES)
        self.count = 0

    def write(self, target: int, data: bytes) -> None:
        self.count += 1
        self._memory[_HEAD.size : _HEAD.size + len(data[:_MOST_BYTES])] = data[:_MOST_BYTES]
        self._memory[: _HEAD.size] = _HEAD.pack(self.count, target, len(data[:_MOST_BYTES]))

    def read(self) -> tuple[int, int, bytes]:
        """Return how many were tried, and the last one's target and bytes."""
        count, target, size = _HEAD.unpack(self._memory[: _HEAD.size])
        return count, target, self._memory[_HEAD.size : _HEAD.size + size]


def search(note: Note, chosen: str, seed: str, end: float, found: SimpleQueue) -> None:
    """Try inputs until `end`; put (target, input, reason) into `found`."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        targets = all_targets(Path(folder))
        kept = [index for index, target in enumerate(targets) if chosen in target.name]
        counts = shares([targets[index] for index in kept], AT_ONCE)
        batch = 0
        with limits():
            while True:
                for index, count in zip(kept, counts, strict=True):
                    for data in inputs(targets[index], count, f"{seed}/{batch}"):
                        note.write(index, data)
                        _, reason = examine(targets[index], data)
                        if reason is not None:
                            found.put((index, data, reason))
                        if time.monotonic() >= end:
                            return
                batch += 1


class Worker:
    """A child that searches, and what it last said."""

    def __init__(self, options: argparse.Namespace, seed: str, end: float, found: SimpleQueue):
        self.note = Note()
        terms = (self.note, options.target, seed, end, found)
        self.process = get_context("fork").Process(target=search, args=terms)
        self.process.start()
        self.tried, self._since = 0, time.monotonic()

    def over(self) -> str | None:
        """Return how the child ended, "" for as it should; None while it goes on."""
        count = self.note.read()[0]
        if count != self.tried:
            self.tried, self._since = count, time.monotonic()
        if count and time.monotonic() - self._since > BLOCKED_SECONDS:
            self.process.kill()
            self.process.join()
            return "blocks the process"
        if self.process.is_alive():
            return None
        self.process.join()
        self.tried = self.note.read()[0]
        return f"ends the process ({self.process.exitcode})" if self.process.exitcode else ""


def hunt(options: argparse.Namespace, targets: list[Target]) -> int:
    """Keep the children at work; return how many kinds of findings there are."""
    found = get_context("fork").SimpleQueue()
    start = time.monotonic()
    end = start + 60 * options.minutes
    known: set[tuple[str, str]] = set()
    workers: list[Worker] = []
    started = tried = 0
    while time.monotonic() < end or workers:
        while len(workers) < options.processes and time.monotonic() < end:
            workers.append(Worker(options, f"{options.seed}/{started}", end, found))
            started += 1
        time.sleep(0.2)
        for worker in list(workers):
            how = worker.over()
            if how is not None:
                workers.remove(worker)
                tried += worker.tried
            if how:
                _, index, data = worker.note.read()
                report(targets[index], data, how, known)
        while not found.empty():
            index, data, reason = found.get()
            report(targets[index], data, reason, known)
    seconds = time.monotonic() - start
    say(f"{tried:,} inputs in {seconds:.0f} s ({tried / seconds:,.0f} a second), "
        f"{len(known)} findings")  # fmt: skip
    return len(known)


def report(target: Target, data: bytes, reason: str, known: set[tuple[str, str]]) -> None:
    """Keep and print the first input of each kind of finding."""
    kind = (target.name, reason[:60])
    if kind in known:
        return
    known.add(kind)
    FINDINGS.mkdir(exist_ok=True)
    file = FINDINGS / f"{hashlib.sha256(data).hexdigest()[:16]}.input"
    file.write_bytes(data)
    say(f"{target.name}: {reason}\n    {len(data)} bytes in {file}; to repeat it:\n"
        f"    python -m tests.fuzz --target '{target.name}' --repeat {file}")  # fmt: skip


def repeat(targets: list[Target], name: str, file: Path) -> int:
    """Try one input without the judge, so that an error shows where it comes from."""
    (target,) = [target for target in targets if target.name == name]
    data = file.read_bytes()
    with limits():
        say(f"{target.name}, {len(data)} bytes: {examine(target, data)[1] or 'as it should be'}")
        try:
            target.decode(data)
        except (target.error, *target.also) as error:
            say(f"refused: {error}")
    return 0


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Search, or repeat a finding; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Look for bytes that a decoder mishandles."
    )
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", default="0", help="names the inputs; another one, others")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--target", default="", help="only those whose name contains it")
    parser.add_argument("--repeat", type=Path, help="try this file on --target and show the error")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        targets = all_targets(Path(folder))
        if options.repeat is not None:
            return repeat(targets, options.target, options.repeat)
        chosen = [target for target in targets if options.target in target.name]
        say(f"{len(chosen)} decoders, {sum(len(target.corpus) for target in chosen)} valid inputs")
        return min(hunt(options, targets), 1)


if __name__ == "__main__":
    sys.exit(main())
