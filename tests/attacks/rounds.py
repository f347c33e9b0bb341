"""What a coordinator holds after a round that everybody else played honestly.

`reveal` goes the whole way: upload, masks, drop-outs, sum, decoding. `add_up` leaves the
masks out; it gives the same numbers, for attacks that need thousands of rounds.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedcore.crypto import ReplayedEntropy
from fedcore.pipeline import (
    BoundRound,
    LocalUpdate,
    MeanUpdate,
    RoundPlan,
    RunPlan,
    Uniform,
    Upload,
    bind_round,
    decode_sum,
    make_upload,
)
from fedcore.privacy import DistributedGaussian
from fedcore.secagg import run_round

DELTA = 1e-5


def bound_round(run: RunPlan, clients: int, dim: int, round_number: int = 1) -> BoundRound:
    """Round `round_number` of a run."""
    return bind_round(
        RoundPlan(
            run=run,
            run_id="attacked",
            round_number=round_number,
            attempt=1,
            clients=clients,
            dim=dim,
            model_digest="ab" * 32,
        )
    )


def exact(**changes: object) -> RunPlan:
    """A plan without noise, in which all clients weigh the same."""
    return RunPlan(**({"weighting": Uniform()} | changes))


def noisy(noise: float, **changes: object) -> RunPlan:
    """A plan with noise in the sum, `noise` times what one client can change."""
    privacy = DistributedGaussian(noise_multiplier=noise, delta=DELTA)
    return RunPlan(**({"privacy": privacy, "weighting": Uniform()} | changes))


def uploads_of(
    bound: BoundRound, deltas: Sequence[np.ndarray], seed: object = 0, **metrics: float
) -> list[Upload]:
    """What each client would send if there were no masks."""
    entropy = ReplayedEntropy(repr(seed).encode())
    return [
        make_upload(
            bound,
            LocalUpdate(np.asarray(delta, np.float32), 1, metrics),
            None,
            entropy.child(f"client={client}"),
        )
        for client, delta in enumerate(deltas)
    ]


def reveal(
    bound: BoundRound,
    deltas: Sequence[np.ndarray],
    seed: object = 0,
    drops: Mapping[int, str] | None = None,
) -> MeanUpdate:
    """The mean over those that did not drop out, by the masked protocol."""
    uploads = uploads_of(bound, deltas, seed)
    inputs = {client: upload.vector for client, upload in enumerate(uploads)}
    entropy = ReplayedEntropy(b"masks").child(repr(seed))
    result = run_round(inputs, bound.secagg, drops, entropy=entropy)
    names = {uploads[client].metric_names for client in result.survivors}
    return decode_sum(bound, result.total, len(result.survivors), names)


def add_up(bound: BoundRound, deltas: Sequence[np.ndarray], seed: object = 0) -> MeanUpdate:
    """The same if nobody drops out."""
    uploads = uploads_of(bound, deltas, seed)
    wide = np.sum([upload.vector.astype(np.uint64) for upload in uploads], axis=0)
    names = {upload.metric_names for upload in uploads}
    return decode_sum(bound, bound.ring.reduce(wide), len(uploads), names)


def noise_of(bound: BoundRound, survivors: int) -> float:
    """Standard deviation of the noise in one coordinate of the sum, in real units."""
    return bound.calibration.central_sigma(survivors) / bound.calibration.scale
