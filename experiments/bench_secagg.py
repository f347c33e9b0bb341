"""What the protocol costs: whole rounds in memory, and masks against their limit.

The limit is what no implementation of pairwise masks can avoid: a key stream for every
neighbour and one addition for every element of it. It is measured in the same run as
our masks and as the mask generator of Flower's SecAgg+ for the same shape.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from fedcore.crypto import Mask, ReplayedEntropy, add_masks
from fedcore.ring import Ring
from fedcore.secagg import Threat, make_plan, run_round
from fedcore.secagg.loopback import Stage

Row: TypeAlias = dict[str, str | int | float]
DIMS = (10_000, 100_000, 1_000_000)
NEIGHBOURS = 64
REPEATS = 3


def measure_secagg(nodes: int = 100, rounds: int = REPEATS) -> list[Row]:
    """Return rows for masking one vector, and for whole rounds with 10 % drop-outs.

    Args:
        nodes: Clients of the whole rounds.
        rounds: How often each figure is measured; the fastest counts.
    """
    rows: list[Row] = []
    for dim in DIMS:
        limit = _fastest(rounds, partial(_limit, dim))
        ours = _fastest(rounds, partial(_ours, dim))
        flower = _fastest(1, partial(_flower, dim))
        for name, seconds in (("limit", limit), ("fedcore", ours), ("flower", flower)):
            rows.append(_row(f"mask, {NEIGHBOURS} neighbours", name, dim, seconds, seconds / limit))
    for dim in DIMS[:2]:
        seconds = _fastest(1, partial(_whole_round, nodes, dim))
        rows.append(_row(f"round, {nodes} clients, 10 % lost", "fedcore", dim, seconds, 0.0))
    return rows


def _row(what: str, who: str, dim: int, seconds: float, ratio: float) -> Row:
    return {
        "what": what,
        "who": who,
        "dim": dim,
        "milliseconds": round(1000 * seconds, 3),
        "times_the_limit": round(ratio, 2) if ratio else "",
    }


def _fastest(repeats: int, run: Callable[[], object]) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _seeds() -> list[bytes]:
    entropy = ReplayedEntropy(b"benchmark")
    return [entropy.draw(str(index), 32) for index in range(NEIGHBOURS)]


def _limit(dim: int) -> None:
    """Generate each key stream at once and add it at once, 16 bits an element."""
    total = np.zeros(dim, np.uint16)
    buffer = np.empty(2 * dim + 16, np.uint8)
    zeros = bytes(2 * dim)
    for seed in _seeds():
        encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
        encryptor.update_into(zeros, buffer.data)
        np.add(total, buffer[: 2 * dim].view(np.uint16), out=total)


def _ours(dim: int) -> None:
    ring = Ring(16)
    add_masks(ring.zeros(dim), [Mask(seed) for seed in _seeds()], ring)


def _flower(dim: int) -> None:
    """Do what Flower's mod does for each neighbour, with a modulus of 2^16."""
    total = np.zeros(dim, np.int64)
    for seed in _seeds():
        total = total + pseudo_rand_gen(seed, 1 << 16, [(dim,)])[0]


def _whole_round(clients: int, dim: int) -> None:
    plan = make_plan(clients, dim, 16, threat=Threat(dropout=0.15))
    vector = plan.ring.zeros(dim)
    lost: dict[int, Stage] = dict.fromkeys(range(0, clients, 10), "upload")
    run_round(dict.fromkeys(range(clients), vector), plan, lost)
