"""One attempt at one round: the protocol's server states driven over a Flower grid.

This adapter owns what `fedcore.secagg` refuses to own: messages, deadlines, bytes on
the wire. A reply that is an error, malformed, late or not allowed counts as silence;
its device is out of the round, and the round goes on while enough are left. A device that
declines is lost like a silent one, but not waited for, and its reason is counted. A request
or reply that got lost on the way is no silence yet: the device is asked the same again.

Where more clients are invited than are wanted, a stage ends when enough have answered
(`strategies.goals`); the others are out of the round, and not lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedcore.crypto import ParallelAgreement, ParallelMasks
from fedcore.engine import Clock
from fedcore.errors import (
    ConfigurationError,
    LocalProtocolError,
    PeerProtocolError,
    RoundAbortedError,
)
from fedcore.pipeline import (
    BOX,
    RECORD,
    BoundRound,
    ClearSum,
    CoordinatorNoise,
    Envelope,
    MeanUpdate,
    decode_sum,
    typed,
)
from fedcore.pipeline.decline import add_reasons, reason_in
from fedcore.pipeline.download import LACKING
from fedcore.pipeline.envelope import Stage
from fedcore.ring import packed_size, unpack
from fedcore.secagg import Plan, decode, encode, invite
from fedcore.secagg.fields import write_u32
from fedcore.secagg.messages import (
    Advertisement,
    EncryptedShares,
    Endorsement,
    Endorsements,
    MaskedInput,
    Request,
    Reveal,
)
from fedcore.secagg.seed_helper import HelperPlan, SeedBox, collect
from fedcore.secagg.server import (
    AwaitingEndorsements,
    AwaitingInputs,
    AwaitingReveals,
    AwaitingShares,
)
from fedcore.telemetry import Traffic
from fedcore.vectors import Layout, RingVector
from strategies.contributions import Contributions, record_of
from strategies.counted import Counted
from strategies.downlink import ModelDownload
from strategies.exchange import RETRY_AT_ONCE, exchange
from strategies.goals import AFTER_THE_VECTORS, WITH_GRACE, in_turn, stage_goals, stages_of
from strategies.helper_client import Helper
from strategies.refusals import add_refusals, refusal_of
from strategies.stragglers import Stragglers
from strategies.wire_bytes import array_bytes, content_bytes

R = TypeVar("R", Advertisement, EncryptedShares, MaskedInput, Endorsement, Reveal)
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Invited:
    """One client of the round.

    Attributes:
        node_id: Flower's id of its node.
        label: Its name in the fleet.
    """

    node_id: int
    label: str


@dataclass(slots=True)
class SecureRound:
    """One attempt; counts what it sends and receives as it goes.

    Attributes:
        grid: Carries the messages.
        clock: For the deadlines.
        bound: The round.
        clients: By index in the plan.
        content: What the strategy sends to every client: model and configuration.
        message_type: Flower's type of the strategy's messages.
        weight_key: Name of the metric that weighs the mean.
        identity_keys: Of the clients, in the same order; empty if they do not sign.
        helper: The second party, if the plan wants one.
        noise: What the coordinator adds to the sum, if the plan wants that.
        download: Brings the model to nodes that have an older one; None to send all of it.
        counted: What each node is told of its earlier uploads, with error feedback.
        unix_time: For the expiry of certificates.
        retry_after: Seconds before a client is asked again, see `strategies.exchange`.
        revealing: Told how many clients a sum is over, just before it can be known.
        wanted: How many updates are enough; None for all.
        patience: For how many seconds a stage waits for which nodes; None for the plan's.
        layout: Of the model; needed if not every device trains all of it.
        stragglers: Takes what nobody waits for any more.
        traffic: Bytes so far.
        lost: How many clients each stage lost.
        surplus: How many clients were not waited for, because enough had answered.
        silent: Indices of the clients that gave no usable answer when they were asked.
        declined: How many of those said why, by reason.
        refusals: How many of those failed or refused, by what their programs said.
        joined: Indices of the clients that advertised keys.
        survivors: Indices of the clients in the sum that was revealed; none if none was. The
            ledger counts them, whether or not a mean came of it.
    """

    grid: Grid
    clock: Clock
    bound: BoundRound
    clients: tuple[Invited, ...]
    content: RecordDict
    message_type: str
    weight_key: str
    identity_keys: tuple[bytes, ...] = ()
    helper: Helper | None = None
    noise: CoordinatorNoise | None = None
    unix_time: Callable[[], float] = time.time
    retry_after: Sequence[float] = RETRY_AT_ONCE
    download: ModelDownload | None = None
    counted: Counted = field(default_factory=Counted)
    revealing: Callable[[int], None] = lambda _: None
    wanted: int | None = None
    patience: Callable[[Stage, Iterable[int]], float] | None = None
    layout: Layout | None = None
    stragglers: Stragglers = field(default_factory=Stragglers)
    traffic: Traffic = field(default_factory=Traffic)
    lost: dict[str, int] = field(default_factory=dict)
    surplus: int = 0
    silent: set[int] = field(default_factory=set)
    declined: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    joined: frozenset[int] = frozenset()
    survivors: frozenset[int] = frozenset()
    _said: Contributions = field(init=False)
    _usable: int = 0
    _unheard: set[int] = field(default_factory=set)
    _cut_off: int = 0
    _goals: Mapping[Stage, int] = field(init=False)

    def __post_init__(self) -> None:
        """Find out how many answers are enough."""
        self._said = Contributions(self.bound, self.layout)
        invited = len(self.clients)
        self._goals = stage_goals(
            stages_of(self.bound),
            invited=invited,
            wanted=invited if self.wanted is None else self.wanted,
            minimum=self.bound.minimum_survivors,
        )

    def run(self) -> MeanUpdate:
        """Return the mean over the survivors.

        Raises:
            RoundAbortedError: Too few clients are left.
        """
        if self.bound.secagg is not None:
            total, survivors = self._add_under_masks(self.bound.secagg)
        elif self.bound.helper is not None:
            total, survivors = self._add_with_helper(self.bound.helper)
        elif self.bound.compressor is not None:
            return self._add_compressed()
        else:
            total, survivors = self._add_in_the_clear()
        self.survivors = survivors
        names, stale = self._said.names_of(survivors), self._stale(survivors)
        factor = self._said.factor_of(survivors)
        return decode_sum(
            self.bound, total, len(survivors), names, self.noise, stale=stale, factor=factor
        )

    def _add_under_masks(self, plan: Plan) -> tuple[RingVector, frozenset[int]]:
        joining, invitations = invite(plan, self.identity_keys)
        now = int(self.unix_time())
        joining = self._stage(
            "advertise",
            invitations,
            Advertisement,
            joining,
            lambda state, client, message: state.on_advertisement(client, message, now),
        )
        self.joined = frozenset(joining.advertisements)
        sharing, rosters = joining.close()
        sharing = self._stage("share", rosters, EncryptedShares, sharing, AwaitingShares.on_shares)
        adding, deliveries = sharing.close()
        adding = self._stage("upload", deliveries, MaskedInput, adding, AwaitingInputs.on_input)
        unmasking, requests = self._endorse(adding) if plan.authenticated else adding.close()
        self._said.check(unmasking.survivors)
        self.revealing(len(unmasking.survivors))
        unmasking = self._stage("reveal", requests, Reveal, unmasking, AwaitingReveals.on_reveal)
        outcome = unmasking.close(ParallelMasks(), ParallelAgreement())
        return outcome.total, outcome.survivors

    def _endorse(
        self, adding: AwaitingInputs
    ) -> tuple[AwaitingReveals, Mapping[int, Endorsements]]:
        """Let the survivors agree on who they are before anything is revealed."""
        endorsing, requests = adding.endorse()
        endorsing = self._stage(
            "endorse", requests, Endorsement, endorsing, AwaitingEndorsements.on_endorsement
        )
        return endorsing.close()

    def _add_with_helper(self, plan: HelperPlan) -> tuple[RingVector, frozenset[int]]:
        """Add masked uploads; the helper takes the masks of all of them off at once."""
        if self.helper is None:
            msg = "secagg=seed_helper needs a helper: pass one to SecureGrid"
            raise ConfigurationError(msg)
        self.helper.open(plan)
        adding = collect(plan)
        requests = {client: write_u32(client) for client in range(plan.clients)}
        for client, reply in self._exchange("upload", requests):
            try:
                adding.check(client)
                vector = unpack(self._said.read(client, reply), plan.dim, plan.ring)
                box = SeedBox.from_bytes(typed(record_of(reply), BOX, bytes))
                if box.client != client:
                    continue
                self.helper.deposit(plan, box)
                adding = adding.on_input(client, vector)
            except PeerProtocolError:
                continue
            self._use(client)
        self._count_lost("upload", len(requests) - len(adding.survivors))
        unmasking, request = adding.close()
        self._said.check(request.survivors)
        self.revealing(len(request.survivors))
        try:
            outcome = unmasking.on_mask_sum(self.helper.close(plan, request))
        except PeerProtocolError as error:
            found = len(request.survivors)
            raise RoundAbortedError(
                stage="helper", needed=found, found=found, reason=str(error)
            ) from error
        return outcome.total, outcome.survivors

    def _add_in_the_clear(self) -> tuple[RingVector, frozenset[int]]:
        ring = self.bound.ring
        total, survivors = ring.zeros(self.bound.dim), set[int]()
        requests = dict.fromkeys(range(len(self.clients)), b"")
        for client, reply in self._exchange("upload", requests):
            try:
                total = total + unpack(self._said.read(client, reply), self.bound.dim, ring)
            except PeerProtocolError:
                continue
            survivors.add(client)
            self._use(client)
        self._check_survivors(survivors)
        return ring.reduce(total), frozenset(survivors)

    def _add_compressed(self) -> MeanUpdate:
        """Add updates that each client compressed in its own way."""
        adding, survivors = ClearSum.of(self.bound), set[int]()
        for client, reply in self._exchange("upload", dict.fromkeys(range(len(self.clients)), b"")):
            try:
                data = self._said.read(client, reply)
                adding = adding.add(data)
            except PeerProtocolError:
                continue
            payload = len(data) - packed_size(self.bound.dim, self.bound.ring.bits)
            self.traffic += Traffic(up_payload=payload)
            survivors.add(client)
            self._use(client)
        self._check_survivors(survivors)
        self.survivors = frozenset(survivors)
        return decode_sum(
            self.bound,
            self.bound.ring.reduce(adding.tally),
            len(survivors),
            self._said.names_of(survivors),
            updates=adding.reals,
            stale=self._stale(survivors),
            factor=self._said.factor_of(survivors),
        )

    def _stale(self, survivors: Iterable[int]) -> float | None:
        """Return the sum of the survivors' weights by staleness; None in a round."""
        buffer = self.bound.plan.buffer
        return None if buffer is None else buffer.total(survivors)

    def _check_survivors(self, survivors: Collection[int]) -> None:
        """Abort a round in the clear that too few clients answered, before it is decoded."""
        self._count_lost("upload", len(self.clients) - len(survivors))
        needed = self.bound.minimum_survivors
        if len(survivors) < needed:
            raise RoundAbortedError(stage="uploading", needed=needed, found=len(survivors))
        self._said.check_trainers(survivors)
        self.revealing(len(survivors))

    def _stage(
        self,
        stage: Stage,
        requests: Mapping[int, Request],
        kind: type[R],
        state: S,
        receive: Callable[[S, int, R], S],
    ) -> S:
        """Send one stage's requests and let the server's state take the replies."""
        plan = self.bound.secagg
        if plan is None:
            msg = "the plan has no parameters for masks"
            raise LocalProtocolError(msg)
        encoded = {client: encode(request, plan) for client, request in requests.items()}
        answered = 0
        for client, reply in self._exchange(stage, encoded):
            try:
                data = (
                    self._said.read(client, reply)
                    if kind is MaskedInput
                    else typed(record_of(reply), "message", bytes)
                )
                state = receive(state, client, decode(data, kind, plan))
            except PeerProtocolError:
                continue
            answered += 1
            self._use(client)
        self._count_lost(stage, len(requests) - answered)
        return state

    def _exchange(
        self, stage: Stage, requests: Mapping[int, bytes]
    ) -> Iterator[tuple[int, Message]]:
        """Yield the replies of one stage that are not errors, and count all bytes."""
        deadline = self.clock.now() + self._seconds(stage, requests)
        self._usable = 0
        self._unheard = set(requests)
        self.silent |= requests.keys()
        lacking: dict[int, bytes] = {}
        for client, reply in self._ask(stage, requests, deadline):
            if self.download is None or not _lacks_the_model(reply):
                yield client, reply
            else:
                lacking[client] = requests[client]
        self._unheard |= lacking.keys()
        if not self._enough(stage):
            for client, reply in self._ask(stage, lacking, deadline, whole=True):
                if not _lacks_the_model(reply):
                    yield client, reply
        self._cut_off = len(self._unheard) if self._enough(stage) else 0
        if stage not in AFTER_THE_VECTORS:  # there they are in the sum already
            self.surplus += self._cut_off

    def _seconds(self, stage: Stage, clients: Iterable[int]) -> float:
        """Return how long a stage waits for its clients: never longer than the plan says."""
        most = self.bound.plan.run.stage_seconds
        if self.patience is None:
            return most
        return min(most, self.patience(stage, [self.clients[index].node_id for index in clients]))

    def _enough(self, stage: Stage) -> bool:
        """Tell whether a stage may end although some have not answered."""
        goal = self._goals.get(stage)
        return goal is not None and self._usable >= goal

    def _use(self, client: int) -> None:
        """Note that a client gave a usable answer to this stage."""
        self._usable += 1
        self.silent.discard(client)

    def _ask(
        self,
        stage: Stage,
        requests: Mapping[int, bytes],
        deadline: float,
        *,
        whole: bool = False,
    ) -> Iterator[tuple[int, Message]]:
        """Yield the replies that are no errors and do not decline; `whole` sends all the model."""
        messages = {
            client: self._message(stage, client, requests[client], whole=whole)
            for client in self._order(requests)
        }
        replies = exchange(
            self.grid,
            messages,
            seconds=max(0.0, deadline - self.clock.now()),
            clock=self.clock,
            retry_after=self.retry_after,
            sent=self._count_sent,
            enough=partial(self._enough, stage),
            grace=stage in WITH_GRACE,
            stragglers=self.stragglers,
        )
        for client, reply in replies:
            self._unheard.discard(client)
            if (said := refusal_of(reply)) is not None:
                self.refusals = add_refusals(self.refusals, {said: 1})
            if reply.has_content() and not self._declines(client, reply):
                self._count_received(stage, reply)
                if stage == "upload" and self.download is not None:
                    self.download.answered(
                        self.clients[client].node_id, has_model=not _lacks_the_model(reply)
                    )
                yield client, reply

    def _order(self, requests: Mapping[int, bytes]) -> list[int]:
        """Return in which order clients are asked; it matters where the first are enough."""
        if not self._goals:
            return list(requests)
        plan = self.bound.plan
        labels = {client: self.clients[client].label for client in requests}
        return in_turn(requests, labels, f"{plan.run.seed}/{plan.round_number}")

    def _declines(self, client: int, reply: Message) -> bool:
        """Tell whether a device does not want to take part; count why."""
        reason = reason_in(reply.content.config_records.get(RECORD, ConfigRecord()))
        if reason is None:
            return False
        self.silent.discard(client)
        self.declined = add_reasons(self.declined, {reason: 1})
        self.traffic += Traffic(up_total=content_bytes(reply.content))
        return True

    def _message(self, stage: Stage, client: int, data: bytes, *, whole: bool = False) -> Message:
        first = stage == "advertise" or self.bound.secagg is None
        node_id = self.clients[client].node_id
        told = stage == "upload" and self.bound.plan.run.error_feedback
        envelope = Envelope(
            stage=stage,
            round_number=self.bound.plan.round_number,
            label=self.clients[client].label,
            plan=self.bound.plan.to_bytes() if first else b"",
            message=data,
            weight_key=self.weight_key,
            counted=self.counted.last(node_id) if told else 0,
        )
        content = RecordDict({RECORD: ConfigRecord(dict(envelope.to_fields()))})
        if stage == "upload":
            more = self.content
            if self.download is not None:
                more = self.download.for_node(node_id, whole=whole)
            for name, record in more.items():
                content[name] = record
        return Message(
            content,
            node_id,
            self.message_type,
            group_id=str(self.bound.plan.round_number),
            ttl=self.bound.plan.run.stage_seconds,
        )

    def _count_sent(self, message: Message) -> None:
        self.traffic += Traffic(
            down_payload=array_bytes(message.content),
            down_total=content_bytes(message.content),
            downloads=int(bool(message.content.array_records)),
        )

    def _count_received(self, stage: Stage, reply: Message) -> None:
        uploaded = stage == "upload" and not _lacks_the_model(reply)
        payload = packed_size(self.bound.update_dim, self.bound.ring.bits)
        self.traffic += Traffic(
            up_payload=payload if uploaded else 0,
            up_total=content_bytes(reply.content),
            uploads=int(uploaded),
        )

    def _count_lost(self, stage: Stage, missing: int) -> None:
        """Count who did not answer and was waited for."""
        if missing > self._cut_off:
            self.lost[stage] = missing - self._cut_off


def _lacks_the_model(reply: Message) -> bool:
    """Tell whether the device could not make the model from what it was sent."""
    return bool(reply.content.config_records.get(RECORD, ConfigRecord()).get(LACKING))
