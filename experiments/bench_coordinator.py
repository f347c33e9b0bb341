"""One party of secure aggregation measured alone: a client, or the coordinator.

The rest of the cohort is simulated from known secrets. Its uploads are made one at a
time in another process, so that the coordinator's memory is its own, and leave out the
masks between two survivors: these cancel in the sum whatever the server does. What the
coordinator sees (sizes, number of masks, keys, shares) is that of a whole round, and
its sum is checked.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from multiprocessing.connection import Connection

import numpy as np

from experiments.apart import Memory
from fedcore.crypto import (
    KeyPair,
    Mask,
    ParallelAgreement,
    ParallelMasks,
    ReplayedEntropy,
    add_masks,
    split,
)
from fedcore.errors import LocalProtocolError
from fedcore.secagg import Plan, decode, encode, join
from fedcore.secagg.masks import pair_keys, pairwise_masks, seal_shares, seed_commitment
from fedcore.secagg.messages import (
    Advertisement,
    Delivery,
    Invitation,
    MaskedInput,
    Reveal,
    Roster,
    Survivors,
)
from fedcore.secagg.running_sum import RunningSum
from fedcore.secagg.server import AwaitingInputs


@dataclass(frozen=True, slots=True)
class Cost:
    """What one party spent.

    Attributes:
        seconds: Of computation.
        unmask_seconds: The coordinator's part of it after the last upload.
        bytes: That a client sent, or the coordinator received.
        memory: Bytes above those of the idle process, at the worst moment.
    """

    seconds: float
    unmask_seconds: float
    bytes: int
    memory: int


@dataclass(frozen=True)
class Cohort:
    """The secrets of all clients of a simulated round.

    Attributes:
        plan: The round.
        lost: Fraction of the clients that vanish after sharing their secrets.
    """

    plan: Plan
    lost: float

    @property
    def survivors(self) -> list[int]:
        """Whose uploads arrive."""
        return sorted(set(range(self.plan.clients)) - self.absent)

    @cached_property
    def absent(self) -> frozenset[int]:
        """Who vanishes: every tenth client, say."""
        count = round(self.lost * self.plan.clients)
        return frozenset(index * self.plan.clients // count for index in range(count))

    @cached_property
    def pairs(self) -> list[KeyPair]:
        """The masking keys."""
        entropy = ReplayedEntropy(b"benchmark")
        return [
            KeyPair.generate(entropy, f"mask-key {client}") for client in range(self.plan.clients)
        ]

    @cached_property
    def seeds(self) -> list[bytes]:
        """The self masks."""
        entropy = ReplayedEntropy(b"benchmark")
        return [entropy.draw(f"self-mask {client}", 32) for client in range(self.plan.clients)]

    def uploads(self) -> Iterator[bytes]:
        """Yield the survivors' masked inputs; client i's has i everywhere."""
        plan, digest = self.plan, self.plan.digest()
        for client in self.survivors:
            peers = plan.neighbours_of(client) & self.absent
            masks = pairwise_masks(
                self.pairs[client].secret,
                client,
                {peer: self.pairs[peer].public for peer in peers},
                digest,
            )
            x = plan.ring.zeros(plan.dim)
            x += plan.ring.dtype.type(client)
            masked = add_masks(x, [Mask(self.seeds[client]), *masks], plan.ring, out=x)
            yield encode(MaskedInput(masked), plan)

    def reveals(self) -> Iterator[bytes]:
        """Yield the survivors' shares of their neighbours' secrets."""
        plan = self.plan
        shares: dict[int, dict[int, bytes]] = {}
        for client in range(plan.clients):
            holders = sorted(plan.neighbours_of(client))
            secret = self.pairs[client].secret if client in self.absent else self.seeds[client]
            parts = split(
                [secret],
                [holder + 1 for holder in holders],
                plan.threshold,
                ReplayedEntropy(b"benchmark").child(str(client)),
            )
            shares[client] = dict(zip(holders, parts[0], strict=True))
        for client in self.survivors:
            peers = plan.neighbours_of(client)
            yield encode(
                Reveal(
                    {peer: shares[peer][client] for peer in peers - self.absent},
                    {peer: shares[peer][client] for peer in peers & self.absent},
                ),
                plan,
            )

    def masks_to_remove(self) -> int:
        """Return how many vectors the coordinator subtracts."""
        unpaired = sum(len(self.plan.neighbours_of(c) - self.absent) for c in self.absent)
        return len(self.survivors) + unpaired


def coordinator_cost(plan: Plan, lost: float, workers: int | None = None) -> Cost:
    """Return what a coordinator spends from the first upload to the sum.

    Raises:
        LocalProtocolError: The sum is wrong.
    """
    cohort = Cohort(plan, lost)
    digest = plan.digest()
    state = AwaitingInputs(
        plan,
        {client: pair.public for client, pair in enumerate(cohort.pairs)},
        {client: seed_commitment(digest, client, s) for client, s in enumerate(cohort.seeds)},
        RunningSum(plan.ring.zeros(plan.dim)),
    )
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_send_all, args=(there, plan, lost)
    )
    process.start()
    there.close()
    idle, received, adding = Memory.now(), 0, 0.0
    for client in cohort.survivors:
        data = here.recv_bytes()
        start = time.perf_counter()
        state = state.on_input(client, decode(data, MaskedInput, plan))
        adding += time.perf_counter() - start
        received += len(data)
    start = time.perf_counter()
    unmasking, _ = state.close()
    seconds = time.perf_counter() - start
    for client in cohort.survivors:
        data = here.recv_bytes()
        start = time.perf_counter()
        unmasking = unmasking.on_reveal(client, decode(data, Reveal, plan))
        seconds += time.perf_counter() - start
        received += len(data)
    process.join()
    start = time.perf_counter()
    outcome = unmasking.close(ParallelMasks(workers), ParallelAgreement(workers))
    seconds += time.perf_counter() - start
    expected = plan.ring.dtype.type(sum(cohort.survivors) & plan.ring.mask)
    if not np.all(outcome.total == expected):
        msg = "the simulated round gave a wrong sum"
        raise LocalProtocolError(msg)
    return Cost(adding + seconds, seconds, received, idle.growth())


def _send_all(pipe: Connection, plan: Plan, lost: float) -> None:
    cohort = Cohort(plan, lost)
    for data in chain(cohort.uploads(), cohort.reveals()):
        pipe.send_bytes(data)


def client_cost(plan: Plan) -> Cost:
    """Return what one client spends in all stages, its vector included in the memory."""
    entropy = ReplayedEntropy(b"benchmark")
    digest = plan.digest()
    peers = sorted(plan.neighbours_of(0))
    masking = {peer: KeyPair.generate(entropy, f"mask-key {peer}") for peer in peers}
    sharing = {peer: KeyPair.generate(entropy, f"share-key {peer}") for peer in peers}
    roster = Roster({p: Advertisement(masking[p].public, sharing[p].public) for p in peers})

    start = time.perf_counter()
    first, advertised = join(Invitation(0, plan), entropy)
    second, boxes = first.on_roster(roster, entropy)
    sent = len(encode(advertised, plan)) + len(encode(boxes, plan))
    seconds = time.perf_counter() - start

    delivery = Delivery(
        {
            peer: seal_shares(
                pair_keys(pair.secret, peer, {0: advertised.share_key}, digest)[0],
                (bytes(36), bytes(36)),
                peer,
                0,
                digest,
            )
            for peer, pair in sharing.items()
        }
    )
    idle = Memory.now()
    x = plan.ring.zeros(plan.dim)
    x += plan.ring.dtype.type(1)
    start = time.perf_counter()
    third, masked = second.on_delivery(delivery, x, out=x)
    sent += len(encode(masked, plan))
    del masked
    _, reveal = third.on_survivors(Survivors(frozenset(range(plan.clients))))
    sent += len(encode(reveal, plan))
    seconds += time.perf_counter() - start
    return Cost(seconds, 0.0, sent, idle.growth())
