"""A chaos campaign on a real deployment: runs of some rounds each, hurt as a seed says.

One loop looks at the trace, lets the faults of the round happen when their stage begins and
end when their time is over, and starts again whatever died. After every round the ledger
must have grown at its end only; after every run all invariants are checked
(`tests.chaos.invariants`). What was done goes to `chaos.jsonl`.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.chaos.faults import DAMAGED_CHECKPOINT, ORDERS, Fault, Undo, begin, draw
from tests.chaos.federation import Federation, Run, Tail
from tests.chaos.invariants import TRACE, evidence_in, violations

STAGE_SECONDS = 40
STUCK_SECONDS = 420.0
"""Without a sign of life of a run; the longest outage is a tenth of it."""
ATTEMPT_SECONDS = 7 * STAGE_SECONDS + 240.0
"""Six stages at their deadlines, and a coordinator that was frozen or away meanwhile."""


def overrides(devices: int, rounds: int, seed: int) -> list[str]:
    """Return the job: small, signed, with noise of the devices, and room for losses."""
    return [
        *(f"seed={seed}", f"rounds={rounds}", f"clients={devices}"),
        *(f"clients_per_round={devices}", "model=logistic", "weighting=uniform"),
        *("dropout=0.3", "secagg.corrupt=0", f"stage_seconds={STAGE_SECONDS}"),
        *("privacy=distributed_gaussian", "privacy.noise_multiplier=0.5", "privacy.epsilon=null"),
    ]


@dataclass
class Campaign:
    """Runs on one federation.

    Attributes:
        federation: Is up.
        random: Draws the faults.
        say: Told how it goes.
        log: Where what was done is written, a line each.
        faults: Of a round, drawn; replaced by tests that want certain ones.
    """

    federation: Federation
    random: Random
    say: Callable[[str], None]
    log: Path
    faults: Callable[[Random, int, int], list[Fault]] = draw
    done: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    rounds: int = 0
    completed: int = 0
    _open: list[tuple[float, Fault, Undo]] = field(default_factory=list)
    _planned: list[Fault] = field(default_factory=list)
    _due: list[tuple[float, Fault]] = field(default_factory=list)
    _releases: list[Any] = field(default_factory=list)
    _rolled_back: bool = False

    def hold(self, number: int, rounds: int, deadline: float) -> None:
        """Hold one run; add to the figures, and to what was broken.

        Args:
            number: Of the run.
            rounds: How many it has.
            deadline: Of `time.monotonic`, after which it is stopped between two rounds.
        """
        federation = self.federation
        output = federation.folder / f"run-{number}"
        run = Run(federation, output, overrides(federation.devices, rounds, federation.seed))
        tails = Tail(output / TRACE), Tail(output / "metrics.jsonl")
        self._releases, self._rolled_back = [], False
        with ExitStack() as stack:
            stack.callback(run.stop)  # also where somebody stops the campaign
            self._watch(run, number, tails, deadline)

    def _watch(self, run: Run, number: int, tails: tuple[Tail, Tail], deadline: float) -> None:
        """Hurt one run as long as it lasts, and check it."""
        federation, output = self.federation, run.output
        current, told, heard = 0, 0, time.monotonic()
        while run.ended is None and time.monotonic() < deadline:
            federation.keep_up()
            run.keep_up()
            for line in tails[0].lines():
                heard = time.monotonic()
                if line["event"] == "asked":
                    if line["round"] > current:
                        current = self._plan(run, line["round"])
                    self._schedule(line)
            self._act(run)
            told = self._tell(output, told)
            self._check_growth(output)
            if time.monotonic() - heard > STUCK_SECONDS:
                self._note_broken(f"run {number} has been silent for {STUCK_SECONDS:g} s")
                break
            time.sleep(0.1)
        self._heal_all()
        self._finish(run, number)

    def _plan(self, run: Run, round_number: int) -> int:
        """Draw the faults of a round; return it."""
        self._planned = self.faults(self.random, round_number, self.federation.devices)
        orders = [fault for fault in self._planned if fault.kind in ORDERS]
        for fault in orders:  # they are carried out by the ServerApp, when their stage begins
            self._planned.remove(fault)
            self._begin(run, fault)
        return round_number

    def _schedule(self, line: dict[str, Any]) -> None:
        for fault in [fault for fault in self._planned if fault.stage == line["stage"]]:
            self._planned.remove(fault)
            self._due.append((time.monotonic() + fault.delay, fault))

    def _act(self, run: Run) -> None:
        now = time.monotonic()
        for item in [item for item in self._due if item[0] <= now]:
            self._due.remove(item)
            self._begin(run, item[1])
        for item in [item for item in self._open if item[0] <= now]:
            self._open.remove(item)
            self._heal(item[1], item[2])

    def _begin(self, run: Run, fault: Fault) -> None:
        self.done[fault.kind] += 1
        self._rolled_back |= fault.kind == DAMAGED_CHECKPOINT
        self._write({"event": "begin", **asdict(fault)})
        undo = begin(self.federation, run, fault)
        self._open.append((time.monotonic() + fault.seconds, fault, undo))

    def _heal(self, fault: Fault, undo: Undo) -> None:
        wrong = undo()
        self._write({"event": "end", **asdict(fault), "wrong": wrong})
        if wrong:
            self._note_broken(f"{fault.kind}, device {fault.node}: {wrong}")

    def _heal_all(self) -> None:
        for _, fault, undo in self._open:
            self._heal(fault, undo)
        self._open, self._due, self._planned = [], [], []

    def _tell(self, output: Path, told: int) -> int:
        """Say which rounds are over."""
        found = list(Tail(output / "metrics.jsonl").lines())
        for line in found[told:]:
            aborted = f" ({'; '.join(line['aborted'])[:160]})" if line["aborted"] else ""
            self.say(
                f"{output.name} round {line['round']}: {line['survivors']} survivors, "
                f"{line['attempts']} attempts{aborted}"
            )
        return max(told, len(found))

    def _check_growth(self, output: Path) -> None:
        """The ledger grows at its end, whoever dies: it never loses an entry."""
        try:
            releases = json.loads((output / "ledger.json").read_text())["releases"]
        except (OSError, ValueError):
            return
        if releases[: len(self._releases)] != self._releases:
            self._note_broken(f"{output.name}: the ledger lost or changed an entry")
        self._releases = releases

    def _finish(self, run: Run, number: int) -> None:
        """Check all that the run left behind."""
        over = run.ended == 0
        if run.ended not in {0, None}:
            self._note_broken(f"run {number} ended with status {run.ended}: {_last(run)}")
        run.stop()
        try:
            numbers = self.federation.numbers()
            found = evidence_in(run.output, numbers, rolled_back=self._rolled_back)
        except OSError as error:
            self._note_broken(f"run {number} left no evidence: {error}")
            return
        rounds = found.rounds
        self.rounds += len(rounds)
        self.completed += sum(bool(line["survivors"]) for line in rounds)
        if over or run.ended is None:
            for text in violations(found, seconds=ATTEMPT_SECONDS):
                self._note_broken(f"run {number}: {text}")
        self._write({"event": "run", "number": number, "rounds": len(rounds), "over": over})

    def _note_broken(self, text: str) -> None:
        self.broken.append(text)
        self.say(f"BROKEN {text}")
        self._write({"event": "broken", "text": text})

    def _write(self, line: dict[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), **line}) + "\n")


def _last(run: Run) -> str:
    log = None if run.party is None else run.party.log
    return "" if log is None else log.read_text(errors="replace").strip().split("\n")[-1][:300]
