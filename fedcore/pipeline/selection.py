"""Which coordinates a round sends: what its sparsifier, its seed and the model's layers say.

All of it is public and the same on all devices; see `fedcore.codec.sparsify`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from fedcore.codec import (
    Dense,
    PartlyDense,
    PublicTopK,
    RandomK,
    Sketch,
    Support,
    outside,
    small_layers,
)
from fedcore.codec.partly_dense import Ranges
from fedcore.pipeline.clipping import Layer
from fedcore.pipeline.plan import RunPlan
from fedcore.pipeline.round_plan import RoundPlan
from fedcore.vectors import Layout, RealVector

Selection: TypeAlias = Dense | RandomK | Sketch | Support | PartlyDense
"""What of an update is sent, in one round."""


def layers_of(run: RunPlan, layout: Layout) -> tuple[Layer, ...]:
    """Return the layers that the plan of a round has to name: none if it treats all alike."""
    if not run.names_layers:
        return ()
    return tuple(Layer(entry.name, entry.size) for entry in layout.entries)


def selection_of(plan: RoundPlan) -> Selection:
    """Return the round's own sparsifier: fresh coordinates, the same for all clients."""
    sparsify = plan.run.sparsify
    if isinstance(sparsify, Dense):
        return sparsify
    whole, others = _split(plan, sparsify.dense_below)
    if others == 0:
        return Dense()
    rest: RandomK | Sketch | Support = (
        Support(plan.support)
        if isinstance(sparsify, PublicTopK)
        else replace(sparsify, seed=plan.stage_seed("support"))
    )
    return PartlyDense(rest, whole) if whole else rest


def support_of(plan: RoundPlan, last: RealVector | None) -> str:
    """Return the support of a round with sparsify=public_top_k; empty for any other.

    Args:
        plan: Of the round, as yet without a support.
        last: The last aggregate, shape [dim]; None before the first.
    """
    sparsify = plan.run.sparsify
    if not isinstance(sparsify, PublicTopK):
        return ""
    whole, others = _split(plan, sparsify.dense_below)
    if others == 0:
        return ""
    if last is not None and whole:
        last = last[outside(whole, plan.dim)]
    return sparsify.choose(last, others, plan.stage_seed("support"))


def _split(plan: RoundPlan, below: int) -> tuple[Ranges, int]:
    """Return where small layers are, and how many coordinates are in none of them."""
    whole = small_layers((layer.size for layer in plan.layers), below)
    return whole, plan.dim - sum(stop - start for start, stop in whole)
