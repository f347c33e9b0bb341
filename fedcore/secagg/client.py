"""Client side of secure aggregation.

Follows Bonawitz et al. 2017, figure 4, with the neighbour graph of Bell et
al. 2020. The papers' names on the left, ours on the right:

    U            the clients invited              plan.clients
    U_1          who advertised keys              Roster.keys
    U_2          who shared its secrets           Delivery.boxes
    U_3          whose masked input arrived       Survivors.clients
    U_4          who endorsed U_3                 Endorsements.signatures
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
from fedcore.secagg.identity import Credential, Identity, is_signed, survivors_statement
from fedcore.secagg.masks import (
    pair_keys,
    pairwise_masks,
    seal_shares,
    seed_commitment,
    unseal_shares,
)
from fedcore.secagg.messages import (
    Advertisement,
    ClientId,
    Delivery,
    EncryptedShares,
    Endorsement,
    Endorsements,
    Invitation,
    MaskedInput,
    Reveal,
    Roster,
    Share,
    Survivors,
    check_advertisement,
)
from fedcore.secagg.plan import Plan
from fedcore.secagg.seating import check_seat, keys_at
from fedcore.vectors import RingVector


@dataclass(frozen=True, slots=True)
class Finished:
    """The client has revealed its shares and knows nothing more."""


@dataclass(frozen=True, slots=True)
class AwaitingEndorsements:
    """The client has endorsed a set of survivors and will act on no other."""

    client: ClientId
    plan: Plan
    survivors: frozenset[ClientId]
    self_mask_shares: Mapping[ClientId, Share] = field(repr=False)
    mask_key_shares: Mapping[ClientId, Share] = field(repr=False)
    identity_keys: Mapping[ClientId, bytes]

    def on_endorsements(self, message: Endorsements) -> tuple[Finished, Reveal]:
        """Reveal once enough peers were told the same survivors. [BIK+17, figure 4, round 3].

        Two different sets cannot both find `threshold` supporters among the neighbours
        of one client while its colluding neighbours are as few as the plan assumes. On
        the complete graph that makes one set the only one that anybody acts on. A
        signature that does not fit counts as missing: one faulty peer must not stop the
        round.

        Raises:
            PeerProtocolError: An endorsement of somebody who is no surviving neighbour.
            RoundAbortedError: Too few valid endorsements.
        """
        asked = self.survivors & self.identity_keys.keys()
        strangers = message.signatures.keys() - asked
        if strangers:
            msg = f"endorsements must come from surviving peers, got also {sorted(strangers)}"
            raise PeerProtocolError(msg)
        statement = survivors_statement(self.plan.digest(), self.survivors)
        valid = sum(
            is_signed(self.identity_keys[peer], statement, signature)
            for peer, signature in message.signatures.items()
        )
        _require(valid, self.plan.threshold, "endorsing")
        return Finished(), _reveal(self.survivors, self.self_mask_shares, self.mask_key_shares)


@dataclass(frozen=True, slots=True)
class AwaitingSurvivors:
    """The masked input is sent; the client holds two shares of every peer.

    Attributes:
        identity_keys: Public identity key of each peer; empty without authentication.
    """

    client: ClientId
    plan: Plan
    self_mask_shares: Mapping[ClientId, Share] = field(repr=False)
    mask_key_shares: Mapping[ClientId, Share] = field(repr=False)
    identity_keys: Mapping[ClientId, bytes] = field(default_factory=dict)

    def on_survivors(self, message: Survivors) -> tuple[Finished, Reveal]:
        """Reveal what unmasks the sum, and nothing that unmasks one client.

        For a survivor that is its self-mask seed, for a dropped peer its masking
        key. The server names the survivors only; we derive the dropped, so no
        request can ask us for both secrets of one peer. [BIK+17, figure 4, round 4]

        Raises:
            PeerProtocolError: The server counts a client that cannot have survived,
                or leaves us out.
            RoundAbortedError: Too few survivors for the sum to protect anybody.
            LocalProtocolError: The plan is authenticated: survivors are endorsed first.
        """
        if self.plan.authenticated:
            msg = "in an authenticated round survivors are endorsed before anything is revealed"
            raise LocalProtocolError(msg)
        self._check(message)
        return Finished(), _reveal(message.clients, self.self_mask_shares, self.mask_key_shares)

    def endorse(
        self, message: Survivors, identity: Identity
    ) -> tuple[AwaitingEndorsements, Endorsement]:
        """Sign the survivors, so that peers can see that all were told the same.

        [BIK+17, figure 4, round 3]

        Raises:
            PeerProtocolError: As in `on_survivors`.
            RoundAbortedError: As in `on_survivors`.
        """
        self._check(message)
        state = AwaitingEndorsements(
            client=self.client,
            plan=self.plan,
            survivors=message.clients,
            self_mask_shares=self.self_mask_shares,
            mask_key_shares=self.mask_key_shares,
            identity_keys=self.identity_keys,
        )
        statement = survivors_statement(self.plan.digest(), message.clients)
        return state, Endorsement(identity.key.sign(statement))

    def _check(self, message: Survivors) -> None:
        """Refuse survivors that cannot be, and a set too small to hide in."""
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


@dataclass(frozen=True, slots=True)
class AwaitingDelivery:
    """The secrets are shared; the client waits for its peers' shares.

    Attributes:
        pair_keys: Key of the boxes exchanged with each peer, 32 bytes.
        mask_keys: Public masking key of each peer, 32 bytes.
        identity_keys: Public identity key of each peer; empty without authentication.
    """

    client: ClientId
    plan: Plan
    mask_secret: bytes = field(repr=False)
    self_mask_seed: bytes = field(repr=False)
    pair_keys: Mapping[ClientId, bytes] = field(repr=False)
    mask_keys: Mapping[ClientId, bytes]
    identity_keys: Mapping[ClientId, bytes] = field(default_factory=dict)

    def on_delivery(
        self, message: Delivery, vector: RingVector, *, out: RingVector | None = None
    ) -> tuple[AwaitingSurvivors, MaskedInput]:
        """Open the peers' boxes and mask the input.

        y_u = x_u + PRG(b_u) + sum over peers of +-PRG(s_uv). [BIK+17, figure 4, round 2]

        Args:
            message: The boxes of the peers that shared their secrets.
            vector: The input, shape [plan.dim], elements of the plan's ring.
            out: Where the masked input goes; `vector` itself spares a second one. A new
                vector if None.

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
            identity_keys={
                peer: key for peer, key in self.identity_keys.items() if peer in message.boxes
            },
        ), MaskedInput(add_masks(vector, masks, self.plan.ring, out=out))


