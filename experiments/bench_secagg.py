"""What secure aggregation costs, beside the limit and beside Flower's SecAgg+.

The limit is what no implementation of pairwise masks can avoid: a key stream for every
mask and one addition of every element of it. It is measured in the same run, with both
in the cache, one stream, and nothing else going on.

Flower's side runs the primitives and the steps of its mod and its workflow [F], with
our plan's neighbours, threshold and modulus. Everything in a table was run; sizes that
Flower does not finish in minutes are left out.

    mask          masks of 64 neighbours, 16 bits an element
    client        all stages of one client, in a process of its own
    coordinator   from the first upload to the sum, in a process of its own, the other
                  clients simulated (experiments.bench_coordinator)
    round         all parties of a whole round in memory, one process

[F] flwr 1.41, clientapp mod secaggplus_mod and server workflow secaggplus_workflow
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.secaggplus_utils import (
    pseudo_rand_gen,
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)

from experiments.apart import Memory, apart
from experiments.bench_coordinator import Cohort, Cost, client_cost, coordinator_cost
from fedcore.crypto import Mask, ReplayedEntropy, add_masks
from fedcore.errors import ConfigurationError, LocalProtocolError
from fedcore.ring import Ring
from fedcore.secagg import Plan, Threat, make_plan, run_round
from fedcore.secagg.loopback import Stage

Row: TypeAlias = dict[str, str | int | float]
Integers: TypeAlias = npt.NDArray[np.int64]
BITS: Final = 16
NEIGHBOURS: Final = 64
_CACHED: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured.

    Attributes:
        mask_dims: Lengths of a vector for the masks alone.
        dims: Lengths for clients and coordinators.
        clients: Cohorts.
        lost: Fractions of a cohort that vanish.
        largest_dim: One client with 64 neighbours; 0 for none.
        flower_work: Flower's share of a row runs up to so many masked elements.
        flower_rounds: (clients, dim, lost) of whole rounds.
    """

    mask_dims: tuple[int, ...]
    dims: tuple[int, ...]
    clients: tuple[int, ...]
    lost: tuple[float, ...]
    largest_dim: int
    flower_work: float
    flower_rounds: tuple[tuple[int, int, float], ...]


SIZES: Final[dict[str, Size]] = {
    "quick": Size(
        mask_dims=(10_000, 100_000, 1_000_000),
        dims=(100_000,),
        clients=(20, 100),
        lost=(0.0, 0.1),
        largest_dim=0,
        flower_work=1e8,
        flower_rounds=((20, 100_000, 0.1),),
    ),
    "full": Size(
        mask_dims=(100_000, 1_000_000, 10_000_000),
        dims=(100_000, 1_000_000, 10_000_000),
        clients=(20, 100, 500, 1000),
        lost=(0.0, 0.1, 0.3),
        largest_dim=100_000_000,
        flower_work=1e9,
        flower_rounds=(
            *((20, dim, lost) for dim in (100_000, 1_000_000) for lost in (0.0, 0.1, 0.3)),
            (100, 100_000, 0.1),
            (100, 1_000_000, 0.1),
        ),
    ),
}


def measure_secagg(rounds: int = 3, size: str = "quick") -> list[Row]:
    """Return the rows of masks, clients, coordinators and whole rounds.

    Args:
        rounds: How often a mask is measured; the fastest counts.
        size: A key of `SIZES`.

    Raises:
        ConfigurationError: There is no such size.
    """
    if size not in SIZES:
        msg = f"size must be one of {', '.join(SIZES)}, got {size!r}"
        raise ConfigurationError(msg)
    chosen = SIZES[size]
    rows: list[Row] = []
    for part in (_mask_rows(chosen, rounds), _client_rows(chosen), _coordinator_rows(chosen),
                 _round_rows(chosen)):  # fmt: skip
        for row in part:
            print(*(f"{name}={value}" for name, value in row.items() if value != ""), flush=True)
            rows.append(row)
    return rows


