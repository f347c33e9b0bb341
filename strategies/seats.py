"""Asking nodes who they are, and giving each the index that its key has.

A round of enrolled devices has their identity keys in its plan, so the coordinator asks
each node once, before the first round that wants it. A node answers with its certificate
and signs its own number. Whoever does not answer, is not certified, or runs a second node
with the same key is not invited; it is asked again the next time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedcore.engine import Clock
from fedcore.errors import PeerProtocolError
from fedcore.pipeline import RECORD, BoundRound, Envelope, typed
from fedcore.pipeline.decline import add_reasons, reason_in
from fedcore.pipeline.envelope import IDENTIFY
from fedcore.secagg import Certificate
from fedcore.secagg.identity import Credential
from fedcore.telemetry import Traffic
from strategies.contributions import record_of
from strategies.exchange import RETRY_AT_ONCE, exchange
from strategies.refusals import add_refusals, refusal_of
from strategies.secure_round import Invited
from strategies.wire_bytes import content_bytes


@dataclass(frozen=True, slots=True)
class Seats:
    """Who is invited.

    Attributes:
        clients: By index.
        identity_keys: Theirs, strictly increasing; empty if nobody signs.
        traffic: What asking took.
        declined: How many said that they do not take part now, by reason.
        refusals: What the programs of those that failed said.
        silent: Ids of the nodes that did not prove who they are.
    """

    clients: tuple[Invited, ...]
    identity_keys: tuple[bytes, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)
    declined: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    silent: frozenset[int] = frozenset()


@dataclass(slots=True)
class Registry:
    """Which enrolled device runs which node.

    Attributes:
        grid: Carries the questions.
        clock: For their deadline.
        authority: Public key of the root that enrolled the devices, 32 bytes.
        unix_time: For the expiry of certificates.
        retry_after: As in `exchange`.
        certificates: What is known, by node id.
    """

    grid: Grid
    clock: Clock
    authority: bytes
    unix_time: Callable[[], float] = time.time
    retry_after: Sequence[float] = RETRY_AT_ONCE
    certificates: dict[int, Certificate] = field(default_factory=dict)

    def seat(
        self,
        bound: BoundRound,
        asked: Sequence[Invited],
        message_type: str,
        *,
        enough: int | None = None,
    ) -> Seats:
        """Return those of `asked` that are enrolled, in the order of their keys.

        Args:
            bound: The round that they are to be invited to.
            asked: The cohort.
            message_type: Flower's type of the round's messages.
            enough: Of how many to know; None for all.
        """
        now = int(self.unix_time())
        expired = [node for node, known in self.certificates.items() if known.expires_at <= now]
        self.forget(expired)
        found = self._ask(bound, asked, message_type, now, enough or len(asked))
        by_key: dict[bytes, Invited] = {}
        for client in asked:
            if client.node_id in self.certificates:
                by_key.setdefault(self.certificates[client.node_id].key, client)
        keys = sorted(by_key)
        return replace(found, clients=tuple(by_key[key] for key in keys), identity_keys=tuple(keys))

    def forget(self, nodes: Iterable[int]) -> None:
        """Ask these nodes again the next time: a device may have been enrolled anew."""
        for node in nodes:
            self.certificates.pop(node, None)

    def _ask(
        self,
        bound: BoundRound,
        asked: Sequence[Invited],
        message_type: str,
        now: int,
        enough: int,
    ) -> Seats:
        """Ask whom we do not know yet; a node that does not prove who it is stays unknown.

        Returns:
            What was said, without the seats.
        """
        questions = {
            client.node_id: _question(bound, client, message_type)
            for client in asked
            if client.node_id not in self.certificates
        }
        known = len(asked) - len(questions)
        sent: list[Message] = []
        silent = set(questions)
        received, declined, refusals = 0, dict[str, int](), dict[str, int]()
        replies = exchange(
            self.grid,
            questions,
            seconds=bound.plan.run.stage_seconds,
            clock=self.clock,
            retry_after=self.retry_after,
            sent=sent.append,
            enough=lambda: known >= enough,
            grace=True,
        )
        for node_id, reply in replies:
            if (said := refusal_of(reply)) is not None:
                refusals = add_refusals(refusals, {said: 1})
            if not reply.has_content():
                continue
            received += content_bytes(reply.content)
            try:
                fields = record_of(reply)
                reason = reason_in(fields)
                if reason is not None:
                    silent.discard(node_id)
                    declined = add_reasons(declined, {reason: 1})
                    continue
                answer = Credential.from_bytes(typed(fields, "message", bytes))
                answer.check_node(node_id, self.authority, now)
            except PeerProtocolError:
                continue
            self.certificates[node_id] = answer.certificate
            silent.discard(node_id)
            known += 1
        asked_bytes = sum(content_bytes(message.content) for message in sent)
        return Seats(
            clients=(),
            traffic=Traffic(down_total=asked_bytes, up_total=received),
            declined=declined,
            refusals=refusals,
            silent=frozenset(silent),
        )


def _question(bound: BoundRound, client: Invited, message_type: str) -> Message:
    envelope = Envelope(
        stage=IDENTIFY,
        round_number=bound.plan.round_number,
        label=client.label,
        plan=b"",
        message=b"",
        weight_key="",
    )
    return Message(
        RecordDict({RECORD: ConfigRecord(dict(envelope.to_fields()))}),
        client.node_id,
        message_type,
        group_id=str(bound.plan.round_number),
        ttl=bound.plan.run.stage_seconds,
    )
