"""Server side of secure aggregation.

Four states, one per stage. A state takes one message of each client with its
`on_...` method, which returns the state with that message counted; `close` ends
the stage with whoever has answered, and returns the next state with the requests
to send. The input vectors are added as they come: the server keeps one vector,
not one per client.

    AwaitingAdvertisements > AwaitingShares > AwaitingInputs > AwaitingReveals > Outcome

A message from somebody who was not asked, or a second one from the same client,
is refused; the state is unchanged and the round goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedcore.crypto import KeyPair, Mask, add_masks, combine
from fedcore.errors import PeerProtocolError, RoundAbortedError
from fedcore.secagg.masks import pairwise_masks
from fedcore.secagg.messages import (
    Advertisement,
    ClientId,
    Delivery,
    EncryptedShares,
    Invitation,
    MaskedInput,
    Reveal,
    Roster,
    Survivors,
)
from fedcore.secagg.plan import Plan
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
    shared: frozenset[ClientId]
    survivors: frozenset[ClientId]
    total: RingVector = field(repr=False)
    reveals: Mapping[ClientId, Reveal] = field(repr=False, default_factory=dict)

    def on_reveal(self, client: ClientId, message: Reveal) -> AwaitingReveals:
        """Count the shares of one survivor.

        Raises:
            PeerProtocolError: Not a survivor, a second answer, or shares of the
                wrong kind or of the wrong peers.
        """
        _expect_once(client, self.survivors, self.reveals)
        peers = self.plan.neighbours_of(client) & self.shared
        if (
            message.self_mask_shares.keys() != peers & self.survivors
            or message.mask_key_shares.keys() != peers - self.survivors
        ):
            msg = f"client {client} must reveal one secret of each of its {len(peers)} peers"
            raise PeerProtocolError(msg)
        return replace(self, reveals={**self.reveals, client: message})

    @property
    def complete(self) -> bool:
        """Whether enough shares have arrived to unmask, so that waiting is over."""
        return all(
            len(self.plan.neighbours_of(client) & self.reveals.keys()) >= self.plan.threshold
            for client in self.shared
        )

    def close(self) -> Outcome:
        """Subtract all masks from the sum. [BIK+17, figure 4, round 4].

        Raises:
            RoundAbortedError: A secret has too few shares, or shares that do not
                reconstruct what was advertised: whose they are cannot be told.
        """
        try:
            masks = [*self._self_masks(), *self._unpaired_masks()]
        except PeerProtocolError as error:
            raise RoundAbortedError(
                stage="unmasking",
                needed=self.plan.threshold,
                found=len(self.reveals),
                reason=str(error),
            ) from error
        return Outcome(add_masks(self.total, masks, self.plan.ring), self.survivors)

    def _self_masks(self) -> Iterator[Mask]:
        """Yield the opposite of each survivor's self mask."""
        for client in sorted(self.survivors):
            shares = {
                peer: reveal.self_mask_shares[client]
                for peer, reveal in self._reveals_about(client).items()
            }
            yield Mask(self._reconstruct(shares), -1)

    def _unpaired_masks(self) -> Iterator[Mask]:
        """Yield what each dropped client would have added: its peers' masks cancel then."""
        digest = self.plan.digest()
        for client in sorted(self.shared - self.survivors):
            shares = {
                peer: reveal.mask_key_shares[client]
                for peer, reveal in self._reveals_about(client).items()
            }
            pair = KeyPair.from_secret(self._reconstruct(shares))
            if pair.public != self.keys[client]:
                msg = f"the shares of client {client} do not belong to the key it advertised"
                raise PeerProtocolError(msg)
            peers = self.plan.neighbours_of(client) & self.survivors
            keys = {peer: self.keys[peer] for peer in peers}
            yield from pairwise_masks(pair.secret, client, keys, digest)

    def _reveals_about(self, client: ClientId) -> dict[ClientId, Reveal]:
        peers = self.plan.neighbours_of(client)
        return {peer: reveal for peer, reveal in self.reveals.items() if peer in peers}

    def _reconstruct(self, shares: Mapping[ClientId, bytes]) -> bytes:
        _require(len(shares), self.plan.threshold, "unmasking")
        return combine({peer + 1: share for peer, share in shares.items()}, self.plan.threshold)


@dataclass(frozen=True, slots=True)
class AwaitingInputs:
    """The boxes are delivered; the server adds up masked inputs."""

    plan: Plan
    keys: Mapping[ClientId, bytes]
    shared: frozenset[ClientId]
    total: RingVector = field(repr=False)
    survivors: frozenset[ClientId] = frozenset()

    def on_input(self, client: ClientId, message: MaskedInput) -> AwaitingInputs:
        """Add one masked input to the sum.

        Raises:
            PeerProtocolError: Not asked, or a second answer.
        """
        _expect_once(client, self.shared, self.survivors)
        return replace(self, total=self.total + message.vector, survivors=self.survivors | {client})

    def close(self) -> tuple[AwaitingReveals, dict[ClientId, Survivors]]:
        """Fix the survivors and ask them for the shares.

        Raises:
            RoundAbortedError: Too few survivors.
        """
        _require(len(self.survivors), self.plan.minimum_survivors, "uploading")
        request = Survivors(self.survivors)
        state = AwaitingReveals(self.plan, self.keys, self.shared, self.survivors, self.total)
        return state, dict.fromkeys(sorted(self.survivors), request)


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
        total = self.plan.ring.zeros(self.plan.dim)
        state = AwaitingInputs(self.plan, self.keys, frozenset(self.shares), total)
        return state, deliveries


@dataclass(frozen=True, slots=True)
class AwaitingAdvertisements:
    """The clients are invited; the server collects their keys."""

    plan: Plan
    advertisements: Mapping[ClientId, Advertisement] = field(default_factory=dict)

    def on_advertisement(self, client: ClientId, message: Advertisement) -> AwaitingAdvertisements:
        """Keep one client's keys.

        Raises:
            PeerProtocolError: Not invited, or a second answer.
        """
        _expect_once(client, range(self.plan.clients), self.advertisements)
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


def invite(plan: Plan) -> tuple[AwaitingAdvertisements, dict[ClientId, Invitation]]:
    """Start a round: one invitation per client."""
    invitations = {client: Invitation(client, plan) for client in range(plan.clients)}
    return AwaitingAdvertisements(plan), invitations


ServerState: TypeAlias = AwaitingAdvertisements | AwaitingShares | AwaitingInputs | AwaitingReveals


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