@dataclass(frozen=True, slots=True)
class AwaitingRoster:
    """The keys are advertised; the client waits for its peers' keys.

    Attributes:
        identity_keys: Of each neighbour, from the list of the invited; empty without
            authentication.
    """

    client: ClientId
    plan: Plan
    mask_secret: bytes = field(repr=False)
    share_secret: bytes = field(repr=False)
    identity_keys: Mapping[ClientId, bytes] = field(default_factory=dict)

    def on_roster(
        self,
        message: Roster,
        entropy: Entropy,
        *,
        identity: Identity | None = None,
        now: int = 0,
    ) -> tuple[AwaitingDelivery, EncryptedShares]:
        """Share the self-mask seed and the masking key among the peers.

        [BIK+17, figure 4, round 1]

        Args:
            message: The peers' keys.
            entropy: Source of the seed and of the shares.
            identity: Of this client; needed if the plan is authenticated.
            now: Unix time in seconds, for the peers' certificates.

        Raises:
            PeerProtocolError: The roster has a client that is not our neighbour, a
                key twice, an invalid key, or one that was not signed by the device
                whose index it is.
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
        if self.plan.authenticated:
            if identity is None:
                raise _not_enrolled()
            for peer, advertised in message.keys.items():
                check_advertisement(advertised, peer, self.plan, self.identity_keys[peer], now)
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
            identity_keys={p: key for p, key in self.identity_keys.items() if p in message.keys},
        ), EncryptedShares(boxes, seed_commitment(digest, self.client, seed))


def join(
    message: Invitation, entropy: Entropy, *, identity: Identity | None = None, now: int = 0
) -> tuple[AwaitingRoster, Advertisement]:
    """Accept an invitation: make the round's keys. [BIK+17, figure 4, round 0].

    Args:
        message: Its plan, authority included, was checked against the device's own
            minimums by the caller.
        entropy: Source of both keys; separated by run, round and client by the caller.
        identity: Signs the keys; needed if the plan is authenticated.
        now: Unix time in seconds.

    Raises:
        PeerProtocolError: The plan wants signatures, and this client has no identity
            that the plan's authority certifies; or the index is not the rank of its key
            among the invited.
    """
    mask, share = KeyPair.generate(entropy, "mask-key"), KeyPair.generate(entropy, "share-key")
    plan, credential, peers = message.plan, None, {}
    if plan.authenticated:
        if identity is None:
            raise _not_enrolled()
        identity.certificate.check(plan.authority, now)
        check_seat(
            message.identity_keys,
            roster=plan.roster,
            clients=plan.clients,
            client=message.client,
            own_key=identity.certificate.key,
        )
        peers = keys_at(message.identity_keys, plan.neighbours_of(message.client))
        credential = Credential.sign(
            identity,
            digest=plan.digest(),
            client=message.client,
            mask_key=mask.public,
            share_key=share.public,
        )
    state = AwaitingRoster(message.client, plan, mask.secret, share.secret, peers)
    return state, Advertisement(mask.public, share.public, credential)


ClientState: TypeAlias = (
    AwaitingRoster | AwaitingDelivery | AwaitingSurvivors | AwaitingEndorsements | Finished
)


def _not_enrolled() -> PeerProtocolError:
    msg = "the round wants signed keys, but this device is not enrolled: enroll it first"
    return PeerProtocolError(msg)


def _reveal(
    survivors: frozenset[ClientId],
    self_mask_shares: Mapping[ClientId, Share],
    mask_key_shares: Mapping[ClientId, Share],
) -> Reveal:
    """Return one share per peer: of the self mask if it survived, else of the masking key."""
    return Reveal(
        self_mask_shares={p: s for p, s in self_mask_shares.items() if p in survivors},
        mask_key_shares={p: s for p, s in mask_key_shares.items() if p not in survivors},
    )


def _require(found: int, needed: int, stage: str) -> None:
    if found < needed:
        raise RoundAbortedError(stage=stage, needed=needed, found=found)
