"""Chaos without processes: whole runs on the in-process grid, with faults at every stage.

The apps, the protocol, the journals and the checkpoints are the real ones; the network, the
deaths and the clock are played. The same invariants are checked as on a real deployment
(`tests.chaos.invariants`), some thousand times as often. The faults of a round are drawn
from a seed: messages and replies that get lost, replies that are spoiled, requests that are
wrong, questions asked twice, a coordinator that dies anywhere and goes on.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from flwr.app import Context, Message, RecordDict

from clients import DevicePolicy
from clients.client_app import build_client_app, replayed_entropy
from clients.simulated import simulated_identities, simulated_root
from fedcore.codec import Clip
from fedcore.engine import Fault, FaultyGrid, InProcessGrid
from fedcore.engine.flower_private import SUPERLINK_NODE_ID
from fedcore.job import Job, check
from fedcore.models import Logistic
from fedcore.pipeline import RECORD, Bonawitz, Modular, Uniform
from fedcore.pipeline.envelope import IDENTIFY, STAGES
from fedcore.privacy import DistributedGaussian, PrivacyLedger
from fedcore.training import LocalTraining
from strategies.checkpoints import CheckpointFolder, Checkpoints
from strategies.server_app import build_server_app
from strategies.surroundings import coordinator_entropy
from tests.chaos.faults import DAMAGED_CHECKPOINT, cut_newest_checkpoint
from tests.chaos.invariants import Evidence, violations
from tests.chaos.traced import ON_REPLIES, ON_REQUESTS, REPLAY, TracingGrid

CLIENTS = 6
ROUNDS = 12
SMALL_ORDERS = tuple(do for do in (*ON_REPLIES, *ON_REQUESTS, REPLAY) if "oversize" not in do)
"""What is oversize takes a second of hashing: real runs do it."""
JOB = Job(
    name="chaos",
    model=Logistic(),
    clients=CLIENTS,
    clients_per_round=CLIENTS,
    rounds=ROUNDS,
    training=LocalTraining(epochs=1, batch_size=64, learning_rate=0.3),
    dropout=0.4,
    weighting=Uniform(),
    clip=Clip(1.0),
    quantize=Modular(16),
    privacy=DistributedGaussian(noise_multiplier=0.5, delta=1e-3),
)


class DiedError(BaseException):
    """Stands for kill -9: nothing may handle it."""


class Dying:
    """An observer that keeps the rounds, as the recorder does, and may die.

    Attributes:
        rounds: Lines as of metrics.jsonl.
        stopped: Why the run ended early.
    """

    def __init__(self, alive: Callable[[], None]) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.ledger: PrivacyLedger | None = None
        self.model: Any = None
        self.stopped_for = ""
        self._alive = alive

    def started(self, job: Any, preflight: Any, initial: Any) -> None:
        self.rounds = []

    def resumed(self, run: Any) -> None:
        self.rounds = [_line(past.report) for past in run.past]
        self.ledger, self.model = run.ledger, run.arrays

    def round_finished(self, progress: Any) -> None:
        self._alive()
        self.rounds.append(_line(progress.report))
        self.ledger, self.model = progress.ledger, progress.arrays
        self._alive()

    def stopped(self, reason: str) -> None:
        self.stopped_for = reason


def _line(report: Any) -> dict[str, Any]:
    return {
        "round": report.round_number,
        "survivors": report.survivors,
        "aborted": list(report.aborted),
        "epsilon": report.epsilon,
    }


class Weather:
    """The faults of a run, drawn from a seed.

    Args:
        seed: Another one, other faults.
        job: Whose devices and stages.
        signed: Whether devices say who they are, and endorse.
    """

    def __init__(self, seed: str, job: Job, *, signed: bool) -> None:
        self._random = Random(seed)
        self.done: Counter[str] = Counter()
        self._stages = [
            stage for stage in (IDENTIFY, *STAGES) if signed or stage not in {IDENTIFY, "endorse"}
        ]
        self._losses: dict[tuple[int, str, str], tuple[str, int]] = {}
        self._orders: dict[tuple[int, str, str], str] = {}
        for number in range(1, job.rounds + 1):
            for _ in range(self._random.choice((0, 1, 1, 2, 3, 4))):
                where = (number, self._random.choice(self._stages), str(self._node(job)))
                if self._random.random() < 0.5:
                    self._losses[where] = self._loss()
                else:
                    self._orders[where] = self._random.choice(SMALL_ORDERS)
        self._deaths = self._random.choice((0, 0, 1, 2))
        self._damages = self._random.random() < 0.25
        self._until_death = self._random.randrange(40, 400)

    def _node(self, job: Job) -> int:
        return self._random.randrange(job.clients)

    def _loss(self) -> tuple[str, int]:
        return self._random.choice(("request", "reply")), self._random.choice((1, 1, 9))

    def order(self, number: int, stage: str, node: str) -> str | None:
        """Say what is to be done to a device's exchange in a stage."""
        do = self._orders.pop((number, stage, node), None)
        if do is not None:
            self.done[do] += 1
        return do

    def lose(self, facts: tuple[int, str, str] | None) -> Fault | None:
        """Say whether a message, or its reply, gets lost."""
        self.alive()
        if facts is None or facts not in self._losses:
            return None
        what, left = self._losses[facts]
        if left == 0:
            return None
        self._losses[facts] = (what, left - 1)
        self.done[f"lost {what}"] += 1
        return Fault.DROPPED if what == "request" else Fault.LOST_REPLY

    @property
    def rolled_back(self) -> bool:
        """Whether a checkpoint was damaged."""
        return self.done[DAMAGED_CHECKPOINT] > 0

    def damage(self, folder: Path) -> None:
        """Damage the newest checkpoint of a coordinator that died, in some runs."""
        if self._damages and cut_newest_checkpoint(folder):
            self.done[DAMAGED_CHECKPOINT] += 1

    def alive(self) -> None:
        """Die, if it is time."""
        self._until_death -= 1
        if self._deaths and self._until_death < 0:
            self._deaths -= 1
            self._until_death = self._random.randrange(20, 300)
            self.done["death of the coordinator"] += 1
            raise DiedError


