"""The Flower side of a client's protocol state: bytes in, bytes out.

This adapter owns everything that `fedcore.secagg` refuses to own: Flower's Message,
the Context that survives between messages, and the rule that a state is gone before
its reply leaves. A device answers one attempt of one round at a time, never goes back
to an older one, and refuses a plan that is weaker than its own policy. It answers a
request once; if the same request comes again, its reply got lost, and the same bytes go
out again.

    app = ClientApp(mods=[secagg_mod()])

Any train function will do: it is called once per round with the message it would get
without this mod, and its reply is turned into an encoded, masked update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable, Mod

from clients.feedback import Feedback
from clients.guard import Guard, guard_of
from clients.identity import IdentitySource, identity_of
from clients.journal import Answer, JournalSource, journal_of
from clients.memory import ProtocolMemory
from clients.participation import spacing_of
from clients.policy import DevicePolicy
from clients.received import (
    Received,
    bind,
    check_layers,
    class_in,
    measurements,
    seat_in,
    single_arrays,
    stage_of,
)
from clients.requests import request_digest
from clients.trained import KeptUpdate
from clients.words import kept_here
from fedcore.crypto import Entropy, SystemEntropy
from fedcore.engine import to_arrays, to_record
from fedcore.errors import PeerProtocolError
from fedcore.pipeline import (
    BOX,
    PART,
    RECORD,
    VECTOR,
    VECTOR_TYPE,
    BoundRound,
    Buffer,
    ByClass,
    Envelope,
    LocalUpdate,
    RoundPlan,
    Upload,
    layers_of,
    make_upload,
    model_digest,
    sent_by,
)
from fedcore.pipeline.decline import DECLINE_CODE, DECLINED, Reason
from fedcore.pipeline.download import DOWNLOAD, LACKING, MODEL, UPDATE, UPDATE_TYPE, Download
from fedcore.pipeline.envelope import CHECK_IN, IDENTIFY, STAGES, Stage
from fedcore.ring import pack
from fedcore.secagg import (
    Identity,
    Plan,
    decode,
    dump_state,
    encode,
    expected_request,
    join,
    load_state,
    step,
)
from fedcore.secagg.client import AwaitingDelivery
from fedcore.secagg.identity import Credential
from fedcore.secagg.messages import Delivery, Invitation, Reply
from fedcore.secagg.seed_helper import HelperPlan, mask_and_seal
from fedcore.vectors import Layout, RingVector

EntropySource: TypeAlias = Callable[[Context], Entropy]
"""Gives a node its randomness; the operating system's unless a simulation replays."""
_WORK: Final = frozenset((MessageType.TRAIN, MessageType.EVALUATE))


def secagg_mod(
    policy: DevicePolicy | None = None,
    *,
    identity: IdentitySource | None = None,
    journal: JournalSource | None = None,
    guard: Guard | None = None,
    entropy: EntropySource | None = None,
    unix_time: Callable[[], float] = time.time,
    keep_answer: bool = True,
) -> Mod:
    """Return the mod that makes a ClientApp's training replies part of a secure sum.

    Args:
        policy: What this device demands; the defaults demand masks.
        identity: Gives the identity of an enrolled device, which signs its keys; by
            default the files that the node's configuration names, see `clients.identity`.
        journal: Gives what this device has answered, on disk; by default the file that
            the node's configuration names as `journal`. Without one, a device that is
            restarted, or restored from a copy, in the middle of a round can be asked twice.
        guard: Tells whether this device works now; by default within the limits that the
            node's configuration sets, see `clients.guard`. It is asked before a round, before
            training, and before what is no part of a secure round.
        entropy: For simulations that must be repeatable; never set it on a device.
        unix_time: For the expiry of certificates.
        keep_answer: Whether the last reply is kept in the Context, so that a coordinator
            that did not get it may ask again. It takes the memory of one packed update a
            node, and on Ray its way through every pickled Context: a simulation of many
            nodes that loses no replies does without.
    """
    source = entropy or _system_entropy
    device = Device(
        policy or DevicePolicy(),
        identity or identity_of,
        journal or journal_of,
        guard or guard_of,
        unix_time,
        keep_answer,
    )

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        with kept_here("the device", context.node_config):
            if RECORD not in message.content.config_records:
                return _outside_of_rounds(device, message, context, call_next)
            return _Session(message, context, call_next, device, source(context)).answer()

    return mod


