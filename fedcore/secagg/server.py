"""Server side of secure aggregation.

One state per stage. A state takes one message of each client with its
`on_...` method, which returns the state with that message counted; `close` ends
the stage with whoever has answered, and returns the next state with the requests
to send. The input vectors are added as they come: the server keeps one vector,
not one per client.

    AwaitingAdvertisements > AwaitingShares > AwaitingInputs >
        (AwaitingEndorsements, if the plan is authenticated) > AwaitingReveals > Outcome

A message from somebody who was not asked, or a second one from the same client,
is refused; the state is unchanged and the round goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedcore.crypto import (
    AddMasks,
    AgreeAll,
    KeyPair,
    Mask,
    add_masks,
    agree_all,
    check_public_key,
    check_share,
    combine,
)
from fedcore.errors import ConfigurationError, PeerProtocolError, RoundAbortedError
from fedcore.secagg.masks import masks_of_pairs, seed_commitment
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
    Survivors,
    check_advertisement,
)
from fedcore.secagg.plan import NOBODY, Plan
from fedcore.secagg.running_sum import RunningSum
from fedcore.secagg.seating import roster_digest
from fedcore.vectors import RingVector


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a round.

    Attributes:
        total: Exact sum over the survivors, shape [plan.dim].
        survivors: Whose inputs are in it.
    """

    total: RingVector = field(repr=False)
    survivors: frozenset[ClientId]


@dataclass(frozen=True, slots=True)
class AwaitingReveals:
    """The survivors are fixed; the server collects what unmasks their sum."""

    plan: Plan
    keys: Mapping[ClientId, bytes]
    commitments: Mapping[ClientId, bytes]
    survivors: frozenset[ClientId]
    total: RingVector = field(repr=False)
    reveals: Mapping[ClientId, Reveal] = field(repr=False, default_factory=dict)

    def on_reveal(self, client: ClientId, message: Reveal) -> AwaitingReveals:
        """Count the shares of one survivor.

        Raises:
            PeerProtocolError: Not a survivor, a second answer, or shares of the
                wrong kind, of the wrong peers, or malformed.
        """
        _expect_once(client, self.survivors, self.reveals)
        for share in (*message.self_mask_shares.values(), *message.mask_key_shares.values()):
            check_share(share)
        peers = self.plan.neighbours_of(client) & self.shared
        if (
            message.self_mask_shares.keys() != peers & self.survivors
            or message.mask_key_shares.keys() != peers - self.survivors
        ):
            msg = f"client {client} must reveal one secret of each of its {len(peers)} peers"
            raise PeerProtocolError(msg)
        return replace(self, reveals={**self.reveals, client: message})

    @property
    def shared(self) -> frozenset[ClientId]:
        """Who shared its secrets, and so is in the others' masks."""
        return frozenset(self.commitments)

    @property
    def complete(self) -> bool:
        """Whether enough shares have arrived to unmask, so that waiting is over."""
        return all(
            len(self.plan.neighbours_of(client) & self.reveals.keys()) >= self.plan.threshold
            for client in self.shared
        )

    def close(self, unmask: AddMasks = add_masks, agree: AgreeAll = agree_all) -> Outcome:
        """Subtract all masks from the sum. [BIK+17, figure 4, round 4].

        Args:
            unmask: Adds the masks' opposites; `ParallelMasks` uses all cores.
            agree: Agrees on the masks of the dropped; `ParallelAgreement` likewise.

        Raises:
            RoundAbortedError: A secret has too few shares, or shares that do not
                reconstruct what was advertised: whose they are cannot be told.
        """
        try:
            masks = [*self._self_masks(), *self._unpaired_masks(agree)]
        except PeerProtocolError as error:
            raise RoundAbortedError(
                stage="unmasking",
                needed=self.plan.threshold,
                found=len(self.reveals),
                reason=str(error),
            ) from error
        return Outcome(unmask(self.total, masks, self.plan.ring), self.survivors)

    def _self_masks(self) -> Iterator[Mask]:
        """Yield the opposite of each survivor's self mask."""
        digest = self.plan.digest()
        for client in sorted(self.survivors):
            shares = {
                peer: reveal.self_mask_shares[client]
                for peer, reveal in self._reveals_about(client).items()
            }
            seed = self._reconstruct(
                shares,
                lambda secret, client=client: (  # type: ignore[misc]
                    seed_commitment(digest, client, secret) == self.commitments[client]
                ),
            )
            yield Mask(seed, -1)

    def _unpaired_masks(self, agree: AgreeAll) -> list[Mask]:
        """Return what each dropped client would have added: its peers' masks cancel then."""
        secrets: dict[ClientId, bytes] = {}
        keys: dict[ClientId, dict[ClientId, bytes]] = {}
        for client in sorted(self.shared - self.survivors):
            shares = {
                peer: reveal.mask_key_shares[client]
                for peer, reveal in self._reveals_about(client).items()
            }
            secrets[client] = self._reconstruct(
                shares,
                lambda secret, client=client: (  # type: ignore[misc]
                    KeyPair.from_secret(secret).public == self.keys[client]
                ),
            )
            peers = self.plan.neighbours_of(client) & self.survivors
            keys[client] = {peer: self.keys[peer] for peer in peers}
        return masks_of_pairs(secrets, keys, self.plan.digest(), agree)

    def _reveals_about(self, client: ClientId) -> dict[ClientId, Reveal]:
        peers = self.plan.neighbours_of(client)
        return {peer: reveal for peer, reveal in self.reveals.items() if peer in peers}

    def _reconstruct(
        self, shares: Mapping[ClientId, bytes], fits: Callable[[bytes], bool]
    ) -> bytes:
        """Return the secret that `fits` what its owner bound itself to.

        One false share is survived if there is one share to spare: leave out each of
        those that were used, in turn.
        """
        threshold = self.plan.threshold
        _require(len(shares), threshold, "unmasking")
        points = {peer + 1: share for peer, share in shares.items()}
        suspects: list[int | None] = [None]
        if len(points) > threshold:
            suspects += sorted(points)[:threshold]
        for suspect in suspects:
            chosen = {point: share for point, share in points.items() if point != suspect}
            try:
                secret = combine(chosen, threshold)
            except PeerProtocolError:
                continue
            if fits(secret):
                return secret
        msg = "shares of a secret do not fit what its owner bound itself to"
        raise PeerProtocolError(msg)


