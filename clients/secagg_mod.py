"""The Flower side of a client's protocol state: bytes in, bytes out.

This adapter owns everything that `fedcore.secagg` refuses to own: Flower's Message,
the Context that survives between messages, and the rule that a state is gone before
its reply leaves. A device answers one attempt of one round at a time, never goes back
to an older one, and refuses a plan that is weaker than its own policy.

    app = ClientApp(mods=[secagg_mod()])

Any train function will do: it is called once per round with the message it would get
without this mod, and its reply is turned into an encoded, masked update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from clients.memory import ProtocolMemory
from fedcore.crypto import Entropy, SystemEntropy
from fedcore.engine import to_arrays
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.pipeline import (
    RECORD,
    VECTOR,
    VECTOR_TYPE,
    Bonawitz,
    BoundRound,
    Envelope,
    LocalUpdate,
    RoundPlan,
    Upload,
    bind_round,
    make_upload,
    model_digest,
)
from fedcore.ring import pack
from fedcore.secagg import (
    Plan,
    decode,
    dump_state,
    encode,
    expected_request,
    join,
    load_state,
    step,
)
from fedcore.secagg.messages import Delivery, Invitation, Reply
from fedcore.vectors import Layout, RingVector

EntropySource: TypeAlias = Callable[[Context], Entropy]
"""Gives a node its randomness; the operating system's unless a simulation replays."""


@dataclass(frozen=True, slots=True)
class DevicePolicy:
    """What a device demands of every round, whatever the coordinator says.

    Attributes:
        minimum_cohort: Fewer invited clients are refused.
        require_masks: Whether uploads in the clear are refused.
        minimum_noise_multiplier: Less noise in the sum is refused; 0 demands none.
    """

    minimum_cohort: int = 2
    require_masks: bool = True
    minimum_noise_multiplier: float = 0.0

    def check(self, plan: RoundPlan) -> None:
        """Refuse a plan that is weaker than this policy.

        Raises:
            PeerProtocolError: Names the rule, and both values.
        """
        run = plan.run
        noise = getattr(run.privacy, "noise_multiplier", 0.0)
        for broken, rule in (
            (
                plan.clients < self.minimum_cohort,
                f"at least {self.minimum_cohort} invited clients, found {plan.clients}",
            ),
            (
                self.require_masks and not isinstance(run.secagg, Bonawitz),
                f"masked uploads, found secagg={run.secagg.kind}",
            ),
            (
                noise < self.minimum_noise_multiplier,
                f"a noise multiplier of at least {self.minimum_noise_multiplier}, found {noise}",
            ),
        ):
            if broken:
                msg = f"this device's policy demands {rule}; it does not take part"
                raise PeerProtocolError(msg)


def secagg_mod(policy: DevicePolicy | None = None, *, entropy: EntropySource | None = None) -> Mod:
    """Return the mod that makes a ClientApp's training replies part of a secure sum.

    Args:
        policy: What this device demands; the defaults demand masks.
        entropy: For simulations that must be repeatable; never set it on a device.
    """
    source = entropy or _system_entropy
    demands = policy or DevicePolicy()

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if RECORD not in message.content.config_records:
            return call_next(message, context)
        session = _Session(message, context, call_next, demands, source(context))
        return session.answer()

    return mod


def _system_entropy(context: Context) -> Entropy:
    del context
    return SystemEntropy()