@dataclass(frozen=True, slots=True)
class Device:
    """What stays the same on a device from message to message."""

    policy: DevicePolicy
    identity: IdentitySource
    journal: JournalSource
    guard: Guard
    unix_time: Callable[[], float]
    keep_answer: bool


def _outside_of_rounds(
    device: Device, message: Message, context: Context, call_next: ClientAppCallable
) -> Message:
    """Answer what is no part of a secure round; the guard keeps training and evaluation."""
    if message.metadata.message_type.partition(".")[0] in _WORK:
        reason = device.guard(context)
        if reason is not None:
            return Message(Error(DECLINE_CODE, reason), reply_to=message)
    with kept_here("the app", context.node_config):
        return call_next(message, context)


def _system_entropy(context: Context) -> Entropy:
    del context
    return SystemEntropy()


@dataclass(slots=True)
class _Session:
    """One message, answered."""

    message: Message
    context: Context
    call_next: ClientAppCallable
    device: Device
    entropy: Entropy
    part: int = 0

    def answer(self) -> Message:
        """Advance this node's protocol by one message, or repeat what it said last.

        Raises:
            PeerProtocolError: The coordinator broke the protocol or the policy.
        """
        envelope = Envelope.from_fields(self.message.content.config_records[RECORD])
        if envelope.stage == IDENTIFY:
            reason = self.device.guard(self.context)
            return self._identify() if reason is None else self._decline(reason)
        if envelope.stage == CHECK_IN:
            reason = self.device.guard(self.context)
            return self._check_in(envelope) if reason is None else self._decline(reason)
        memory = ProtocolMemory(self.context)
        plan = RoundPlan.from_bytes(envelope.plan) if envelope.plan else None
        if plan is not None:
            self.device.policy.check(plan)
        if not self.device.keep_answer:
            if plan is not None and (reason := self.device.guard(self.context)) is not None:
                return self._decline(reason)
            return self._proceed(plan, envelope, memory) if self._download(memory) else self._lack()
        request = request_digest(self.message)  # now: training may change the message
        said = memory.answer_to(request)
        if said is not None:
            return Message(said, reply_to=self.message)
        if plan is not None and (reason := self.device.guard(self.context)) is not None:
            return self._decline(reason)  # nothing was begun, so nothing is kept
        if not self._download(memory):
            return self._lack()  # not an answer: the same request may come with all of the model
        reply = self._proceed(plan, envelope, memory)
        memory.keep_answer(request, reply.content)
        return reply

    def _proceed(
        self, plan: RoundPlan | None, envelope: Envelope, memory: ProtocolMemory
    ) -> Message:
        """Begin the round of `plan`; without one, take the next step of the last."""
        if plan is not None:
            return self._begin(plan, envelope, memory)
        begun, state = memory.take()
        bound = bind(begun)
        if bound.secagg is None:
            msg = "a protocol message arrived in a round without masks"
            raise PeerProtocolError(msg)
        return self._step(bound, bound.secagg, envelope, memory, state)

    def _begin(self, plan: RoundPlan, envelope: Envelope, memory: ProtocolMemory) -> Message:
        bound = bind(plan)
        if plan.buffer is not None:
            KeptUpdate(self.context).check()
        memory.begin(plan)
        first: Stage = "upload" if bound.secagg is None else "advertise"
        self._claim(plan, first, envelope)
        if bound.secagg is not None:
            return self._join(bound, bound.secagg, envelope, memory)
        seat = None if bound.helper is None else seat_in(envelope)
        upload = self._upload(bound, envelope, seat)
        if bound.helper is not None:
            return self._seal(bound, bound.helper, envelope, upload)
        return self._reply_with_vector(
            plan, pack(upload.vector, bound.ring) + upload.payload, upload
        )

    def _lack(self) -> Message:
        """Ask for all of the model."""
        return Message(RecordDict({RECORD: ConfigRecord({LACKING: True})}), reply_to=self.message)

    def _decline(self, reason: Reason) -> Message:
        """Say why this device does not take part, and nothing else."""
        record = ConfigRecord({DECLINED: reason})
        return Message(RecordDict({RECORD: record}), reply_to=self.message)

    def _download(self, memory: ProtocolMemory) -> bool:
        """Put the model into the message, where the train function expects it.

        Returns:
            Whether it could be made from what this device has; true if it is there already.
        """
        content = self.message.content
        if DOWNLOAD not in content.config_records:
            return True
        arrays = content.array_records.get(MODEL, ArrayRecord())
        update = arrays.get(UPDATE)
        if update is None or update.stype != UPDATE_TYPE:
            msg = f"an update of the model must be an array of type {UPDATE_TYPE!r}"
            raise PeerProtocolError(msg)
        download = Download.from_fields(content.config_records[DOWNLOAD], update.data)
        rest = {key: value for key, value in content.items() if key not in (DOWNLOAD, MODEL)}
        if download.name in rest:
            msg = f"the model's record {download.name!r} must not be in the message twice"
            raise PeerProtocolError(msg)
        try:
            model = download.apply(memory.model())
        except PeerProtocolError:
            return False
        memory.keep_model(model)
        arrays = to_record(download.layout.unflatten(model))
        self.message.content = RecordDict({**rest, download.name: arrays})
        return True

    def _identify(self) -> Message:
        """Say who this node is; that is no part of any round, and changes nothing here."""
        identity = self.device.identity(self.context)
        if identity is None:
            msg = "the coordinator asks who this device is, but it is not enrolled: enroll it first"
            raise PeerProtocolError(msg)
        answer = Credential.of_node(identity, self.context.node_id)
        record = ConfigRecord({"message": answer.to_bytes()})
        return Message(RecordDict({RECORD: record}), reply_to=self.message)

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
        state, reply = join(
            invitation,
            self._round_entropy(bound),
            identity=self._identity(plan.authenticated),
            now=int(self.device.unix_time()),
        )
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
        self._claim(bound.plan, stage_of(kind, plan), envelope)
        request = decode(envelope.message, kind, plan)
        if kind is Delivery and (reason := self.device.guard(self.context)) is not None:
            return self._decline(reason)  # the state was taken: this device is out of the round
        upload: Upload | None = None
        vector: RingVector | None = None
        if kind is Delivery:
            seat = state.client if isinstance(state, AwaitingDelivery) else None
            upload = self._upload(bound, envelope, seat)
            vector = upload.vector
        successor, reply = step(
            state,
            request,
            entropy=self._round_entropy(bound),
            vector=vector,
            identity=self._identity(plan.authenticated),
            now=int(self.device.unix_time()),
        )
        memory.put(bound.plan, dump_state(successor))
        if upload is not None:
            return self._reply_with_vector(bound.plan, encode(reply, plan), upload)
        return self._reply(reply, plan)

    def _identity(self, wanted: bool) -> Identity | None:  # noqa: FBT001 - one caller's fact
        """Return this device's identity if the round wants one."""
        return self.device.identity(self.context) if wanted else None

    def _claim(self, plan: RoundPlan, due: Stage, envelope: Envelope) -> None:
        """Note on disk that this stage is being answered, before its answer exists.

        What is due follows from our own state: the coordinator's label must agree with
        it, or one state could be answered under two names.
        """
        if envelope.stage != due:
            msg = f"a {envelope.stage} request arrived where {due} is due"
            raise PeerProtocolError(msg)
        journal = self.device.journal(self.context)
        if journal is not None:
            answer = Answer(plan.round_number, plan.attempt, STAGES.index(due))
            journal.claim(plan.run_id, answer, spacing_of(plan))

    def _seal(
        self, bound: BoundRound, plan: HelperPlan, envelope: Envelope, upload: Upload
    ) -> Message:
        """Mask the upload under a fresh seed, and seal the seed to the pinned helper."""
        if self.device.policy.helper_key is None:
            msg = "this device pins no seed helper; it does not take part"
            raise PeerProtocolError(msg)
        signed = getattr(bound.plan.run.secagg, "authority", None) is not None
        identity = self._identity(signed)
        if signed and identity is None:
            msg = "the round wants signed boxes, but this device is not enrolled: enroll it first"
            raise PeerProtocolError(msg)
        sealed = mask_and_seal(
            upload.vector,
            plan,
            seat_in(envelope),
            pinned_key=bytes.fromhex(self.device.policy.helper_key),
            entropy=self._round_entropy(bound).child("helper"),
            identity=identity,
        )
        return self._reply_with_vector(
            bound.plan, pack(sealed.vector, plan.ring), upload, {BOX: sealed.box.to_bytes()}
        )

    def _upload(self, bound: BoundRound, envelope: Envelope, seat: int | None) -> Upload:
        """Encode what training changed, in this round or before."""
        if bound.plan.buffer is not None:
            return self._upload_kept(bound, bound.plan.buffer, seat)
        received = self._received()
        if received.digest != bound.plan.model_digest:
            msg = (
                "the model must be the one that the round's keys are bound to, found another: "
                "this device does not take part"
            )
            raise PeerProtocolError(msg)
        check_layers(bound.plan, layers_of(bound.plan.run, received.layout))
        update, reply = self._train(received, envelope.weight_key)
        index = class_in(bound.plan, reply)
        update = replace(update, delta=sent_by(bound.plan, received.layout, index, update.delta))
        feedback = Feedback(self.context)
        earlier = feedback.start(bound.plan, envelope.counted)
        entropy = self._round_entropy(bound).child("upload")
        upload = make_upload(bound, update, earlier, entropy)
        feedback.keep(bound.plan, upload, earlier)
        self.part = index
        return upload

    def _call_train(self) -> Message:
        """Call the train function; what it says of examples when it fails stays here."""
        with kept_here("the train function", self.context.node_config):
            return self.call_next(self.message, self.context)

    def _upload_kept(self, bound: BoundRound, buffer: Buffer, seat: int | None) -> Upload:
        """Encode what this device trained when it was asked to, weighed by its age."""
        trained = KeptUpdate(self.context).take()
        staleness = buffer.seated(trained.model_digest, seat)
        check_layers(bound.plan, trained.layers if bound.plan.run.names_layers else ())
        entropy = self._round_entropy(bound).child("upload")
        return make_upload(bound, trained.update, None, entropy, staleness=staleness)

    def _check_in(self, envelope: Envelope) -> Message:
        """Train, keep the update, and say no more than that it is there."""
        received = self._received()
        update, _ = self._train(received, envelope.weight_key)
        KeptUpdate(self.context).keep(received.digest, received.layout, update)
        record = ConfigRecord({CHECK_IN: True})
        return Message(RecordDict({RECORD: record}), reply_to=self.message)

    def _received(self) -> Received:
        """Return the model and what came with it."""
        content = RecordDict(
            {name: record for name, record in self.message.content.items() if name != RECORD}
        )
        arrays = to_arrays(single_arrays(content, "the coordinator's message"))
        layout = Layout.of(arrays)
        return Received(content, layout, model_digest(arrays), layout.flatten(arrays))

    def _train(self, received: Received, weight_key: str) -> tuple[LocalUpdate, RecordDict]:
        """Call the train function on what was received; return what changed, and all it said."""
        self.message.content = received.content
        reply = self._call_train()
        trained = single_arrays(reply.content, "the train function's reply")
        after = received.layout.flatten(to_arrays(trained))
        examples, metrics = measurements(reply.content, weight_key)
        return LocalUpdate(after - received.model, examples, metrics), reply.content

    def _round_entropy(self, bound: BoundRound) -> Entropy:
        plan = bound.plan
        return self.entropy.child(f"round={plan.round_number}/attempt={plan.attempt}")

    def _reply(self, reply: Reply, plan: Plan) -> Message:
        record = ConfigRecord({"message": encode(reply, plan)})
        return Message(RecordDict({RECORD: record}), reply_to=self.message)

    def _reply_with_vector(
        self,
        plan: RoundPlan,
        data: bytes,
        upload: Upload,
        more: Mapping[str, bytes] | None = None,
    ) -> Message:
        array = Array(dtype="uint8", shape=(len(data),), stype=VECTOR_TYPE, data=data)
        names = ConfigRecord({"metrics": list(upload.metric_names), **(more or {})})
        if isinstance(plan.run.shares, ByClass):
            names[PART] = self.part
        # Two records of one name cannot share a RecordDict: arrays and names travel apart.
        return Message(
            RecordDict({RECORD: names, f"{RECORD}.{VECTOR}": ArrayRecord({VECTOR: array})}),
            reply_to=self.message,
        )
