"""Client side of secure aggregation.

Follows Bonawitz et al. 2017, figure 4, with the neighbour graph of Bell et
al. 2020. The papers' names on the left, ours on the right:

    U            the clients invited              plan.clients
    U_1          who advertised keys              Roster.keys
    U_2          who shared its secrets           Delivery.boxes
    U_3          whose masked input arrived       Survivors.clients
    b_u          seed of the self mask            self_mask_seed
    b_{u,v}      share of u's self-mask seed      self_mask_shares[u]
    s^SK_{u,v}   share of u's masking key         mask_key_shares[u]
    t            reconstruction threshold         plan.threshold

Each state of the protocol is a class that holds what the client knows then,
and nothing else. Its one `on_...` method is the only way forward: it returns
the next state and the message to send, and touches neither clock, network,
disk nor global randomness.

[BIK+17] https://eprint.iacr.org/2017/281
[BBGLR20] https://eprint.iacr.org/2020/704
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from fedcore.crypto import SEED_BYTES, Entropy, KeyPair, Mask, add_masks, split
from fedcore.errors import LocalProtocolError, PeerProtocolError, RoundAbortedError
from fedcore.secagg.masks import pair_keys, pairwise_masks, seal_shares, unseal_shares
from fedcore.secagg.messages import (
    Advertisement,
    ClientId,
    Delivery,
    EncryptedShares,
    Invitation,
    MaskedInput,
    Reveal,
    Roster,
    Share,
    Survivors,
)
from fedcore.secagg.plan import Plan
from fedcore.vectors import RingVector


@dataclass(frozen=True, slots=True)
class Finished:
    """The client has revealed its shares and knows nothing more."""


@dataclass(frozen=True, slots=True)
class AwaitingSurvivors:
    """The masked input is sent; the client holds two shares of every peer."""

    client: ClientId
    plan: Plan
    self_mask_shares: Mapping[ClientId, Share] = field(repr=False)
    mask_key_shares: Mapping[ClientId, Share] = field(repr=False)

    def on_survivors(self, message: Survivors) -> tuple[Finished, Reveal]:
        """Reveal what unmasks the sum, and nothing that unmasks one client.

        For a survivor that is its self-mask seed, for a dropped peer its masking
        key. The server names the survivors only; we derive the dropped, so no
        request can ask us for both secrets of one peer. [BIK+17, figure 4, round 4]

        Raises:
            PeerProtocolError: The server counts a client that cannot have survived,
                or leaves us out.
            RoundAbortedError: Too few survivors for the sum to protect anybody.
        """
        peers = self.self_mask_shares.keys()
        possible = peers | {self.client}
        neighbours = self.plan.neighbours_of(self.client)
        strangers = {
            peer
            for peer in message.clients
            if peer >= self.plan.clients or (peer in neighbours and peer not in possible)
        }
        if strangers:
            msg = f"survivors must have shared their secrets, got also {sorted(strangers)}"
            raise PeerProtocolError(msg)
        if self.client not in message.clients:
            msg = f"client {self.client} sent its input but is not among the survivors"
            raise PeerProtocolError(msg)
        _require(len(message.clients), self.plan.minimum_survivors, "unmasking")
        _require(len(message.clients & peers), self.plan.threshold, "unmasking")
        return Finished(), Reveal(
            self_mask_shares={
                p: s for p, s in self.self_mask_shares.items() if p in message.clients
            },
            mask_key_shares={
                p: s for p, s in self.mask_key_shares.items() if p not in message.clients
            },
        )


@dataclass(frozen=True, slots=True)
class AwaitingDelivery:
    """The secrets are shared; the client waits for its peers' shares.

    Attributes:
        pair_keys: Key of the boxes exchanged with each peer, 32 bytes.
        mask_keys: Public masking key of each peer, 32 bytes.
    """

    client: ClientId
    plan: Plan
    mask_secret: bytes = field(repr=False)
    self_mask_seed: bytes = field(repr=False)
    pair_keys: Mapping[ClientId, bytes] = field(repr=False)
    mask_keys: Mapping[ClientId, bytes]

    def on_delivery(
        self, message: Delivery, vector: RingVector
    ) -> tuple[AwaitingSurvivors, MaskedInput]:
        """Open the peers' boxes and mask the input.

        y_u = x_u + PRG(b_u) + sum over peers of +-PRG(s_uv). [BIK+17, figure 4, round 2]

        Args:
            message: The boxes of the peers that shared their secrets.
            vector: The input, shape [plan.dim], elements of the plan's ring.

        Raises:
            PeerProtocolError: A box from a stranger, or one that does not open.
            RoundAbortedError: Too few peers shared their secrets.
            LocalProtocolError: `vector` is not an element of the plan's domain.
        """
        strangers = message.boxes.keys() - self.pair_keys.keys()
        if strangers:
            msg = f"boxes must come from the peers on the roster, got also {sorted(strangers)}"
            raise PeerProtocolError(msg)
        _require(len(message.boxes), self.plan.threshold, "sharing")
        if vector.shape != (self.plan.dim,) or vector.dtype != self.plan.ring.dtype:
            msg = (
                f"the input must have shape ({self.plan.dim},) and dtype {self.plan.ring.dtype}, "
                f"found {vector.shape} and {vector.dtype}"
            )
            raise LocalProtocolError(msg)
        digest = self.plan.digest()
        shares = {
            peer: unseal_shares(self.pair_keys[peer], box, peer, self.client, digest)
            for peer, box in message.boxes.items()
        }
        keys = {peer: self.mask_keys[peer] for peer in message.boxes}
        masks = [
            Mask(self.self_mask_seed),
            *pairwise_masks(self.mask_secret, self.client, keys, digest),
        ]
        return AwaitingSurvivors(
            client=self.client,
            plan=self.plan,
            self_mask_shares={peer: pair[0] for peer, pair in shares.items()},
            mask_key_shares={peer: pair[1] for peer, pair in shares.items()},
        ), MaskedInput(add_masks(vector, masks, self.plan.ring))


@dataclass(frozen=True, slots=True)
class AwaitingRoster:
    """The keys are advertised; the client waits for its peers' keys."""

    client: ClientId
    plan: Plan
    mask_secret: bytes = field(repr=False)
    share_secret: bytes = field(repr=False)

    def on_roster(
        self, message: Roster, entropy: Entropy
    ) -> tuple[AwaitingDelivery, EncryptedShares]:
        """Share the self-mask seed and the masking key among the peers.

        [BIK+17, figure 4, round 1]

        Raises:
            PeerProtocolError: The roster has a client that is not our neighbour, a
                key twice, or an invalid key.
            RoundAbortedError: Too few peers to share with.
        """
        strangers = message.keys.keys() - self.plan.neighbours_of(self.client)
        if strangers:
            msg = f"the roster must consist of our neighbours, got also {sorted(strangers)}"
            raise PeerProtocolError(msg)
        keys = [key for peer in message.keys.values() for key in (peer.mask_key, peer.share_key)]
        if len(set(keys)) != len(keys):
            msg = "every key on the roster must be different, found one twice"
            raise PeerProtocolError(msg)
        peers = sorted(message.keys)
        _require(len(peers), self.plan.threshold, "sharing")
        digest = self.plan.digest()
        seed = entropy.draw("self-mask", SEED_BYTES)
        # Both secrets use the same evaluation points: one matrix product shares them.
        seed_shares, key_shares = split(
            [seed, self.mask_secret], [peer + 1 for peer in peers], self.plan.threshold, entropy
        )
        keys_of_pairs = pair_keys(
            self.share_secret,
            self.client,
            {peer: message.keys[peer].share_key for peer in peers},
            digest,
        )
        boxes = {
            peer: seal_shares(keys_of_pairs[peer], shares, self.client, peer, digest)
            for peer, shares in zip(peers, zip(seed_shares, key_shares, strict=True), strict=True)
        }
        return AwaitingDelivery(
            client=self.client,
            plan=self.plan,
            mask_secret=self.mask_secret,
            self_mask_seed=seed,
            pair_keys=keys_of_pairs,
            mask_keys={peer: key.mask_key for peer, key in message.keys.items()},
        ), EncryptedShares(boxes)


def join(message: Invitation, entropy: Entropy) -> tuple[AwaitingRoster, Advertisement]:
    """Accept an invitation: make the round's keys. [BIK+17, figure 4, round 0].

    Args:
        message: Its plan was checked against the device's own minimums by the caller.
        entropy: Source of both keys; separated by run, round and client by the caller.
    """
    mask, share = KeyPair.generate(entropy, "mask-key"), KeyPair.generate(entropy, "share-key")
    state = AwaitingRoster(message.client, message.plan, mask.secret, share.secret)
    return state, Advertisement(mask.public, share.public)


ClientState: TypeAlias = AwaitingRoster | AwaitingDelivery | AwaitingSurvivors | Finished


def _require(found: int, needed: int, stage: str) -> None:
    if found < needed:
        raise RoundAbortedError(stage=stage, needed=needed, found=found)
