"""A whole round in memory: the protocol without a network.

Both ends run the real state machines and every message goes through the wire
format, so what passes here is what passes between a server and its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias, TypeVar

from fedcore.crypto import Entropy, SystemEntropy
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.secagg import server
from fedcore.secagg.client import ClientState, join
from fedcore.secagg.identity import Identity
from fedcore.secagg.machine import OneShot, step
from fedcore.secagg.messages import (
    Advertisement,
    ClientId,
    EncryptedShares,
    Endorsement,
    Invitation,
    MaskedInput,
    Reply,
    Request,
    Reveal,
)
from fedcore.secagg.plan import NOBODY, Plan
from fedcore.secagg.seating import roster_digest
from fedcore.secagg.server import Outcome
from fedcore.secagg.wire import decode, encode
from fedcore.vectors import RingVector

Stage: TypeAlias = Literal["advertise", "share", "upload", "endorse", "reveal"]
"""What a client sends; to drop before it means not to send it, nor anything later."""
STAGES: Final[tuple[Stage, ...]] = ("advertise", "share", "upload", "endorse", "reveal")
Drops: TypeAlias = Mapping[int, Stage]
R = TypeVar("R", Advertisement, EncryptedShares, MaskedInput, Endorsement, Reveal)
S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What a round reveals.

    Attributes:
        total: Exact sum of the survivors' inputs in the plan's ring, shape [plan.dim].
        survivors: The keys of `inputs` that are in it.
        sent_bytes: Bytes that each client sent, by key of `inputs`.
        received_bytes: Bytes that each client received.
    """

    total: RingVector = field(repr=False)
    survivors: frozenset[int]
    sent_bytes: Mapping[int, int]
    received_bytes: Mapping[int, int]


def run_round(
    inputs: Mapping[int, RingVector],
    plan: Plan,
    drops: Drops | None = None,
    *,
    entropy: Entropy | None = None,
    identities: Mapping[int, Identity] | None = None,
    now: int = 0,
) -> RoundResult:
    """Run one round of secure aggregation in memory.

    Args:
        inputs: Vector of each client, shape [plan.dim], elements of the plan's ring.
            There are `plan.clients` of them; any integers may name them.
        plan: The public parameters.
        drops: Who disappears, and before which message.
        entropy: The operating system's if None.
        identities: Of each client, by key of `inputs`; needed if the plan is authenticated.
            Their keys become the plan's roster if it names none.
        now: Unix time in seconds, for the certificates.

    Raises:
        ConfigurationError: `inputs` or `drops` do not fit the plan.
        PeerProtocolError: An identity is missing, there twice, expired or not certified by
            the plan's authority.
        RoundAbortedError: Too few clients are left at some stage.

    Example:
        >>> import numpy as np
        >>> from fedcore.secagg import make_plan
        >>> plan = make_plan(clients=5, dim=2, ring_bits=16)
        >>> inputs = {name: np.array([name, 1], np.uint16) for name in (10, 20, 30, 40, 50)}
        >>> run_round(inputs, plan).total.tolist()
        [150, 5]
    """
    names, drops, identity_keys = sorted(inputs), drops or {}, list[bytes]()
    if len(names) != plan.clients or not drops.keys() <= inputs.keys():
        msg = (
            f"expected inputs of {plan.clients} clients and drops among them, "
            f"found {len(names)} inputs and drops of {sorted(drops.keys() - inputs.keys())}"
        )
        raise ConfigurationError(msg)
    if plan.authenticated:
        names, identity_keys = _seated(names, identities or {})
        if plan.roster == NOBODY:
            plan = replace(plan, roster=roster_digest(identity_keys))
    vectors = {index: plan.ring.reduce(inputs[name]) for index, name in enumerate(names)}
    schedule = {names.index(name): STAGES.index(stage) for name, stage in drops.items()}
    known = {index: (identities or {}).get(name) for index, name in enumerate(names)}
    link = _Loopback(plan, vectors, schedule, entropy or SystemEntropy(), identities=known, now=now)
    outcome = link.run(identity_keys)
    return RoundResult(
        total=outcome.total,
        survivors=frozenset(names[index] for index in outcome.survivors),
        sent_bytes={name: link.sent[index] for index, name in enumerate(names)},
        received_bytes={name: link.received[index] for index, name in enumerate(names)},
    )