@dataclass(slots=True)
class _Session:
    """One message, answered."""

    message: Message
    context: Context
    call_next: ClientAppCallable
    policy: DevicePolicy
    entropy: Entropy

    def answer(self) -> Message:
        """Advance this node's protocol by one message.

        Raises:
            PeerProtocolError: The coordinator broke the protocol or the policy.
        """
        envelope = Envelope.from_fields(self.message.content.config_records[RECORD])
        memory = ProtocolMemory(self.context)
        if envelope.plan:
            plan = RoundPlan.from_bytes(envelope.plan)
            self.policy.check(plan)
            bound = _bind(plan)
            memory.begin(plan)
            if bound.secagg is None:
                upload = self._upload(bound, memory, envelope.weight_key)
                return self._reply_with_vector(pack(upload.vector, bound.ring), upload)
            return self._join(bound, bound.secagg, envelope, memory)
        plan, state = memory.take()
        bound = _bind(plan)
        if bound.secagg is None:
            msg = "a protocol message arrived in a round without masks"
            raise PeerProtocolError(msg)
        return self._step(bound, bound.secagg, envelope, memory, state)

    def _join(
        self, bound: BoundRound, plan: Plan, envelope: Envelope, memory: ProtocolMemory
    ) -> Message:
        invitation = decode(envelope.message, Invitation)
        if invitation.plan != plan:
            msg = (
                "the parameters of the masks must be those that follow from the round's plan; "
                "found others: this device does not take part"
            )
            raise PeerProtocolError(msg)
        state, reply = join(invitation, self._round_entropy(bound))
        memory.put(bound.plan, dump_state(state))
        return self._reply(reply, plan)

    def _step(
        self,
        bound: BoundRound,
        plan: Plan,
        envelope: Envelope,
        memory: ProtocolMemory,
        stored: bytes,
    ) -> Message:
        state = load_state(stored)
        kind = expected_request(state)
        if kind is None:
            msg = f"a {envelope.stage} request arrived after this device's round was finished"
            raise PeerProtocolError(msg)
        if (envelope.stage == "upload") != (kind is Delivery):
            msg = f"a {envelope.stage} request arrived where a {kind.__name__} is due"
            raise PeerProtocolError(msg)
        request = decode(envelope.message, kind, plan)
        upload: Upload | None = None
        vector: RingVector | None = None
        if kind is Delivery:
            upload = self._upload(bound, memory, envelope.weight_key)
            vector = upload.vector
        successor, reply = step(state, request, entropy=self._round_entropy(bound), vector=vector)
        memory.put(bound.plan, dump_state(successor))
        if upload is not None:
            return self._reply_with_vector(encode(reply, plan), upload)
        return self._reply(reply, plan)

    def _upload(self, bound: BoundRound, memory: ProtocolMemory, weight_key: str) -> Upload:
        """Train, and encode what changed."""
        content = RecordDict(
            {name: record for name, record in self.message.content.items() if name != RECORD}
        )
        received = _single_arrays(content, "the coordinator's message")
        arrays = to_arrays(received)
        if model_digest(arrays) != bound.plan.model_digest:
            msg = (
                "the model must be the one that the round's keys are bound to, found another: "
                "this device does not take part"
            )
            raise PeerProtocolError(msg)
        layout = Layout.of(arrays)
        before = layout.flatten(arrays)
        self.message.content = content
        reply = self.call_next(self.message, self.context)
        trained = _single_arrays(reply.content, "the train function's reply")
        after = layout.flatten(to_arrays(trained))
        examples, metrics = _measurements(reply.content, weight_key)
        upload = make_upload(
            bound,
            LocalUpdate(after - before, examples, metrics),
            memory.residual(bound.plan),
            self._round_entropy(bound).child("upload"),
        )
        memory.keep_residual(bound.plan, upload.residual)
        return upload

    def _round_entropy(self, bound: BoundRound) -> Entropy:
        plan = bound.plan
        return self.entropy.child(f"round={plan.round_number}/attempt={plan.attempt}")

    def _reply(self, reply: Reply, plan: Plan) -> Message:
        record = ConfigRecord({"message": encode(reply, plan)})
        return Message(RecordDict({RECORD: record}), reply_to=self.message)

    def _reply_with_vector(self, data: bytes, upload: Upload) -> Message:
        array = Array(dtype="uint8", shape=(len(data),), stype=VECTOR_TYPE, data=data)
        names = ConfigRecord({"metrics": list(upload.metric_names)})
        # Two records of one name cannot share a RecordDict: arrays and names travel apart.
        return Message(
            RecordDict({RECORD: names, f"{RECORD}.{VECTOR}": ArrayRecord({VECTOR: array})}),
            reply_to=self.message,
        )


def _bind(plan: RoundPlan) -> BoundRound:
    try:
        return bind_round(plan)
    except ConfigurationError as error:
        msg = f"the coordinator's plan cannot work: {error}"
        raise PeerProtocolError(msg) from error


def _single_arrays(content: RecordDict, where: str) -> ArrayRecord:
    if len(content.array_records) != 1:
        msg = f"{where} must hold exactly one ArrayRecord, found {len(content.array_records)}"
        raise ConfigurationError(msg)
    return next(iter(content.array_records.values()))


def _measurements(content: RecordDict, weight_key: str) -> tuple[int, Mapping[str, float]]:
    """Return the weight and the other metrics; lists become ``name[0], name[1], ...``."""
    if len(content.metric_records) != 1:
        msg = (
            "the train function's reply must hold exactly one MetricRecord, "
            f"found {len(content.metric_records)}"
        )
        raise ConfigurationError(msg)
    record = dict(next(iter(content.metric_records.values())))
    weight = record.pop(weight_key, None)
    if not isinstance(weight, (int, float)) or not np.isfinite(weight) or weight < 0:
        msg = f"the train function must report {weight_key!r} as a number of 0 or more"
        raise ConfigurationError(msg)
    metrics: dict[str, float] = {}
    for name, value in sorted(record.items()):
        if isinstance(value, list):
            metrics |= {f"{name}[{place}]": float(item) for place, item in enumerate(value)}
        else:
            metrics[name] = float(value)
    return round(weight), metrics