@dataclass(frozen=True, slots=True)
class AwaitingEndorsements:
    """The survivors are named; the server collects their signatures on that."""

    reveals: AwaitingReveals
    endorsements: Mapping[ClientId, Endorsement] = field(default_factory=dict)

    def on_endorsement(self, client: ClientId, message: Endorsement) -> AwaitingEndorsements:
        """Keep one client's endorsement for its neighbours, who check it.

        Raises:
            PeerProtocolError: Not a survivor, or a second answer.
        """
        _expect_once(client, self.reveals.survivors, self.endorsements)
        return replace(self, endorsements={**self.endorsements, client: message})

    def close(self) -> tuple[AwaitingReveals, dict[ClientId, Endorsements]]:
        """Forward to each client the endorsements of its neighbours.

        Raises:
            RoundAbortedError: Too few endorsements for anybody to act on.
        """
        plan = self.reveals.plan
        _require(len(self.endorsements), plan.threshold, "endorsing")
        requests = {
            client: Endorsements(
                {
                    peer: self.endorsements[peer].signature
                    for peer in sorted(plan.neighbours_of(client) & self.endorsements.keys())
                }
            )
            for client in sorted(self.endorsements)
        }
        return self.reveals, requests


@dataclass(frozen=True, slots=True)
class AwaitingInputs:
    """The boxes are delivered; the server adds up masked inputs.

    The sum is added to in place and belongs to the newest state: a state that took an
    input, or was closed, takes no other.
    """

    plan: Plan
    keys: Mapping[ClientId, bytes]
    commitments: Mapping[ClientId, bytes]
    total: RunningSum = field(repr=False)
    survivors: frozenset[ClientId] = frozenset()

    def on_input(self, client: ClientId, message: MaskedInput) -> AwaitingInputs:
        """Add one masked input to the sum.

        Raises:
            PeerProtocolError: Not asked, or a second answer.
            StateReusedError: This state took an input before, or was closed.
        """
        _expect_once(client, self.commitments, self.survivors)
        self.total.add(message.vector, seen=len(self.survivors))
        return replace(self, survivors=self.survivors | {client})

    def close(self) -> tuple[AwaitingReveals, dict[ClientId, Survivors]]:
        """Fix the survivors and tell them; they answer with their shares.

        In an authenticated round they answer with endorsements: see `endorse`.

        Raises:
            RoundAbortedError: Too few survivors.
            StateReusedError: This state took an input since.
        """
        _require(len(self.survivors), self.plan.minimum_survivors, "uploading")
        request = Survivors(self.survivors)
        total = self.total.close(seen=len(self.survivors))
        state = AwaitingReveals(self.plan, self.keys, self.commitments, self.survivors, total)
        return state, dict.fromkeys(sorted(self.survivors), request)

    def endorse(self) -> tuple[AwaitingEndorsements, dict[ClientId, Survivors]]:
        """Fix the survivors of an authenticated round and tell them.

        Raises:
            RoundAbortedError: Too few survivors.
        """
        reveals, requests = self.close()
        return AwaitingEndorsements(reveals), requests


