"""How a round's secrets become masks and boxes.

    s_uv   seed of the pairwise mask        from u's mask secret and v's mask key
    k_uv   key of the boxes between u, v    from u's share secret and v's share key
    b_u    seed of the self mask            32 random bytes

Both agreements use the plan's digest as the salt, so nothing derived for one
round, model or cohort is of use in another.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedcore.crypto import (
    SHARE_BYTES,
    AgreeAll,
    Agreement,
    Exchange,
    Mask,
    agree_all,
    seal,
    transcript_hash,
    unseal,
)
from fedcore.secagg.messages import Box, ClientId, Share


def pairwise_masks(
    secret: bytes, client: ClientId, peer_keys: Mapping[ClientId, bytes], digest: bytes
) -> list[Mask]:
    """Return the masks that `client` adds for its peers; each peer adds the opposite.

    Raises:
        PeerProtocolError: One of `peer_keys` is not a valid public key.
    """
    return masks_of_pairs({client: secret}, {client: peer_keys}, digest)


def masks_of_pairs(
    secrets: Mapping[ClientId, bytes],
    peer_keys: Mapping[ClientId, Mapping[ClientId, bytes]],
    digest: bytes,
    agree: AgreeAll = agree_all,
) -> list[Mask]:
    """Return the masks that several clients add for their peers.

    Args:
        secrets: The masking secret of each client.
        peer_keys: For each of them the mask keys of its peers.
        digest: Of the plan.
        agree: Agrees on the masks' seeds; `ParallelAgreement` uses all cores.

    Raises:
        PeerProtocolError: One of `peer_keys` is not a valid public key.
    """
    pairs = [(client, peer) for client in secrets for peer in sorted(peer_keys[client])]
    seeds = agree(
        [
            Exchange(secrets[client], peer_keys[client][peer], _pair(b"mask", client, peer))
            for client, peer in pairs
        ],
        salt=digest,
    )
    return [
        Mask(seed, 1 if client < peer else -1)
        for (client, peer), seed in zip(pairs, seeds, strict=True)
    ]


def pair_keys(
    secret: bytes, client: ClientId, peer_keys: Mapping[ClientId, bytes], digest: bytes
) -> dict[ClientId, bytes]:
    """Return the keys under which `client` and each peer send each other one box.

    Raises:
        PeerProtocolError: One of `peer_keys` is not a valid public key.
    """
    agreement = Agreement(secret)
    return {
        peer: agreement.key(key, salt=digest, info=_pair(b"share", client, peer))
        for peer, key in peer_keys.items()
    }


def seed_commitment(digest: bytes, client: ClientId, seed: bytes) -> bytes:
    """Return 32 bytes that bind `client` to its self-mask seed and reveal nothing of it."""
    return transcript_hash("fedcore/v1/self-mask", digest, client.to_bytes(4, "little"), seed)


def seal_shares(
    key: bytes, shares: tuple[Share, Share], sender: ClientId, recipient: ClientId, digest: bytes
) -> Box:
    """Return the box with the recipient's shares of both secrets of the sender."""
    return seal(
        key,
        b"".join(shares),
        direction=int(sender > recipient),
        associated=digest + _info(b"box", sender, recipient),
    )


def unseal_shares(
    key: bytes, box: Box, sender: ClientId, recipient: ClientId, digest: bytes
) -> tuple[Share, Share]:
    """Return what `seal_shares` put in.

    Raises:
        PeerProtocolError: The box is not from this sender to this recipient.
    """
    shares = unseal(
        key,
        box,
        direction=int(sender > recipient),
        associated=digest + _info(b"box", sender, recipient),
    )
    return shares[:SHARE_BYTES], shares[SHARE_BYTES:]


def _pair(purpose: bytes, client: ClientId, peer: ClientId) -> bytes:
    """Return the same bytes on both ends."""
    return _info(purpose, min(client, peer), max(client, peer))


def _info(purpose: bytes, first: ClientId, second: ClientId) -> bytes:
    return b"/".join(
        (b"fedcore/v1", purpose, first.to_bytes(4, "little"), second.to_bytes(4, "little"))
    )
