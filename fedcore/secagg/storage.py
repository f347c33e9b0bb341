"""A client's state as bytes, for the time between two messages.

A process may end after each message, so the state must survive outside it. The
bytes hold secret keys: they belong where only this device reads them, and are
replaced by the successor before the reply leaves.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Final

from fedcore.crypto import KEY_BYTES, SEED_BYTES, SHARE_BYTES
from fedcore.errors import ConfigurationError, LocalProtocolError, PeerProtocolError
from fedcore.secagg.client import (
    AwaitingDelivery,
    AwaitingEndorsements,
    AwaitingRoster,
    AwaitingSurvivors,
    ClientState,
    Finished,
)
from fedcore.secagg.fields import Reader, write_map, write_set, write_u32
from fedcore.secagg.plan import Plan
from fedcore.secagg.seating import IDENTITY_BYTES

_VERSION: Final = 2
_PLAN_BYTES: Final = len(Plan(2, 1, 1, 2, 1, 1).to_bytes())
_TAGS: Final[dict[type[ClientState], int]] = {
    AwaitingRoster: 1,
    AwaitingDelivery: 2,
    AwaitingSurvivors: 3,
    Finished: 4,
    AwaitingEndorsements: 5,
}


def dump_state(state: ClientState) -> bytes:
    """Return the bytes of `state`; they are secret."""
    head = bytes((_VERSION, _TAGS[type(state)]))
    match state:
        case AwaitingRoster(client, plan, mask_secret, share_secret, keys):
            body = mask_secret + share_secret + write_map(keys)
            return head + _identity(client, plan) + body
        case AwaitingDelivery(client, plan, mask_secret, seed, pair_keys, mask_keys, keys):
            body = mask_secret + seed + write_map(pair_keys) + write_map(mask_keys)
            return head + _identity(client, plan) + body + write_map(keys)
        case AwaitingSurvivors(client, plan, seed_shares, key_shares, keys):
            body = write_map(seed_shares) + write_map(key_shares)
            return head + _identity(client, plan) + body + write_map(keys)
        case AwaitingEndorsements(client, plan, survivors, seed_shares, key_shares, keys):
            body = write_map(seed_shares) + write_map(key_shares) + write_map(keys)
            return head + _identity(client, plan) + write_set(survivors) + body
        case Finished():
            return head


def load_state(data: bytes) -> ClientState:
    """Return the state that `data` holds.

    Raises:
        LocalProtocolError: `data` is damaged or from another version of fedcore.
    """
    try:
        return _parse(Reader(data))
    except (PeerProtocolError, ConfigurationError) as error:
        msg = "the stored protocol state is damaged or of another version; join a new round"
        raise LocalProtocolError(msg) from error


def _parse(reader: Reader) -> ClientState:
    version, tag = reader.take(2)
    if version != _VERSION or tag not in _TAGS.values():
        msg = f"expected state version {_VERSION}, found {version}"
        raise PeerProtocolError(msg)
    state: ClientState = Finished() if tag == _TAGS[Finished] else _parse_active(reader, tag)
    reader.end("a stored state")
    return state


def _parse_active(reader: Reader, tag: int) -> ClientState:
    client, plan = reader.u32(), Plan.from_bytes(reader.take(_PLAN_BYTES))
    if client >= plan.clients:
        msg = f"the stored index must be below {plan.clients}, found {client}"
        raise PeerProtocolError(msg)
    if tag == _TAGS[AwaitingRoster]:
        secrets = reader.take(KEY_BYTES), reader.take(KEY_BYTES)
        neighbours = plan.neighbours_of(client)
        return AwaitingRoster(client, plan, *secrets, _parse_keys(reader, neighbours, plan))
    if tag == _TAGS[AwaitingDelivery]:
        mask_secret, seed = reader.take(KEY_BYTES), reader.take(SEED_BYTES)
        maps = _parse_maps(reader, KEY_BYTES, client, plan)
        return AwaitingDelivery(client, plan, mask_secret, seed, *maps)
    if tag == _TAGS[AwaitingSurvivors]:
        return AwaitingSurvivors(client, plan, *_parse_maps(reader, SHARE_BYTES, client, plan))
    survivors = frozenset(reader.map(lambda: None))
    maps = _parse_maps(reader, SHARE_BYTES, client, plan)
    return AwaitingEndorsements(client, plan, survivors, *maps)


def _parse_maps(
    reader: Reader, size: int, client: int, plan: Plan
) -> tuple[dict[int, bytes], dict[int, bytes], dict[int, bytes]]:
    """Return two maps over the same neighbours of `client`, and their identity keys."""
    first, second = reader.bytes_map(size), reader.bytes_map(size)
    if first.keys() != second.keys() or not first.keys() <= plan.neighbours_of(client):
        msg = f"expected two secrets of each stored peer, found {len(first)} and {len(second)}"
        raise PeerProtocolError(msg)
    return first, second, _parse_keys(reader, first.keys(), plan)


def _parse_keys(reader: Reader, peers: AbstractSet[int], plan: Plan) -> dict[int, bytes]:
    """Return the identity key of each of `peers`; none in an unauthenticated round."""
    keys = reader.bytes_map(IDENTITY_BYTES)
    if keys.keys() != (peers if plan.authenticated else set()):
        msg = f"expected the identity key of each stored peer, found {len(keys)}"
        raise PeerProtocolError(msg)
    return keys


def _identity(client: int, plan: Plan) -> bytes:
    return write_u32(client) + plan.to_bytes()