def _mask_rows(size: Size, repeats: int) -> Iterator[Row]:
    entropy = ReplayedEntropy(b"benchmark")
    seeds = [entropy.draw(str(index), 32) for index in range(NEIGHBOURS)]
    for dim in size.mask_dims:
        limit = _fastest(repeats, partial(limit_run, dim, NEIGHBOURS))
        yield _row("mask", "limit", dim, limit, limit)
        ours = _fastest(repeats, partial(_ours, dim, seeds))
        yield _row("mask", "fedcore", dim, ours, limit)
        theirs = _fastest(repeats, partial(_flower, dim, seeds))
        yield _row("mask", "flower", dim, theirs, limit)


def _client_rows(size: Size) -> Iterator[Row]:
    shapes = [(clients, dim) for clients in size.clients for dim in size.dims]
    if size.largest_dim:
        shapes.append((NEIGHBOURS + 1, size.largest_dim))
    for clients, dim in shapes:
        plan = _plan(clients, dim)
        limit = _fastest(1, partial(limit_run, dim, plan.neighbours + 1))
        yield _row("client", "limit", dim, limit, limit, plan=plan)
        ours = apart(client_cost, plan)
        yield _row("client", "fedcore", dim, ours.seconds, limit, plan=plan, cost=ours)
        if plan.neighbours * dim <= size.flower_work:
            theirs = apart(flower_client_cost, plan)
            yield _row("client", "flower", dim, theirs.seconds, limit, plan=plan, cost=theirs)


def _coordinator_rows(size: Size) -> Iterator[Row]:
    shapes = [(n, d, lost) for n in size.clients for d in size.dims for lost in size.lost]
    for clients, dim, lost in shapes:
        plan = _plan(clients, dim, lost)
        masks = Cohort(plan, lost).masks_to_remove()
        sample = min(masks, NEIGHBOURS)
        limit = _fastest(1, partial(limit_run, dim, sample)) * masks / sample
        yield _row("coordinator", "limit, one core", dim, limit, limit, plan=plan, lost=lost)
        cost = apart(coordinator_cost, plan, lost)
        yield _row(
            "coordinator", "fedcore", dim, cost.seconds, limit, plan=plan, lost=lost, cost=cost
        )


def _round_rows(size: Size) -> Iterator[Row]:
    for clients, dim, lost in size.flower_rounds:
        plan = _plan(clients, dim, lost)
        ours = _fastest(1, partial(_whole_round, plan, lost))
        yield _row("round", "fedcore", dim, ours, 0, plan=plan, lost=lost)
        theirs = flower_round(plan, lost)
        yield _row("round", "flower", dim, sum(theirs), 0, plan=plan, lost=lost)
        yield _row("coordinator", "flower", dim, theirs[1], 0, plan=plan, lost=lost)


def _row(
    what: str,
    who: str,
    dim: int,
    seconds: float,
    limit: float,
    *,
    plan: Plan | None = None,
    lost: float = 0.0,
    cost: Cost | None = None,
) -> Row:
    return {
        "what": what,
        "who": who,
        "clients": plan.clients if plan else "",
        "neighbours": plan.neighbours if plan else NEIGHBOURS,
        "dim": dim,
        "lost": lost,
        "seconds": float(f"{seconds:.4g}"),
        "times_the_limit": round(seconds / limit, 2) if limit else "",
        "unmask_seconds": float(f"{cost.unmask_seconds:.4g}") if cost else "",
        "megabytes": round(cost.bytes / 1e6, 4) if cost else "",
        "memory_mb": round(cost.memory / 1e6, 1) if cost else "",
    }


def _plan(clients: int, dim: int, lost: float = 0.1) -> Plan:
    """Return a plan that withstands more than is lost, and a colluding twentieth."""
    threat = Threat(corrupt=0.05, dropout=max(0.15, lost + 0.05))
    return make_plan(clients, dim, BITS, threat=threat)