def _seated(
    names: Sequence[int], identities: Mapping[int, Identity]
) -> tuple[list[int], list[bytes]]:
    """Return the clients in the order of their identity keys, and these keys."""
    missing = set(names) - identities.keys()
    if missing:
        msg = f"the round wants signed keys, but clients {sorted(missing)} are not enrolled"
        raise PeerProtocolError(msg)
    keys = {name: identities[name].certificate.key for name in names}
    order = sorted(names, key=keys.__getitem__)
    return order, [keys[name] for name in order]


class _Loopback:
    """Carries bytes between one server and its clients, in order of the client index."""

    def __init__(
        self,
        plan: Plan,
        vectors: Mapping[ClientId, RingVector],
        drops: Mapping[ClientId, int],
        entropy: Entropy,
        *,
        identities: Mapping[ClientId, Identity | None],
        now: int,
    ) -> None:
        self.sent = dict.fromkeys(vectors, 0)
        self.received = dict.fromkeys(vectors, 0)
        self._plan = plan
        self._vectors = vectors
        self._drops = drops
        self._entropy = entropy
        self._identities = identities
        self._now = now
        self._states: dict[ClientId, OneShot] = {}

    def run(self, identity_keys: Sequence[bytes]) -> Outcome:
        joining, invitations = server.invite(self._plan, identity_keys)
        joining = self._exchange(
            0,
            invitations,
            Advertisement,
            joining,
            lambda state, client, message: state.on_advertisement(client, message, self._now),
        )
        sharing, rosters = joining.close()
        sharing = self._exchange(
            1, rosters, EncryptedShares, sharing, server.AwaitingShares.on_shares
        )
        adding, deliveries = sharing.close()
        adding = self._exchange(2, deliveries, MaskedInput, adding, server.AwaitingInputs.on_input)
        unmasking, requests = self._endorse(adding) if self._plan.authenticated else adding.close()
        unmasking = self._exchange(4, requests, Reveal, unmasking, server.AwaitingReveals.on_reveal)
        return unmasking.close()

    def _endorse(
        self, adding: server.AwaitingInputs
    ) -> tuple[server.AwaitingReveals, Mapping[ClientId, Request]]:
        """Let the survivors agree on who they are."""
        endorsing, requests = adding.endorse()
        endorsing = self._exchange(
            3, requests, Endorsement, endorsing, server.AwaitingEndorsements.on_endorsement
        )
        return endorsing.close()

    def _exchange(
        self,
        stage: int,
        requests: Mapping[ClientId, Request],
        kind: type[R],
        state: S,
        receive: Callable[[S, ClientId, R], S],
    ) -> S:
        """Send `requests` and let the server's state take the replies."""
        for client, request in requests.items():
            if self._drops.get(client, len(STAGES)) <= stage:
                continue
            data = encode(request, self._plan)
            self.received[client] += len(data)
            answer = encode(self._answer(client, data, type(request)), self._plan)
            self.sent[client] += len(answer)
            state = receive(state, client, decode(answer, kind, self._plan))
        return state

    def _answer(self, client: ClientId, data: bytes, kind: type[Request]) -> Reply:
        """Let one client take a step from bytes."""
        entropy = self._entropy.child(f"client={client}")
        reply: Reply
        state: ClientState
        if kind is Invitation:
            state, reply = join(
                decode(data, Invitation),
                entropy,
                identity=self._identities[client],
                now=self._now,
            )
        else:
            state, reply = step(
                self._states[client].take(),
                decode(data, kind, self._plan),
                entropy=entropy,
                vector=self._vectors[client],
                identity=self._identities[client],
                now=self._now,
            )
        self._states[client] = OneShot(state)
        return reply
