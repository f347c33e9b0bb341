"""The client's state machine in one table, and the cell that holds a state.

    AwaitingRoster > AwaitingDelivery > AwaitingSurvivors >
        (AwaitingEndorsements, if the plan is authenticated) > Finished

`step` is the only function that an adapter needs. Everything outside the table
is refused before it reaches a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from fedcore.crypto import Entropy
from fedcore.errors import LocalProtocolError, PeerProtocolError, StateReusedError
from fedcore.secagg.client import (
    AwaitingDelivery,
    AwaitingEndorsements,
    AwaitingRoster,
    AwaitingSurvivors,
    ClientState,
    Finished,
)
from fedcore.secagg.identity import Identity
from fedcore.secagg.messages import Delivery, Endorsements, Reply, Request, Roster, Survivors
from fedcore.vectors import RingVector

Successors: TypeAlias = tuple[type[ClientState], ...]
CLIENT_TRANSITIONS: Final[Mapping[type[ClientState], Mapping[type[Request], Successors]]] = {
    AwaitingRoster: {Roster: (AwaitingDelivery,)},
    AwaitingDelivery: {Delivery: (AwaitingSurvivors,)},
    AwaitingSurvivors: {Survivors: (Finished, AwaitingEndorsements)},
    AwaitingEndorsements: {Endorsements: (Finished,)},
    Finished: {},
}


def expected_request(state: ClientState) -> type[Request] | None:
    """Return the one message that `state` waits for; None if it is final."""
    return next(iter(CLIENT_TRANSITIONS[type(state)]), None)


def step(
    state: ClientState,
    request: Request,
    *,
    entropy: Entropy,
    vector: RingVector | None = None,
    identity: Identity | None = None,
    now: int = 0,
) -> tuple[ClientState, Reply]:
    """Advance the client by one message.

    Args:
        state: Taken from its `OneShot`.
        request: From the server.
        entropy: Used by `Roster` only.
        vector: The input; needed by `Delivery` only, and given up: it is overwritten by
            the masked input, so that a device needs no memory for a second one.
        identity: Of this client; needed in authenticated rounds.
        now: Unix time in seconds; used by `Roster` in authenticated rounds.

    Raises:
        PeerProtocolError: `request` is not allowed in `state`, or breaks the protocol;
            this client leaves the round.
        RoundAbortedError: Too few peers are left.
        LocalProtocolError: `vector` is missing, or no element of the plan's domain.
    """
    match state, request:
        case AwaitingRoster(), Roster():
            return state.on_roster(request, entropy, identity=identity, now=now)
        case AwaitingDelivery(), Delivery():
            if vector is None:
                msg = "a Delivery is answered with the masked input, but no `vector` was passed"
                raise LocalProtocolError(msg)
            return state.on_delivery(request, vector, out=vector)
        case AwaitingSurvivors(), Survivors() if state.plan.authenticated:
            if identity is None:
                msg = "an authenticated round needs this device's `identity` at every step"
                raise LocalProtocolError(msg)
            return state.endorse(request, identity)
        case AwaitingSurvivors(), Survivors():
            return state.on_survivors(request)
        case AwaitingEndorsements(), Endorsements():
            return state.on_endorsements(request)
        case _:
            allowed = [message.__name__ for message in CLIENT_TRANSITIONS[type(state)]]
            msg = (
                f"{type(request).__name__} arrived in state {type(state).__name__}, "
                f"which allows {allowed or 'nothing'}"
            )
            raise PeerProtocolError(msg)


@dataclass(slots=True)
class OneShot:
    """A protocol state that can be taken only once.

    States are values, so nothing in them stops a caller from stepping the same
    one twice; two answers to two different survivor lists unmask a client.
    Adapters therefore keep their state in a OneShot, and persist the successor
    before the reply leaves the process.
    """

    _state: ClientState | None = field(repr=False)

    def take(self) -> ClientState:
        """Return the state, and forget it.

        Raises:
            StateReusedError: It was taken before.
        """
        if self._state is None:
            msg = "this protocol state was already used; start a new round"
            raise StateReusedError(msg)
        state, self._state = self._state, None
        return state
