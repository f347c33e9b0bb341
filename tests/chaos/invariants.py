"""What must hold whatever happened, checked on what a run left behind.

    one sum        each round's model is the exact sum over the devices that survived it, and
                   each round begins with the model that the last one left
    ledger         every sum whose shares were asked for is in the ledger, no other is, and
                   what was spent is what the ledger's entries cost together
    one answer     no device answers a stage of an attempt in two ways, whoever asks how often
    one plan       no attempt of a round is begun twice with different plans
    every round    all rounds are there, once, in order; each attempt ends in time
    refused        what was wrong on purpose was refused

The evidence is the trace of a `TracingGrid` and the run's own files: the same of a real
deployment and of the in-process grid.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.job import Job
from fedcore.pipeline import RoundPlan, model_digest
from fedcore.privacy import PrivacyLedger
from strategies.checkpoints import LOST
from tests.chaos.expected import Arrays, initial_model, model_after

TRACE = "trace.jsonl"
Step = tuple[int, int]
"""Round and attempt."""


@dataclass(frozen=True)
class Evidence:
    """What a run left behind.

    Attributes:
        job: What was run.
        trace: Lines of the tracing grid, in order.
        rounds: Lines of metrics.jsonl, in order.
        ledger: Everything released.
        model: The last global model.
        over: Whether the run ended by itself, with all its rounds.
        numbers: Of devices by their labels, where those are no numbers of devices: a node that
            is slow to say who it is goes by its node id.
        rolled_back: Whether its newest checkpoint was damaged. It goes on from the one before, and
            what was held since is told as lost: later rounds had begun with those models.
    """

    job: Job
    trace: Sequence[dict[str, Any]]
    rounds: Sequence[dict[str, Any]]
    ledger: PrivacyLedger
    model: Arrays
    over: bool = True
    numbers: Mapping[str, int] = field(default_factory=dict)
    rolled_back: bool = False

    def numbered(self, labels: Iterable[str]) -> list[int]:
        """Return the numbers of devices, in order."""
        return sorted(self.numbers[name] if name in self.numbers else int(name) for name in labels)

    @property
    def asked(self) -> Iterator[dict[str, Any]]:
        """The requests of secure rounds."""
        return (line for line in self.trace if line["event"] == "asked")


@dataclass
class Attempt:
    """What the trace knows of one attempt.

    Attributes:
        plans: That were sent for it, by the bytes.
        asked: Devices by the stage that they were asked for.
        began, ended: Unix time of the first and of the last line.
    """

    plans: set[str] = field(default_factory=set)
    asked: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    began: float = float("inf")
    ended: float = 0.0

    @property
    def revealed(self) -> bool:
        """Whether shares were asked for."""
        return bool(self.asked["reveal"])

    @property
    def survivors(self) -> frozenset[str]:
        """Whose uploads are in the sum: they were asked to endorse, or without that to reveal."""
        return frozenset(self.asked["endorse"] or self.asked["reveal"])

    @property
    def plan(self) -> RoundPlan:
        """What was planned."""
        return RoundPlan.from_bytes(bytes.fromhex(next(iter(self.plans))))


def evidence_in(folder: Path, numbers: Mapping[str, int], *, rolled_back: bool = False) -> Evidence:
    """Return what a deployed run left in its folder."""
    with np.load(folder / "model.npz") as file:
        model = {name: file[name] for name in file.files}
    summary = folder / "summary.json"
    found = json.loads(summary.read_text()) if summary.exists() else {}
    return Evidence(
        Job.from_json((folder / "job.json").read_text()),
        lines_of(folder / TRACE),
        lines_of(folder / "metrics.jsonl"),
        PrivacyLedger.from_json((folder / "ledger.json").read_text()),
        model,
        over=bool(found)
        and found["completed_rounds"] == found.get("rounds")
        and not found["stopped"],
        numbers=numbers,
        rolled_back=rolled_back,
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file's whole lines; a process that was killed left half of one."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def attempts_of(evidence: Evidence) -> dict[Step, Attempt]:
    """Return what was sent and said in each attempt, in order."""
    found: dict[Step, Attempt] = defaultdict(Attempt)
    for line in evidence.trace:
        if line["event"] not in {"asked", "answered"} or not line["attempt"]:
            continue
        attempt = found[line["round"], line["attempt"]]
        if line["event"] == "asked":
            attempt.asked[line["stage"]].add(line["node"])
            attempt.plans |= {line["plan"]} - {""}
        if not line.get("late"):
            attempt.began = min(attempt.began, line["at"])
            attempt.ended = max(attempt.ended, line["at"])
    return dict(sorted(found.items()))


def violations(evidence: Evidence, *, seconds: float = float("inf")) -> list[str]:
    """Return every law that was broken, in words; none if all hold.

    Args:
        evidence: Of a run that is over, or was stopped between two rounds.
        seconds: How long an attempt may take.
    """
    attempts = attempts_of(evidence)
    laws = (
        partial(_every_round, evidence),
        partial(_one_plan, attempts),
        partial(_one_answer, evidence),
        partial(_refused, evidence),
        partial(_ledger, evidence, attempts),
        partial(_in_time, attempts, seconds),
        partial(_one_sum, evidence, attempts),
    )
    return [broken for law in laws for broken in law()]


def _every_round(evidence: Evidence) -> Iterator[str]:
    numbers = [line["round"] for line in evidence.rounds]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"rounds are not told once and in order: {numbers}"
    if len(numbers) > evidence.job.rounds or (evidence.over and len(numbers) < evidence.job.rounds):
        yield f"{len(numbers)} rounds of {evidence.job.rounds}"
    for line in evidence.rounds:
        if not line["survivors"] and not line["aborted"]:
            yield f"round {line['round']} has no survivors, and no reason"


def _one_plan(attempts: dict[Step, Attempt]) -> Iterator[str]:
    for step, attempt in attempts.items():
        if len(attempt.plans) != 1:
            yield f"round {step[0]}, attempt {step[1]} was begun with {len(attempt.plans)} plans"


def _one_answer(evidence: Evidence) -> Iterator[str]:
    said: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for line in evidence.trace:
        if line["event"] in {"answered", "probed"} and line["reply"] and line["attempt"]:
            said[line["round"], line["attempt"], line["stage"], line["node"]].add(line["reply"])
    for step, replies in said.items():
        if len(replies) > 1:
            yield f"round, attempt, stage, device {step} was answered in {len(replies)} ways"


def _refused(evidence: Evidence) -> Iterator[str]:
    for line in evidence.trace:
        wrong = line["event"] == "probed" and line["kind"] != "replay"
        if wrong and line["reply"] and not _is_beside_the_point(line):
            yield f"{line['kind']} was answered by device {line['node']}, round {line['round']}"


def _is_beside_the_point(line: dict[str, Any]) -> bool:
    """Tell whether a request was no worse for what was added to it."""
    return line["stage"] == "identify" or line["kind"] == "oversize-request"


def _ledger(evidence: Evidence, attempts: dict[Step, Attempt]) -> Iterator[str]:
    entries: dict[int, list[int]] = defaultdict(list)
    for release in evidence.ledger.releases:
        entries[release.round_number].append(release.survivors)
    for line in evidence.rounds:
        number, lost = line["round"], LOST in line["aborted"]
        revealed = [a for (r, _), a in attempts.items() if r == number and a.revealed]
        found = entries.pop(number, [])
        # An entry is written before the first share is asked for: who dies in between has paid.
        if not len(revealed) <= len(found) <= len(revealed) + lost:
            yield f"round {number}: {len(revealed)} sums could be known, {len(found)} are paid for"
        wanted = [len(attempt.survivors) for attempt in revealed]
        if found[: len(wanted)] != wanted:
            yield f"round {number}: sums over {wanted} devices, paid for sums over {found}"
        if line["survivors"] and not revealed:
            yield f"round {number} has a sum that nobody was asked to reveal"
    if entries and max(entries) <= len(evidence.rounds):
        yield f"the ledger has entries of rounds that there are not: {sorted(entries)}"
    epsilon = evidence.rounds[-1]["epsilon"] if evidence.rounds else 0.0
    spent = evidence.ledger.epsilon
    if epsilon != ("inf" if spent == float("inf") else spent) and not entries:
        yield f"the last round says epsilon {epsilon}, the ledger says {spent}"


def _in_time(attempts: dict[Step, Attempt], seconds: float) -> Iterator[str]:
    for step, attempt in attempts.items():
        took = attempt.ended - attempt.began
        if took > seconds:
            yield f"round {step[0]}, attempt {step[1]} took {took:.0f} s, at most {seconds:.0f}"


def _one_sum(evidence: Evidence, attempts: dict[Step, Attempt]) -> Iterator[str]:
    if any(len(attempt.plans) != 1 for attempt in attempts.values()):
        return  # which is told already, and leaves nothing to compare with
    model = initial_model(evidence.job)
    undone: Arrays | None = None
    for line in evidence.rounds:
        number, lost = line["round"], evidence.rolled_back and LOST in line["aborted"]
        steps = [step for step in attempts if step[0] == number]
        models = [model, undone] if lost and undone is not None else [model]
        begun = model
        for step in steps:
            found = _begun_with(attempts[step], models)
            if found is None:
                yield f"round {number}, attempt {step[1]} began with another model"
                return
            begun = found
        if not line["survivors"]:
            undone = _sum_of(evidence, attempts[steps[-1]], begun) if lost and steps else undone
            continue
        if not steps:
            yield f"round {number} has a sum that nobody was asked for"
            return
        last = attempts[steps[-1]]
        if len(last.survivors) != line["survivors"]:
            yield f"round {number}: {line['survivors']} survivors told, {len(last.survivors)} asked"
        model = _sum_of(evidence, last, model) or model
    if model_digest(model) != model_digest(evidence.model):
        yield "the last model is not the sum of its survivors"


def _begun_with(attempt: Attempt, models: Iterable[Arrays]) -> Arrays | None:
    """Return which of these models an attempt began with; None if with none of them."""
    digest = attempt.plan.model_digest
    return next((model for model in models if model_digest(model) == digest), None)


def _sum_of(evidence: Evidence, attempt: Attempt, model: Arrays) -> Arrays | None:
    """Return the model that an attempt made of `model`; None if it never came to a sum."""
    if not attempt.revealed:
        return None
    survivors = evidence.numbered(attempt.survivors)
    return model_after(evidence.job, attempt.plan, model, survivors)