def _fastest(repeats: int, run: Callable[[], object]) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def limit_run(dim: int, masks: int) -> None:
    """Generate and add `masks` vectors [dim] of 16 bits without ever leaving the cache."""
    stream = Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor()
    size = min(_CACHED, 2 * dim)
    zeros, buffer = bytes(size), np.empty(size + 16, np.uint8)
    target, words, total = buffer.data, buffer[:size].view(np.uint16), np.zeros(size // 2, "u2")
    for _ in range(round(2 * dim * masks / size)):
        stream.update_into(zeros, target)
        np.add(total, words, out=total)


def _ours(dim: int, seeds: Sequence[bytes]) -> None:
    ring = Ring(BITS)
    add_masks(ring.zeros(dim), [Mask(seed) for seed in seeds], ring)


def _flower(dim: int, seeds: Sequence[bytes]) -> None:
    """Do what Flower's mod does for each neighbour."""
    total = np.zeros(dim, np.int64)
    for seed in seeds:
        total = total + pseudo_rand_gen(seed, 1 << BITS, [(dim,)])[0]


def _whole_round(plan: Plan, lost: float) -> None:
    absent = Cohort(plan, lost).absent
    drops: dict[int, Stage] = dict.fromkeys(absent, "upload")
    x = plan.ring.zeros(plan.dim)
    run_round(dict.fromkeys(range(plan.clients), x + plan.ring.dtype.type(1)), plan, drops)


@dataclass(slots=True)
class FlowerClient:
    """The steps of Flower's mod for one client; every share is kept, as there."""

    client: int
    plan: Plan
    keys: list[tuple[bytes, bytes]] = field(default_factory=list)
    seed: bytes = b""
    shared: dict[int, bytes] = field(default_factory=dict)
    shares: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    def setup(self) -> tuple[bytes, bytes]:
        """Return two public keys."""
        self.keys = [_flower_key_pair(), _flower_key_pair()]
        return self.keys[0][1], self.keys[1][1]

    def share(self, publics: dict[int, tuple[bytes, bytes]]) -> dict[int, bytes]:
        """Return a ciphertext for every neighbour."""
        self.seed = os.urandom(32)
        count = len(publics) + 1
        seeds = create_shares(self.seed, self.plan.threshold, count)
        secrets = create_shares(self.keys[0][0], self.plan.threshold, count)
        self.shares[self.client] = (seeds[-1], secrets[-1])
        boxes = {}
        for index, (peer, (_, public)) in enumerate(publics.items()):
            key = _flower_agree(self.keys[1][0], public)
            self.shared[peer] = key
            plaintext = share_keys_plaintext_concat(self.client, peer, seeds[index], secrets[index])
            boxes[peer] = encrypt(key, plaintext)
        return boxes

    def mask(
        self, boxes: dict[int, bytes], publics: dict[int, tuple[bytes, bytes]], x: Integers
    ) -> bytes:
        """Return the masked vector, 8 bytes an element."""
        for peer, box in boxes.items():
            _, _, *shares = share_keys_plaintext_separate(decrypt(self.shared[peer], box))
            self.shares[peer] = (shares[0], shares[1])
        modulus = 1 << BITS
        total = x + pseudo_rand_gen(self.seed, modulus, [x.shape])[0]
        for peer in boxes:
            key = _flower_agree(self.keys[0][0], publics[peer][0])
            mask = pseudo_rand_gen(key, modulus, [x.shape])[0]
            total = total + mask if self.client > peer else total - mask
        return bytes(np.mod(total, modulus).data)


def _flower_key_pair() -> tuple[bytes, bytes]:
    """Return a P-384 pair in Flower's encoding; its own functions are no public door."""
    secret = ec.generate_private_key(ec.SECP384R1())
    public = secret.public_key()
    return (
        secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


def _flower_agree(secret: bytes, public: bytes) -> bytes:
    ours, theirs = load_pem_private_key(secret, None), load_pem_public_key(public)
    if not isinstance(ours, ec.EllipticCurvePrivateKey) or not isinstance(
        theirs, ec.EllipticCurvePublicKey
    ):
        msg = "Flower's keys must be on the curve P-384"
        raise LocalProtocolError(msg)
    return generate_shared_key(ours, theirs)


def flower_client_cost(plan: Plan) -> Cost:
    """Return what one client of Flower's SecAgg+ spends; its peers are simulated."""
    client, peers = FlowerClient(0, plan), sorted(plan.neighbours_of(0))
    others = {peer: FlowerClient(peer, plan) for peer in peers}
    publics = {peer: other.setup() for peer, other in others.items()}
    start = time.perf_counter()
    mine = client.setup()
    sent = sum(map(len, mine)) + sum(map(len, client.share(publics).values()))
    seconds = time.perf_counter() - start
    boxes = {}
    for peer, other in others.items():
        key = _flower_agree(other.keys[1][0], mine[1])
        boxes[peer] = encrypt(key, share_keys_plaintext_concat(peer, 0, *client.shares[0]))
    idle = Memory.now()
    x = np.ones(plan.dim, np.int64)
    start = time.perf_counter()
    sent += len(client.mask(boxes, publics, x))
    sent += sum(len(seed) for seed, _ in client.shares.values())
    return Cost(seconds + time.perf_counter() - start, 0.0, sent, idle.growth())


def flower_round(plan: Plan, lost: float) -> tuple[float, float]:
    """Run a round of Flower's SecAgg+; return the seconds of all clients and of the server.

    Raises:
        LocalProtocolError: The sum is wrong.
    """
    cohort = Cohort(plan, lost)
    clients = {index: FlowerClient(index, plan) for index in range(plan.clients)}
    start = time.perf_counter()
    publics = {index: client.setup() for index, client in clients.items()}
    around = {i: {p: publics[p] for p in sorted(plan.neighbours_of(i))} for i in clients}
    boxes = {index: client.share(around[index]) for index, client in clients.items()}
    x = np.ones(plan.dim, np.int64)
    uploads = [
        clients[index].mask({p: boxes[p][index] for p in around[index]}, around[index], x)
        for index in cohort.survivors
    ]
    middle = time.perf_counter()
    total = np.zeros(plan.dim, np.int64)
    for data in uploads:
        total = total + np.frombuffer(data, np.int64)
    total = _flower_unmask(total, cohort, clients, publics)
    end = time.perf_counter()
    if not np.all(total == len(uploads)):
        msg = "the round of Flower's primitives gave a wrong sum"
        raise LocalProtocolError(msg)
    return middle - start, end - middle


def _flower_unmask(
    total: Integers,
    cohort: Cohort,
    clients: dict[int, FlowerClient],
    publics: dict[int, tuple[bytes, bytes]],
) -> Integers:
    """Remove the masks as Flower's workflow does: from all shares, not from enough of them."""
    modulus = 1 << BITS
    for index in clients:
        gone = index in cohort.absent
        holders = [h for h in cohort.survivors if index in clients[h].shares]
        secret = combine_shares([clients[holder].shares[index][gone] for holder in holders])
        if not gone:
            total = total - pseudo_rand_gen(secret, modulus, [total.shape])[0]
            continue
        for peer in cohort.plan.neighbours_of(index):
            if peer in cohort.absent:
                continue  # the workflow adds and takes away these, which cancel
            key = _flower_agree(secret, publics[peer][0])
            mask = pseudo_rand_gen(key, modulus, [total.shape])[0]
            total = total + mask if index > peer else total - mask
    return np.mod(total, modulus)


def draw_secagg(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return a PNG: seconds for the masks of 64 neighbours against the vector's length."""
    from experiments.plots import seconds_over_dim  # noqa: PLC0415 - imports matplotlib

    def line(who: str) -> list[tuple[float, float]]:
        return [
            (float(str(row["dim"])), float(str(row["seconds"])))
            for row in rows
            if row["what"] == "mask" and row["who"] == who
        ]

    return seconds_over_dim(line("limit"), line("fedcore"), line("flower"), NEIGHBOURS)
