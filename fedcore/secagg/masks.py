"""How a round's secrets become masks and boxes.

    s_uv   seed of the pairwise mask        from u's mask secret and v's mask key
    k_uv   key of the boxes between u, v    from u's share secret and v's share key
    b_u    seed of the self mask            32 random bytes

Both agreements use the plan's digest as the salt, so nothing derived for one
round, model or cohort is of use in another.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedcore.crypto import SHARE_BYTES, Mask, agree, seal, unseal
from fedcore.secagg.messages import Box, ClientId, Share


def pairwise_mask(
    *, secret: bytes, client: ClientId, peer: ClientId, peer_key: bytes, digest: bytes
) -> Mask:
    """Return the mask that `client` adds for `peer`; the peer adds the opposite.

    Raises:
        PeerProtocolError: `peer_key` is not a valid public key.
    """
    low, high = sorted((client, peer))
    seed = agree(secret, peer_key, salt=digest, info=_info(b"mask", low, high))
    return Mask(seed, 1 if client < peer else -1)


def pairwise_masks(
    secret: bytes, client: ClientId, peer_keys: Mapping[ClientId, bytes], digest: bytes
) -> list[Mask]:
    """Return the masks that `client` adds for all of `peer_keys`."""
    return [
        pairwise_mask(secret=secret, client=client, peer=peer, peer_key=key, digest=digest)
        for peer, key in sorted(peer_keys.items())
    ]


def pair_key(
    *, secret: bytes, client: ClientId, peer: ClientId, peer_key: bytes, digest: bytes
) -> bytes:
    """Return the key under which `client` and `peer` send each other one box.

    Raises:
        PeerProtocolError: `peer_key` is not a valid public key.
    """
    low, high = sorted((client, peer))
    return agree(secret, peer_key, salt=digest, info=_info(b"share", low, high))


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


def _info(purpose: bytes, first: ClientId, second: ClientId) -> bytes:
    return b"/".join(
        (b"fedcore/v1", purpose, first.to_bytes(4, "little"), second.to_bytes(4, "little"))
    )
