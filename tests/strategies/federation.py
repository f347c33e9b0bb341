"""A small federation that tests can record, tamper with and silence.

Every client pulls the model towards its own target, which follows from its
partition-id; weights and metrics are numbers that stand out. All parts are real:
ClientApps with the mod, Flower's strategies, the in-process grid.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from clients import DevicePolicy, secagg_mod
from clients.client_app import replayed_entropy
from clients.guard import Guard
from clients.identity import IdentitySource
from clients.simulated import simulated_identities, simulated_root
from fedcore.engine import Clock, Fault, InProcessGrid, WrappedGrid, to_arrays, to_record
from fedcore.engine.nodes import isolated
from fedcore.pipeline import RECORD, Bonawitz, RunPlan
from fedcore.pipeline.envelope import IDENTIFY, STAGES, Stage
from fedcore.telemetry import RoundReport
from strategies import SecureGrid

SHAPES = {"w": (5, 8), "b": (3,)}
OPEN = DevicePolicy(require_masks=False)
ROOMY = RunPlan(dropout=0.3, secagg=Bonawitz(corrupt=0.0))
"""With ten clients: seven survivors are enough."""
ENROLLED = simulated_identities(1)
AUTHORITY = simulated_root(1).public.raw.hex()
"""Enrolled all clients."""
SIGNED = RunPlan(dropout=0.3, secagg=Bonawitz(corrupt=0.0, authority=AUTHORITY))
"""The same, and everybody signs."""


def stages_of(plan: RunPlan) -> tuple[Stage, ...]:
    """The stages of a round under masks; signed clients say who they are, and endorse."""
    signed = getattr(plan.secagg, "authority", None) is not None
    return tuple(s for s in EVERY if signed or s not in {"identify", "endorse"})


EVERY: tuple[Stage, ...] = (IDENTIFY, *STAGES)
EVERY_STAGE = [
    pytest.param(plan, stage, id=f"{name}-{stage}")
    for name, plan in (("unsigned", ROOMY), ("signed", SIGNED))
    for stage in stages_of(plan)
]


def initial() -> ArrayRecord:
    """A model of 43 weights."""
    rng = np.random.default_rng(7)
    return to_record(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    )


def target_of(client: int) -> dict[str, np.ndarray]:
    """Where a client pulls the model to."""
    rng = np.random.default_rng(100 + client)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def examples_of(client: int) -> int:
    """How many examples a client claims."""
    return 301 + 37 * client


def loss_of(client: int) -> float:
    """What a client measures."""
    return 2.1234567 + 0.3456789 * client


def pull(message: Message, client: int) -> RecordDict:
    """What a client trains: half of the way to its target, less with FedProx."""
    config = message.content.config_records.get("config", ConfigRecord())
    rate = 0.5 / (1 + float(config.get("proximal-mu", 0.0)))
    (record,) = message.content.array_records.values()
    target = target_of(client)
    trained = {
        name: (array.numpy() + rate * (target[name] - array.numpy())).astype(np.float32)
        for name, array in record.items()
    }
    metrics = {
        "loss": loss_of(client),
        "per-class": [0.5 * client, 1.0 - client],
        "num-examples": examples_of(client),
    }
    return RecordDict({"arrays": to_record(trained), "metrics": MetricRecord(metrics)})


def client_app(
    *outer: Callable[..., Message],
    policy: DevicePolicy | None = None,
    seed: int | None = None,
    train: Callable[[Message, int], RecordDict] = pull,
    identity: IdentitySource = ENROLLED,
    unix_time: Callable[[], float] = time.time,
    guard: Guard | None = None,
) -> ClientApp:
    """A ClientApp with the mod; `outer` mods see what the network sees."""
    entropy = None if seed is None else replayed_entropy(seed)
    mod = secagg_mod(policy, entropy=entropy, identity=identity, unix_time=unix_time, guard=guard)
    return _with_functions(ClientApp(mods=[*outer, mod]), train)


def plain_app(train: Callable[[Message, int], RecordDict] = pull) -> ClientApp:
    """The same ClientApp without the mod."""
    return _with_functions(ClientApp(), train)


def _with_functions(app: ClientApp, train: Callable[[Message, int], RecordDict]) -> ClientApp:
    @app.train()
    def train_message(message: Message, context: Any) -> Message:
        return Message(train(message, context.node_config["partition-id"]), reply_to=message)

    @app.evaluate()
    def evaluate_message(message: Message, context: Any) -> Message:
        client = context.node_config["partition-id"]
        metrics = MetricRecord({"eval-loss": float(client), "num-examples": 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@dataclass
class RecordingGrid(WrappedGrid):
    """Keeps a copy of every message that crosses, in either direction."""

    inner: Any
    sent: list[Message] = field(default_factory=list)
    received: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.inner)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        self.sent += batch
        return super().push_messages(batch)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for reply in super().pull_messages(message_ids):
            self.received.append(reply)
            yield reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        batch = list(messages)
        self.sent += batch
        replies = list(super().send_and_receive(batch, timeout=timeout))
        self.received += replies
        return replies

    @property
    def crossed(self) -> list[Message]:
        """All of them."""
        return [*self.sent, *(reply for reply in self.received if reply.has_content())]


@dataclass
class Played:
    """What a strategy made of some rounds."""

    result: Any
    reports: list[RoundReport]
    wire: RecordingGrid
    grid: SecureGrid | None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The last model that was aggregated."""
        return to_arrays(self.result.arrays)


