"""The clip of one round as a codec stage: every number in it comes from the plan."""

from __future__ import annotations

from typing import TypeAlias, assert_never

import numpy as np

from fedcore.codec import Clip, ClipSegments, PartlyDense, RandomK, Support, TellingClip
from fedcore.pipeline.clipping import AdaptiveClip, PerLayerClip
from fedcore.pipeline.round_plan import RoundPlan
from fedcore.pipeline.selection import Selection
from fedcore.privacy import NoPrivacy, stated_noise

ClipStage: TypeAlias = Clip | TellingClip | ClipSegments


def clip_stage(plan: RoundPlan, sparsify: Selection) -> ClipStage:
    """Return the stage that clips what `sparsify` leaves of an update.

    Args:
        plan: Of the round.
        sparsify: Of the round too, with the round's seed.

    Raises:
        ConfigurationError: The clip's parameters do not fit the noise, or name no layer.
    """
    match plan.run.clip:
        case Clip() as clip:
            return clip
        case AdaptiveClip() as clip:
            privacy = plan.run.privacy
            if isinstance(privacy, NoPrivacy):
                return Clip(plan.norm)  # the tally counts what was clipped
            return TellingClip(plan.norm, clip.weight(stated_noise(privacy), plan.clients))
        case PerLayerClip() as clip:
            return ClipSegments(clip.bounds(plan.layers), _stops(plan, sparsify))
        case _:
            assert_never(plan.run.clip)


def _stops(plan: RoundPlan, sparsify: Selection) -> tuple[int, ...]:
    """Return where each layer ends in what is sent."""
    ends = np.cumsum([layer.size for layer in plan.layers])
    if isinstance(sparsify, (RandomK, Support, PartlyDense)):
        # Positions ascend, so what is sent of a layer stays together.
        ends = np.searchsorted(sparsify.positions(plan.dim), ends)
    return tuple(ends.tolist())
