"""Canonical bytes of every protocol message.

    message    = magic(2) version(1) kind(1) body
    map<T>     = count(u32) { peer(u32) T }     peers strictly increasing
    set        = count(u32) { peer(u32) }       strictly increasing

In authenticated rounds an invitation ends with the identity keys of all that are invited,
and an advertisement's two keys are followed by a certificate and a signature.
Everything is little-endian and of fixed or stated width, so each message has one encoding
and a decoder needs no limits but the length of its input. The masked vector is
packed to the ring's width; its length follows from the plan.

A decoder returns a message or raises `PeerProtocolError`, never anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, TypeVar, cast

from fedcore.crypto import DIGEST_BYTES, KEY_BYTES, SHARE_BYTES, TAG_BYTES
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.ring import pack, unpack
from fedcore.secagg.fields import Reader, write_map, write_set, write_u32
from fedcore.secagg.identity import SIGNATURE_BYTES, Credential
from fedcore.secagg.messages import (
    Advertisement,
    Delivery,
    EncryptedShares,
    Endorsement,
    Endorsements,
    Invitation,
    MaskedInput,
    Request,
    Reveal,
    Roster,
    SecAggMessage,
    Survivors,
)
from fedcore.secagg.plan import PROTOCOL_VERSION, Plan
from fedcore.secagg.seating import IDENTITY_BYTES

BOX_BYTES: Final = 2 * SHARE_BYTES + TAG_BYTES
_MAGIC: Final = b"fC"
_VERSION: Final = PROTOCOL_VERSION
_HEADER: Final = 4
_PLAN_BYTES: Final = len(Plan(2, 1, 1, 2, 1, 1).to_bytes())

_KINDS: Final[Mapping[type, int]] = {
    Invitation: 1,
    Advertisement: 2,
    Roster: 3,
    EncryptedShares: 4,
    Delivery: 5,
    MaskedInput: 6,
    Survivors: 7,
    Endorsement: 8,
    Endorsements: 9,
    Reveal: 10,
}
_Short: TypeAlias = Request | Advertisement | EncryptedShares | Endorsement | Reveal
M = TypeVar("M", bound=SecAggMessage)


def encode(message: SecAggMessage, plan: Plan) -> bytes:
    """Return the canonical bytes of `message`."""
    header = _MAGIC + bytes((_VERSION, _KINDS[type(message)]))
    if isinstance(message, MaskedInput):  # the long one: putting parts together copies it
        return pack(message.vector, plan.ring, prefix=header)
    return header + _body(message)


def decode(data: bytes, kind: type[M], plan: Plan | None = None) -> M:
    """Return the message of type `kind` that `data` encodes.

    Args:
        data: Bytes from the network, trusted in nothing.
        kind: The type that the current state waits for.
        plan: The round's plan; None only for an `Invitation`, which carries it.

    Raises:
        PeerProtocolError: `data` is not the canonical encoding of such a message.
    """
    expected = _MAGIC + bytes((_VERSION, _KINDS[kind]))
    if data[:_HEADER] != expected:
        msg = f"expected a {kind.__name__} (header {expected.hex()}), found {data[:4].hex()}"
        raise PeerProtocolError(msg)
    reader = Reader(data, _HEADER)
    message = cast(M, _parse(reader, kind, plan))
    reader.end(kind.__name__)
    return message


def _body(message: _Short) -> bytes:
    match message:
        case Invitation(client, invited, identity_keys):
            return write_u32(client) + invited.to_bytes() + b"".join(identity_keys)
        case Advertisement():
            return _write_advertisement(message)
        case Roster(keys):
            return write_map({peer: _write_advertisement(key) for peer, key in keys.items()})
        case EncryptedShares(boxes, commitment):
            return commitment + write_map(boxes)
        case Delivery(entries) | Endorsements(entries):
            return write_map(entries)
        case Survivors(clients):
            return write_set(clients)
        case Endorsement(signature):
            return signature
        case Reveal(self_mask_shares, mask_key_shares):
            return write_map(self_mask_shares) + write_map(mask_key_shares)


def _parse(reader: Reader, kind: type, plan: Plan | None) -> SecAggMessage:
    if kind is Invitation:
        return _parse_invitation(reader)
    if plan is None:
        msg = f"a {kind.__name__} cannot be read before the plan is known"
        raise PeerProtocolError(msg)
    parsers: dict[type, Callable[[], SecAggMessage]] = {
        Advertisement: lambda: _parse_advertisement(reader, plan),
        Roster: lambda: Roster(reader.map(lambda: _parse_advertisement(reader, plan))),
        EncryptedShares: lambda: _parse_shares(reader),
        Delivery: lambda: Delivery(reader.bytes_map(BOX_BYTES)),
        MaskedInput: lambda: MaskedInput(
            unpack(reader.rest(), plan.dim, plan.ring, writable=False)
        ),
        Survivors: lambda: Survivors(frozenset(reader.map(lambda: None))),
        Endorsement: lambda: Endorsement(reader.take(SIGNATURE_BYTES)),
        Endorsements: lambda: Endorsements(reader.bytes_map(SIGNATURE_BYTES)),
        Reveal: lambda: _parse_reveal(reader),
    }
    return parsers[kind]()


def _parse_invitation(reader: Reader) -> Invitation:
    client = reader.u32()
    try:
        plan = Plan.from_bytes(reader.take(_PLAN_BYTES))
    except ConfigurationError as error:
        msg = f"the server's plan is refused: {error}"
        raise PeerProtocolError(msg) from error
    if client >= plan.clients:
        msg = f"the invited index must be below {plan.clients}, found {client}"
        raise PeerProtocolError(msg)
    count = plan.clients if plan.authenticated else 0
    return Invitation(client, plan, tuple(reader.take(IDENTITY_BYTES) for _ in range(count)))


def _write_advertisement(message: Advertisement) -> bytes:
    credential = b"" if message.credential is None else message.credential.to_bytes()
    return message.mask_key + message.share_key + credential


def _parse_advertisement(reader: Reader, plan: Plan) -> Advertisement:
    mask_key, share_key = reader.take(KEY_BYTES), reader.take(KEY_BYTES)
    credential = Credential.read(reader) if plan.authenticated else None
    return Advertisement(mask_key, share_key, credential)


def _parse_shares(reader: Reader) -> EncryptedShares:
    commitment = reader.take(DIGEST_BYTES)
    return EncryptedShares(reader.bytes_map(BOX_BYTES), commitment)


def _parse_reveal(reader: Reader) -> Reveal:
    reveal = Reveal(reader.bytes_map(SHARE_BYTES), reader.bytes_map(SHARE_BYTES))
    both = reveal.self_mask_shares.keys() & reveal.mask_key_shares.keys()
    if both:
        msg = f"a Reveal must hold one secret per peer, found both for {sorted(both)}"
        raise PeerProtocolError(msg)
    return reveal
