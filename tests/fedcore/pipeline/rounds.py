"""Small rounds for tests: plans with few clients, and sums of their uploads."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedcore.crypto import ReplayedEntropy
from fedcore.pipeline import (
    BoundRound,
    LocalUpdate,
    RoundPlan,
    RunPlan,
    Uniform,
    Upload,
    bind_round,
    make_upload,
)
from fedcore.privacy import DistributedGaussian
from fedcore.vectors import RingVector


def round_plan(run: RunPlan | None = None, **changes: Any) -> RoundPlan:
    """A round of five clients and twelve weights."""
    values = {
        "run": run or RunPlan(),
        "run_id": "run",
        "round_number": 1,
        "attempt": 1,
        "clients": 5,
        "dim": 12,
        "model_digest": "ab" * 32,
    }
    return RoundPlan(**(values | changes))


def bound_round(run: RunPlan | None = None, **changes: Any) -> BoundRound:
    """The same, put together."""
    return bind_round(round_plan(run, **changes))


def private_plan(noise: float = 1.0, **changes: Any) -> RunPlan:
    """A plan with noise in the sum."""
    privacy = DistributedGaussian(noise_multiplier=noise, delta=1e-5)
    return RunPlan(**({"privacy": privacy, "weighting": Uniform()} | changes))


def entropy_of(client: int, attempt: int = 1) -> ReplayedEntropy:
    """What a client draws from."""
    return ReplayedEntropy(b"rounds").child(f"client={client}/attempt={attempt}")


def local(delta: Sequence[float] | np.ndarray, examples: int = 1, **metrics: float) -> LocalUpdate:
    """What a client trained."""
    return LocalUpdate(np.asarray(delta, np.float32), examples, metrics)


def upload_all(
    bound: BoundRound, updates: Sequence[LocalUpdate]
) -> tuple[RingVector, list[Upload]]:
    """The sum of all uploads in the ring, and the uploads."""
    uploads = [
        make_upload(bound, update, None, entropy_of(client))
        for client, update in enumerate(updates)
    ]
    return add([upload.vector for upload in uploads], bound), uploads


def add(vectors: Sequence[RingVector], bound: BoundRound) -> RingVector:
    """The sum in the ring, taken in the wide."""
    wide = np.sum([vector.astype(np.uint64) for vector in vectors], axis=0, dtype=np.uint64)
    return bound.ring.reduce(wide)
