"""A coordinator whose every message a test can hold back, repeat or change.

It drives real ClientApps, each with a Context of its own, through the stages of a
round. Messages of Flower need an identity: use it inside `Identity(...).assumed()`.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import DevicePolicy, secagg_mod
from clients.client_app import replayed_entropy
from clients.guard import Guard
from clients.identity import IdentitySource
from clients.journal import JournalSource
from clients.simulated import simulated_identities, simulated_root
from fedcore.engine import to_record
from fedcore.pipeline import (
    RECORD,
    VECTOR,
    Bonawitz,
    BoundRound,
    Envelope,
    MeanUpdate,
    RoundPlan,
    RunPlan,
    bind_round,
    decode_sum,
    model_digest,
)
from fedcore.pipeline.envelope import STAGES, Stage
from fedcore.secagg import Identity, decode, encode, invite, roster_digest
from fedcore.secagg.messages import (
    Advertisement,
    EncryptedShares,
    Endorsement,
    MaskedInput,
    Request,
    Reveal,
)

CLIENTS = 4
MODEL = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}
KINDS = {
    "advertise": (Advertisement, "on_advertisement"),
    "share": (EncryptedShares, "on_shares"),
    "upload": (MaskedInput, "on_input"),
    "endorse": (Endorsement, "on_endorsement"),
    "reveal": (Reveal, "on_reveal"),
}
SEED = 3
SIMULATED = simulated_identities(SEED)
AUTHORITY = simulated_root(SEED).public.raw.hex()
"""Enrolled all clients."""
UNSIGNED = RunPlan()
SIGNED = RunPlan(secagg=Bonawitz(authority=AUTHORITY))


@lru_cache
def ranked() -> list[Identity]:
    """Identities in the order of their keys: the first of them have the same ranks in any round."""
    nodes = [SIMULATED(new_context(client)) for client in range(300)]
    return sorted(nodes, key=lambda identity: identity.certificate.key)


def enrolled(context: Context) -> Identity:
    """The identity of a client, so that its index is its partition-id."""
    return ranked()[int(context.node_config["partition-id"])]


def stages_of(run: RunPlan) -> tuple[Stage, ...]:
    """The stages of a round under masks; survivors are endorsed by signed clients only."""
    signed = getattr(run.secagg, "authority", None) is not None
    return tuple(stage for stage in STAGES if signed or stage != "endorse")


def trained(client: int) -> np.ndarray:
    """The model that a client trains from `MODEL`."""
    return MODEL["w"] + np.float32(0.125 * (client + 1))


def train(message: Message, context: Context) -> RecordDict:
    """What a client sends without the mod."""
    client = int(context.node_config["partition-id"])
    context.state["visits"] = ConfigRecord({"last": client})
    metrics = MetricRecord({"num-examples": 100 + client, "loss": float(client)})
    return RecordDict({"arrays": to_record({"w": trained(client)}), "metrics": metrics})


def training_app(
    policy: DevicePolicy | None = None,
    *,
    seed: int | None = SEED,
    identity: IdentitySource | None = enrolled,
    journal: JournalSource | None = None,
    guard: Guard | None = None,
    unix_time: Callable[[], float] = lambda: 0.0,
    train: Callable[[Message, Context], RecordDict] = train,
    keep_answer: bool = True,
) -> ClientApp:
    """A ClientApp with the mod around a train function."""
    mod = secagg_mod(
        policy,
        entropy=None if seed is None else replayed_entropy(seed),
        identity=identity,
        journal=journal,
        guard=guard,
        unix_time=unix_time,
        keep_answer=keep_answer,
    )
    app = ClientApp(mods=[mod])

    @app.train()
    def train_message(message: Message, context: Context) -> Message:
        return Message(train(message, context), reply_to=message)

    return app


@dataclass
class Coordinator:
    """One attempt at one round; `advance` plays the stages before the one named."""

    app: ClientApp
    run: RunPlan = field(default_factory=RunPlan)
    changes: Mapping[str, Any] = field(default_factory=dict)
    contexts: list[Context] = field(default_factory=list)
    keys: tuple[bytes, ...] = ()
    between: Callable[[Context], Context] = lambda context: context

    def __post_init__(self) -> None:
        self.content = RecordDict({"arrays": to_record(MODEL), "config": ConfigRecord({"lr": 0.1})})
        values = {
            "run": self.run,
            "run_id": "1",
            "round_number": 1,
            "attempt": 1,
            "clients": CLIENTS,
            "dim": 12,
            "model_digest": model_digest(MODEL),
        } | dict(self.changes)
        if not self.contexts:
            self.contexts = [new_context(client) for client in range(CLIENTS)]
        keys: tuple[bytes, ...] = ()
        if isinstance(self.run.secagg, Bonawitz) and self.run.secagg.authority is not None:
            keys = self.keys or tuple(i.certificate.key for i in ranked()[: values["clients"]])
            values = {"roster": roster_digest(keys).hex()} | values
        self.plan = RoundPlan(**values)
        self.state: Any = None
        self.requests: dict[int, Request] = {}
        if self.bound.secagg is not None:
            self.state, self.requests = invite(self.bound.secagg, keys)

    @property
    def bound(self) -> BoundRound:
        """The round, as the coordinator understands it."""
        return bind_round(self.plan)

    def message(self, stage: str, client: int = 0, /, **changes: Any) -> Message:
        """The request of a stage; `changes` replace parts of the envelope or the `content`."""
        content = changes.pop("content", self.content if stage == "upload" else RecordDict())
        request = self.requests.get(client)
        data = encode(request, self.bound.secagg) if request is not None else b""
        envelope = Envelope(
            stage=stage,  # type: ignore[arg-type]
            round_number=self.plan.round_number,
            label=str(client),
            plan=self.plan.to_bytes() if stage == "advertise" or not data else b"",
            message=data,
            weight_key="num-examples",
        )
        fields = replace(envelope, **changes).to_fields()
        records = {RECORD: ConfigRecord(dict(fields)), **dict(deepcopy(content).items())}
        return Message(RecordDict(records), 1000 + client, "train")

    def ask(self, client: int, message: Message) -> Message:
        """Let one client answer; its Context goes through `between` first."""
        self.contexts[client] = self.between(self.contexts[client])
        return self.app(message, self.contexts[client])

    def play(self, stage: str) -> dict[int, Message]:
        """Play one stage with everybody, and go on to the next."""
        kind, receive = KINDS[stage]
        replies = {
            client: self.ask(client, self.message(stage, client)) for client in self.requests
        }
        for client, reply in replies.items():
            data = payload(reply)
            step = getattr(self.state, receive)
            self.state = step(client, decode(data, kind, self.bound.secagg))  # type: ignore[type-var]
        signed = self.bound.secagg is not None and self.bound.secagg.authenticated
        endorsing = stage == "upload" and signed
        closed = self.state.endorse() if endorsing else self.state.close()
        if stage == "reveal":
            self.state = closed
        else:
            self.state, self.requests = closed
        return replies

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What is played, in order."""
        return stages_of(self.run)

    def advance(self, stage: str) -> "Coordinator":
        """Play all stages before `stage`."""
        for name in self.stages[: self.stages.index(stage)]:  # type: ignore[arg-type]
            self.play(name)
        return self

    def finish(self) -> MeanUpdate:
        """Play all stages and decode the sum."""
        replies: dict[int, Message] = {}
        for name in self.stages:
            played = self.play(name)
            replies = played if name == "upload" else replies
        names = [tuple(reply.content[RECORD]["metrics"]) for reply in replies.values()]
        return decode_sum(self.bound, self.state.total, len(self.state.survivors), names)


def new_context(client: int, **config: str) -> Context:
    """What a node that has just started knows; `config` is its owner's."""
    return Context(1, 1000 + client, {"partition-id": client, **config}, RecordDict(), {})


def payload(reply: Message) -> bytes:
    """The protocol message of a reply."""
    arrays = reply.content.array_records.get(f"{RECORD}.{VECTOR}", ArrayRecord())
    return arrays[VECTOR].data if VECTOR in arrays else reply.content[RECORD]["message"]