@dataclass(frozen=True, slots=True)
class AwaitingShares:
    """The keys are exchanged; the server collects encrypted shares."""

    plan: Plan
    keys: Mapping[ClientId, bytes]
    rosters: Mapping[ClientId, frozenset[ClientId]]
    shares: Mapping[ClientId, EncryptedShares] = field(repr=False, default_factory=dict)

    def on_shares(self, client: ClientId, message: EncryptedShares) -> AwaitingShares:
        """Keep one client's boxes for their recipients.

        Raises:
            PeerProtocolError: Not asked, a second answer, or boxes for the wrong peers.
        """
        _expect_once(client, self.rosters.keys(), self.shares)
        if message.boxes.keys() != self.rosters[client]:
            msg = f"client {client} must send one box to each peer on its roster"
            raise PeerProtocolError(msg)
        return replace(self, shares={**self.shares, client: message})

    def close(self) -> tuple[AwaitingInputs, dict[ClientId, Delivery]]:
        """Deliver the boxes to those who sent theirs.

        Raises:
            RoundAbortedError: Too few clients shared their secrets.
        """
        _require(len(self.shares), self.plan.minimum_survivors, "sharing")
        deliveries = {
            client: Delivery(
                {
                    peer: self.shares[peer].boxes[client]
                    for peer in sorted(self.rosters[client] & self.shares.keys())
                }
            )
            for client in sorted(self.shares)
        }
        total = RunningSum(self.plan.ring.zeros(self.plan.dim))
        commitments = {client: message.commitment for client, message in self.shares.items()}
        state = AwaitingInputs(self.plan, self.keys, commitments, total)
        return state, deliveries


@dataclass(frozen=True, slots=True)
class AwaitingAdvertisements:
    """The clients are invited; the server collects their keys."""

    plan: Plan
    identity_keys: Sequence[bytes] = ()
    advertisements: Mapping[ClientId, Advertisement] = field(default_factory=dict)

    def on_advertisement(
        self, client: ClientId, message: Advertisement, now: int = 0
    ) -> AwaitingAdvertisements:
        """Keep one client's keys.

        Every client checks its peers' keys itself and leaves the round over a bad one.
        Checking them here as well loses that one client instead of all its peers.

        Args:
            client: Who sent it.
            message: Its keys.
            now: Unix time in seconds, for the certificate.

        Raises:
            PeerProtocolError: Not invited, a second answer, keys that are invalid or
                somebody else's, or not signed as the plan demands.
        """
        _expect_once(client, range(self.plan.clients), self.advertisements)
        known = {key for peer in self.advertisements.values() for key in _keys_of(peer)}
        mine = _keys_of(message)
        if len(known | mine) < len(known) + len(mine) or message.mask_key == message.share_key:
            msg = f"every key of client {client} must be its own, found one that is used already"
            raise PeerProtocolError(msg)
        check_public_key(message.mask_key)
        check_public_key(message.share_key)
        if self.plan.authenticated:
            check_advertisement(message, client, self.plan, self.identity_keys[client], now)
        return replace(self, advertisements={**self.advertisements, client: message})

    def close(self) -> tuple[AwaitingShares, dict[ClientId, Roster]]:
        """Tell each client the keys of its neighbours.

        Raises:
            RoundAbortedError: Too few clients joined.
        """
        joined = self.advertisements
        _require(len(joined), self.plan.minimum_survivors, "joining")
        rosters = {
            client: frozenset(self.plan.neighbours_of(client) & joined.keys()) for client in joined
        }
        requests = {
            client: Roster({peer: joined[peer] for peer in sorted(peers)})
            for client, peers in sorted(rosters.items())
        }
        keys = {client: message.mask_key for client, message in joined.items()}
        return AwaitingShares(self.plan, keys, rosters), requests


def invite(
    plan: Plan, identity_keys: Sequence[bytes] = ()
) -> tuple[AwaitingAdvertisements, dict[ClientId, Invitation]]:
    """Start a round: one invitation per client.

    Args:
        plan: The public parameters.
        identity_keys: Of all that are invited, strictly increasing, 32 bytes each; empty if
            the plan is not authenticated.

    Raises:
        ConfigurationError: They are not those that the plan was made for.
    """
    expected = plan.clients if plan.authenticated else 0
    found = roster_digest(identity_keys) if plan.authenticated else NOBODY
    if len(identity_keys) != expected or found != plan.roster:
        msg = (
            f"expected the {expected} identity keys that the plan names, found "
            f"{len(identity_keys)} or others: make the plan with roster=roster_digest(keys)"
        )
        raise ConfigurationError(msg)
    invitations = {
        client: Invitation(client, plan, identity_keys) for client in range(plan.clients)
    }
    return AwaitingAdvertisements(plan, identity_keys), invitations


ServerState: TypeAlias = (
    AwaitingAdvertisements
    | AwaitingShares
    | AwaitingInputs
    | AwaitingEndorsements
    | AwaitingReveals
)


def _keys_of(message: Advertisement) -> frozenset[bytes]:
    """Return the keys that no other client may use; identity keys have their own places."""
    return frozenset((message.mask_key, message.share_key))


def _expect_once(
    client: ClientId, asked: Collection[ClientId], answered: Collection[ClientId]
) -> None:
    if client not in asked:
        msg = f"client {client} was not asked at this stage; its message is dropped"
        raise PeerProtocolError(msg)
    if client in answered:
        msg = f"client {client} has already answered; its second message is dropped"
        raise PeerProtocolError(msg)


def _require(found: int, needed: int, stage: str) -> None:
    if found < needed:
        raise RoundAbortedError(stage=stage, needed=needed, found=found)
