"""The coordinator's half of a round: from the revealed sum to a mean update."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedcore.codec import TellingClip
from fedcore.errors import RoundAbortedError
from fedcore.pipeline.bound import FIXED_SLOTS, BoundRound
from fedcore.pipeline.central import CoordinatorNoise, add_noise
from fedcore.pipeline.choices import ByExamples
from fedcore.pipeline.upload import FRACTION_BITS
from fedcore.vectors import RealVector, RingVector


@dataclass(frozen=True, slots=True)
class MeanUpdate:
    """What the coordinator learns from one round.

    Attributes:
        delta: Weighted mean of the survivors' updates, shape [dim].
        weight: Sum of their weights.
        metrics: Weighted means, by name; empty under differential privacy.
        clipped: How many updates were clipped; None under differential privacy.
        survivors: How many clients are in the mean.
        unclipped: Fraction of the updates that fitted the clip: exact without noise, an
            estimate with noise, None where it is not told.
    """

    delta: RealVector = field(repr=False)
    weight: float
    metrics: Mapping[str, float]
    clipped: int | None
    survivors: int
    unclipped: float | None = None


def decode_sum(
    bound: BoundRound,
    total: RingVector,
    survivors: int,
    metric_names: Collection[tuple[str, ...]],
    noise: CoordinatorNoise | None = None,
    *,
    updates: RealVector | None = None,
    stale: float | None = None,
    factor: RealVector | None = None,
) -> MeanUpdate:
    """Return the mean that a sum over `survivors` clients stands for.

    Args:
        bound: The round.
        total: The sum in the ring, shape [bound.dim].
        survivors: How many clients are in it.
        metric_names: What each client said its metrics are; all the same, or the
            metrics are meaningless and the round is aborted.
        noise: Of the coordinator; needed if the plan says that it adds the noise.
        updates: Sum of the updates, shape [dim], if they were not added in the ring.
        stale: Sum of the survivors' weights by staleness, in a buffer; None in a round.
        factor: By which each coordinate's sum becomes its mean, shape [dim], if not all devices
            trained all of them; see `fedcore.pipeline.shares`.

    Raises:
        RoundAbortedError: Clients reported different metrics, or nobody had examples.
        LocalProtocolError: The plan wants the coordinator's noise, but there is none.
    """
    names = agreed_names(metric_names)
    sums = bound.tally.decode(total[bound.update_dim :])
    weight = sums[0] if sums else survivors
    if weight <= 0:
        raise RoundAbortedError(stage="decoding", needed=1, found=0, reason="no examples at all")
    weighting = bound.plan.run.weighting
    unit = weighting.max_examples if isinstance(weighting, ByExamples) else 1
    unclipped = 1 - sums[1] / survivors if sums else None
    if updates is None:
        update = total[: bound.update_dim]
        if bound.plan.run.central:
            update = add_noise(bound, update, noise)
        sent = bound.sent.decode(update)
        updates = bound.kept.decode(sent)
        if isinstance(bound.clip, TellingClip):
            unclipped = bound.clip.fraction(sent, survivors)
    if factor is None:
        delta = updates * (unit / weight if stale is None else 1 / stale)
    else:
        delta = updates * factor
    values = [value / (weight << FRACTION_BITS) for value in sums[FIXED_SLOTS:]]
    return MeanUpdate(
        delta=delta.astype(np.float32),
        weight=float(weight),
        metrics=dict(zip(names, values, strict=False)),
        clipped=sums[1] if sums else None,
        survivors=survivors,
        unclipped=unclipped,
    )


def agreed_names(metric_names: Collection[tuple[str, ...]]) -> tuple[str, ...]:
    """Return what all clients call their metrics; check it before the sum is revealed.

    Raises:
        RoundAbortedError: Clients reported different metrics.
    """
    names = set(metric_names)
    if len(names) > 1:
        raise RoundAbortedError(
            stage="uploading",
            needed=1,
            found=len(names),
            reason=f"clients reported different metrics: {sorted(names)}",
        )
    return next(iter(names), ())
