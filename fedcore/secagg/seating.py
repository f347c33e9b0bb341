"""Who has which index: the rank of its key in the list of all that are invited.

The graph follows from the indices. A coordinator that hands them out can seat the
devices that collude with it around a victim. So nobody hands them out: the Ed25519
identity keys of the invited stand in strictly increasing order, a device's index is the
place of its key, and the hash of the list is part of the plan, from whose digest graph
and keys follow. Whoever changes the list, or its order, changes the plan.

Each device gets the whole list, 32 bytes a device, and keeps its neighbours' part. That
a key belongs to an enrolled device is checked where its certificate is seen, which is at
its neighbours.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Final

from fedcore.crypto import transcript_hash
from fedcore.errors import PeerProtocolError

IDENTITY_BYTES: Final = 32
"""An Ed25519 public key."""


def roster_digest(keys: Sequence[bytes]) -> bytes:
    """Return the 32 bytes that stand for this list of identity keys in a plan.

    Raises:
        PeerProtocolError: The keys do not increase strictly: one list would have several
            orders, or one device several indices.

    Example:
        >>> roster_digest([bytes(32), bytes([1] * 32)]).hex()[:16]
        '97e5f963b107bedf'
    """
    if any(first >= second for first, second in pairwise(keys)):
        msg = "the identity keys of the invited must increase strictly, found two that do not"
        raise PeerProtocolError(msg)
    return transcript_hash("fedcore/v1/roster", *keys)


def check_seat(
    keys: Sequence[bytes], *, roster: bytes, clients: int, client: int, own_key: bytes
) -> None:
    """Accept an index only if it is the place of our key in the list that the plan names.

    Args:
        keys: Identity keys of all that are invited, 32 bytes each.
        roster: The plan's, 32 bytes.
        clients: How many the plan says are invited.
        client: The index that we were given.
        own_key: Ours, 32 bytes.

    Raises:
        PeerProtocolError: Another list, another number, or another place.
    """
    if len(keys) != clients:
        msg = f"the list of the invited must have {clients} identity keys, found {len(keys)}"
        raise PeerProtocolError(msg)
    if roster_digest(keys) != roster:
        msg = "the list of the invited must be the one that the plan names, found another"
        raise PeerProtocolError(msg)
    if keys[client] != own_key:
        msg = f"index {client} must be the place of this device's key, found another key there"
        raise PeerProtocolError(msg)


def keys_at(keys: Sequence[bytes], clients: Collection[int]) -> dict[int, bytes]:
    """Return the identity keys of some of the invited, by increasing index."""
    return {client: keys[client] for client in sorted(clients)}