def play(
    app: ClientApp | None = None,
    plan: RunPlan | None = None,
    *,
    strategy: Any = None,
    clients: int = 10,
    rounds: int = 1,
    secure: bool = True,
    wrap: Callable[[Any], Any] = lambda grid: grid,
    model: ArrayRecord | None = None,
    timeout: float = 3600,
    **options: Any,
) -> Played:
    """Run a strategy on a recorded grid; `wrap` puts faults between it and the rest."""
    reports: list[RoundReport] = []
    with InProcessGrid(app or client_app(seed=1), [{}] * clients, {}) as nodes:
        wire = RecordingGrid(nodes)
        grid: Any = wrap(wire)
        top = None
        if secure:
            grid = top = SecureGrid(grid, plan, on_round=reports.append, **options)
        result = (strategy or FedAvg(fraction_evaluate=0.0)).start(
            grid=grid, initial_arrays=model or initial(), num_rounds=rounds, timeout=timeout
        )
    return Played(result, reports, wire, top)


def weighted_mean(survivors: Iterable[int], start: ArrayRecord | None = None) -> dict[str, Any]:
    """What one round of FedAvg over `survivors` gives."""
    group = list(survivors)
    weights = np.array([examples_of(client) for client in group], np.float64)
    start = start or initial()
    return {
        name: sum(
            weight * (array.numpy() + 0.5 * (target_of(client)[name] - array.numpy()))
            for client, weight in zip(group, weights, strict=True)
        )
        / weights.sum()
        for name, array in start.items()
    }


def assert_close(
    arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float
) -> None:
    """Same names in the same order, and equal within `atol`."""
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected[name], atol=atol, err_msg=name)


def stage_of(message: Message) -> str:
    """The protocol stage of a request; empty for other messages."""
    records = message.content.config_records if message.has_content() else {}
    return str(records[RECORD]["stage"]) if RECORD in records else ""


def node_of(client: int) -> int:
    """Node id of a partition on the in-process grid."""
    return 1000 + client


def tampering(
    victims: Sequence[int], stage: str, tamper: Callable[[RecordDict], RecordDict]
) -> Callable[..., Message]:
    """A mod by which `victims` answer one stage with what `tamper` makes of their reply."""

    def mod(message: Message, context: Any, call_next: Any) -> Any:
        asked = stage_of(message)
        reply = call_next(message, context)
        if asked != stage or context.node_config["partition-id"] not in victims:
            return reply
        return Message(tamper(isolated(reply.content)), reply_to=message)

    return mod


def losing(victims: Sequence[int], stage: str, fault: Fault = Fault.DROPPED) -> Callable[..., Any]:
    """A script for `FaultyGrid`: `victims` are gone before, or after, one stage."""

    def script(message: Message) -> Fault | None:
        gone = message.metadata.dst_node_id in map(node_of, victims)
        return fault if gone and stage_of(message) == stage else None

    return script


class SilentGrid(WrappedGrid):
    """Some nodes never answer some stages, not even with an error.

    Args:
        grid: Carries the rest.
        silent: Whether a message falls into the void.
        clock: If given, `late_seconds` pass before the void answers after all.
    """

    def __init__(
        self,
        grid: Any,
        silent: Callable[[Message], bool],
        clock: Clock | None = None,
        late_seconds: float | None = None,
    ) -> None:
        super().__init__(grid)
        self._silent = silent
        self._clock = clock
        self._late = late_seconds
        self._due: dict[str, float] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        ids = list(super().push_messages(batch))
        for message, key in zip(batch, ids, strict=True):
            if self._silent(message):
                late = None if self._clock is None else self._late
                self._due[key] = float("inf") if late is None else self._clock.now() + late
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now = 0.0 if self._clock is None else self._clock.now()
        return super().pull_messages([key for key in message_ids if self._due.get(key, 0.0) <= now])
