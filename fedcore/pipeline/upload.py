"""The device's half of a round: from a trained update to ring elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

import numpy as np

from fedcore.crypto import Entropy
from fedcore.errors import ConfigurationError, LocalProtocolError
from fedcore.pipeline.bound import BoundRound
from fedcore.pipeline.choices import ByExamples
from fedcore.vectors import RealVector, RingVector

FRACTION_BITS = 16
"""Resolution of a summed metric: weight * value is kept to 2^-16."""


@dataclass(frozen=True, slots=True)
class LocalUpdate:
    """What local training produced.

    Attributes:
        delta: Trained weights minus received ones, flat, shape [dim].
        examples: How many examples were trained on.
        metrics: Numbers to average over the cohort, by name.
    """

    delta: RealVector = field(repr=False)
    examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Upload:
    """One client's contribution to the sum, not yet masked.

    Attributes:
        vector: Shape [bound.dim].
        payload: The update as the round's compressor coded it; empty if it is in `vector`.
        whole: What it was made from, float32, shape [dim]: the weighted update, and what was
            left out before; see `left_out`. None without error feedback.
        metric_names: What the tally's free slots mean; the same on all clients.
    """

    vector: RingVector = field(repr=False)
    payload: bytes = field(repr=False)
    whole: RealVector | None = field(repr=False)
    metric_names: tuple[str, ...]


def make_upload(
    bound: BoundRound,
    update: LocalUpdate,
    residual: RealVector | None,
    entropy: Entropy,
    *,
    staleness: int = 0,
) -> Upload:
    """Weigh, compensate, encode, and append the tally.

    Args:
        bound: The round.
        update: Of this client.
        residual: What earlier uploads left out, shape [dim]; None for zeros.
        entropy: Source of rounding and noise, separate for each client and attempt.
        staleness: Versions since the model that was trained from; 0 in a round.

    Raises:
        ConfigurationError: More metrics than the plan has slots, or a delta of another size.
    """
    run = bound.plan.run
    if update.delta.shape != (bound.plan.dim,):
        msg = f"expected an update of {bound.plan.dim} entries, found {update.delta.shape}"
        raise ConfigurationError(msg)
    weight, share = _weigh(bound, update.examples)
    x = update.delta.astype(np.float64) * share
    whole = None
    if run.error_feedback:
        # Rounded before it is encoded: what is left out follows from it to the last bit.
        whole = _rounded(x if residual is None else x + residual)
        x = whole.astype(np.float64)
    kept = bound.kept.encode(x, entropy)
    if bound.plan.buffer is not None:
        kept = kept * bound.plan.buffer.weight(staleness)  # after the clip: it only gets shorter
    vector, payload = bound.sent.encode(kept, entropy), b""
    if bound.compressor is not None:
        payload = bound.compressor.compress(kept, entropy)
    if not bound.tally.slots:
        return Upload(vector, payload, whole, ())
    clipped = bound.clip.exceeded(bound.select.encode(x, entropy))
    metrics = update.metrics if run.metric_slots else {}
    numbers = [weight, int(clipped), *_metric_numbers(bound, metrics, weight)]
    vector = np.concatenate([vector, bound.tally.encode(numbers)])
    return Upload(vector, payload, whole, tuple(metrics))


def left_out(bound: BoundRound, whole: RealVector, payload: bytes) -> RealVector:
    """Return what an upload does not send, but for rounding that is unbiased.

    Args:
        bound: The round of the upload.
        whole: What the upload was made from, shape [dim].
        payload: As in the upload.

    Returns:
        Float32, shape [dim].
    """
    x = whole.astype(np.float64)
    if bound.compressor is not None:
        sent = bound.compressor.decompress(payload, bound.plan.dim)
    else:
        sent = bound.kept.decode(bound.kept.encode(x, _NoDraws()))
    return (x - sent).astype(np.float32)


class _NoDraws:
    """What is sent is no matter of chance: who draws here has broken `left_out`."""

    def draw(self, purpose: str, size: int, /) -> bytes:
        msg = f"what is sent must follow from the update, yet {size} bytes are drawn: {purpose}"
        raise LocalProtocolError(msg)

    def child(self, name: str, /) -> Entropy:
        del name
        return self


def _rounded(x: RealVector) -> RealVector:
    """Return `x` as float32; what has no finite value there becomes 0."""
    with np.errstate(over="ignore"):
        return np.nan_to_num(x.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


def _weigh(bound: BoundRound, examples: int) -> tuple[int, float]:
    """Return the integer weight, and the factor of the update in [0, 1]."""
    weighting = bound.plan.run.weighting
    if not isinstance(weighting, ByExamples):
        return 1, 1.0
    weight = max(0, min(examples, weighting.max_examples))
    return weight, weight / weighting.max_examples


def _metric_numbers(bound: BoundRound, metrics: Mapping[str, float], weight: int) -> list[int]:
    slots = bound.plan.run.metric_slots
    if len(metrics) > slots:
        msg = (
            f"expected at most plan.metric_slots={slots} metrics, found {sorted(metrics)}: "
            "raise metric_slots or report fewer"
        )
        raise ConfigurationError(msg)
    numbers = [
        round(weight * value * (1 << FRACTION_BITS)) if isfinite(value) else 0
        for value in metrics.values()
    ]
    return numbers + [0] * (slots - len(numbers))
