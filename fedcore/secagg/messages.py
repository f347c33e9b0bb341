"""The messages of a round, as values.

    server to client                client to server
    Invitation    the plan          Advertisement     two public keys
    Roster        peers' keys       EncryptedShares   one box per peer
    Delivery      peers' boxes      MaskedInput       the masked vector
    Survivors     whose input came  Endorsement       a signature on that
    Endorsements  peers' signatures Reveal            one share per peer

Endorsements are exchanged in authenticated rounds only; without identities a client
answers `Survivors` with its `Reveal`.

Peers are named by their index in the plan. A `Reveal` has one share per peer,
of one kind or the other: the type cannot express both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from fedcore.errors import PeerProtocolError
from fedcore.secagg.identity import Credential
from fedcore.secagg.plan import Plan
from fedcore.vectors import RingVector

ClientId: TypeAlias = int
"""Index of a client in the plan, 0..clients-1."""
Share: TypeAlias = bytes
Box: TypeAlias = bytes


@dataclass(frozen=True, slots=True)
class Invitation:
    """Asks one client to join.

    Attributes:
        client: Its index.
        plan: The round's.
        identity_keys: Of all that are invited, by index, 32 bytes each; empty if the round
            is not authenticated.
    """

    client: ClientId
    plan: Plan
    identity_keys: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True)
class Advertisement:
    """The public keys of one client for this round, 32 bytes each.

    Attributes:
        mask_key: Agrees on pairwise masks; its secret is shared among the peers.
        share_key: Agrees on the encryption of shares; its secret is never shared.
        credential: Whose keys they are; None if the round is not authenticated.
    """

    mask_key: bytes
    share_key: bytes
    credential: Credential | None = None


def check_advertisement(
    message: Advertisement, client: ClientId, plan: Plan, identity_key: bytes, now: int
) -> None:
    """Accept the keys of `client` only if the enrolled device at its index signed them.

    Args:
        message: The keys.
        client: Whose they are to be.
        plan: The round's.
        identity_key: At its place in the list of the invited, 32 bytes.
        now: Unix time in seconds.

    Raises:
        PeerProtocolError: Not signed, by somebody else, for another round, or expired.
    """
    if message.credential is None:
        msg = f"the keys of client {client} must be signed, found no credential"
        raise PeerProtocolError(msg)
    if message.credential.certificate.key != identity_key:
        msg = f"client {client} must be the device whose key has that index, found another"
        raise PeerProtocolError(msg)
    message.credential.certificate.check(plan.authority, now)
    message.credential.check(
        digest=plan.digest(),
        client=client,
        mask_key=message.mask_key,
        share_key=message.share_key,
    )


@dataclass(frozen=True, slots=True)
class Roster:
    """The advertisements of the recipient's neighbours."""

    keys: Mapping[ClientId, Advertisement]


@dataclass(frozen=True, slots=True)
class EncryptedShares:
    """For each neighbour a box that only it can open.

    Attributes:
        boxes: By neighbour.
        commitment: To the seed of the self mask, 32 bytes: shares that do not reconstruct
            what was shared are noticed before they spoil the sum.
    """

    boxes: Mapping[ClientId, Box]
    commitment: bytes


@dataclass(frozen=True, slots=True)
class Delivery:
    """The boxes that the recipient's neighbours made for it."""

    boxes: Mapping[ClientId, Box]


@dataclass(frozen=True, slots=True)
class MaskedInput:
    """The input plus all masks: uniform to everybody."""

    vector: RingVector = field(repr=False)


@dataclass(frozen=True, slots=True)
class Survivors:
    """Whose masked input arrived; the sum will be over these."""

    clients: frozenset[ClientId]


@dataclass(frozen=True, slots=True)
class Endorsement:
    """One client's word that it was told these survivors.

    Attributes:
        signature: Of its identity key over the round and the survivors, 64 bytes.
    """

    signature: bytes


@dataclass(frozen=True, slots=True)
class Endorsements:
    """The endorsements of the recipient's surviving neighbours."""

    signatures: Mapping[ClientId, bytes]


@dataclass(frozen=True, slots=True)
class Reveal:
    """What unmasks the sum: one secret per neighbour, never both.

    Attributes:
        self_mask_shares: For neighbours that survived.
        mask_key_shares: For neighbours that dropped out after sharing.
    """

    self_mask_shares: Mapping[ClientId, Share] = field(repr=False)
    mask_key_shares: Mapping[ClientId, Share] = field(repr=False)


Request: TypeAlias = Invitation | Roster | Delivery | Survivors | Endorsements
Reply: TypeAlias = Advertisement | EncryptedShares | MaskedInput | Endorsement | Reveal
SecAggMessage: TypeAlias = Request | Reply