def facts_of(message: Message) -> tuple[int, str, str] | None:
    """Return round, stage and device of a request."""
    record = message.content.config_records.get(RECORD)
    if record is None or "stage" not in record:
        return None
    return record["round"], record["stage"], record["label"]


def play(seed: str, folder: Path, *, signed: bool = True) -> tuple[list[str], Evidence, Weather]:
    """Hold one run in the weather of a seed; return what was broken, and the evidence."""
    number = Random(seed).randrange(1 << 30)
    authority = simulated_root(number).public.raw.hex() if signed else None
    job = check(replace(JOB, seed=number, secagg=Bonawitz(corrupt=0.0, authority=authority))).job
    weather = Weather(seed, job, signed=signed)
    trace: list[dict[str, Any]] = []
    ticks = iter(range(1 << 40))
    observer = Dying(weather.alive)
    nodes = [{"journal": str(folder / f"answered-{index}")} for index in range(job.clients)]
    devices = build_client_app(
        DevicePolicy(minimum_cohort=1),
        entropy=replayed_entropy(number),
        identity=simulated_identities(number) if signed else None,
    )
    noting = Checkpoints.note

    def note(kept: Checkpoints, round_number: int, ledger: PrivacyLedger) -> None:
        weather.alive()
        noting(kept, round_number, ledger)
        weather.alive()

    Checkpoints.note = note  # type: ignore[method-assign]
    try:
        with InProcessGrid(devices, nodes, {"job": job.to_json()}) as grid:
            for _ in range(10):
                lossy = FaultyGrid(grid, lambda message: weather.lose(facts_of(message)))
                traced = TracingGrid(lossy, trace.append, weather.order, lambda: next(ticks) * 1e-3)
                server = build_server_app(
                    observer,
                    check(job),
                    entropy=coordinator_entropy(number),
                    checkpoints=CheckpointFolder(folder / "checkpoint"),
                )
                observer.stopped_for = ""
                with suppress(DiedError):
                    config = {"job": job.to_json()}
                    server(traced, Context(1, SUPERLINK_NODE_ID, {}, RecordDict(), config))
                    if not observer.stopped_for:
                        break
                weather.damage(folder / "checkpoint")
    finally:
        Checkpoints.note = noting  # type: ignore[method-assign]
    ledger = observer.ledger or PrivacyLedger(delta=1e-5)
    found = Evidence(
        job, trace, observer.rounds, ledger, observer.model, rolled_back=weather.rolled_back
    )
    return violations(found), found, weather


def campaign(rounds: int, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Hold runs until so many rounds are over; return figures, with all that was broken."""
    held, survived, done, broken = 0, 0, Counter[str](), list[str]()
    run = 0
    while held < rounds:
        name = f"{seed}/{run}"
        place = folder / f"virtual-{run}"
        place.mkdir(parents=True)
        found, evidence, weather = play(name, place, signed=run % 4 != 3)
        held += len(evidence.rounds)
        survived += sum(bool(line["survivors"]) for line in evidence.rounds)
        done += weather.done
        broken += [f"virtual run {name}: {text}" for text in found]
        for text in found:
            say(f"BROKEN {name}: {text}")
        run += 1
    return {"rounds": held, "completed": survived, "faults": dict(done), "broken": broken}
