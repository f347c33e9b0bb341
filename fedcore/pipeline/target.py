"""A plan whose noise was found for the epsilon that all its rounds may cost.

A round knows its noise and its sensitivity, but not how many rounds there are; an
operator thinks in what the whole run may cost. `resolve` goes from one to the other,
through the very binding that the rounds use: the finer the noise, the finer the
rounding, and the sensitivity that the noise is measured against changes with it.

    plan = resolve(RunPlan(privacy=DistributedGaussian(epsilon=4.0, delta=1e-5), ...),
                   rounds=100, clients=50, dim=1_000_000)

The resolved plan states its noise, and keeps the target as the budget that the ledger
enforces. Any mechanism whose dataclass has `noise_multiplier` and `epsilon` is resolved.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import NamedTuple

from fedcore.codec import Clip
from fedcore.errors import ConfigurationError
from fedcore.pipeline.bound import BoundRound, bind_round
from fedcore.pipeline.choices import Modular
from fedcore.pipeline.clipping import Layer, PerLayerClip, first_norm
from fedcore.pipeline.plan import RunPlan
from fedcore.pipeline.round_plan import RoundPlan
from fedcore.pipeline.selection import support_of
from fedcore.privacy import Found, NoPrivacy, PrivacyLedger, least_noise
from fedcore.privacy.target import not_positive, rounded_up

WIDEST = 32
"""Bits of the widest ring that `Modular` offers."""


def resolve(
    plan: RunPlan, *, rounds: int, clients: int, dim: int, layers: tuple[Layer, ...] = ()
) -> RunPlan:
    """Return `plan` with the least noise that keeps all rounds within its target.

    Args:
        plan: Returned as it is if its noise is given.
        rounds: How many sums the run reveals at most.
        clients: How many are invited to each.
        dim: Length of the flat update.
        layers: Of the model, if the plan treats them apart.

    Raises:
        ConfigurationError: The plan cannot work, or no noise that works reaches the target;
            names the smallest epsilon, and the smallest ring, that do.

    Example:
        >>> from fedcore.pipeline import Uniform
        >>> from fedcore.privacy import DistributedGaussian
        >>> mechanism = DistributedGaussian(epsilon=4.0, delta=1e-5)
        >>> plan = RunPlan(privacy=mechanism, weighting=Uniform())
        >>> found = resolve(plan, rounds=100, clients=50, dim=1000).privacy
        >>> round(found.noise_multiplier, 2), found.epsilon, found.epsilon_budget
        (11.58, None, 4.0)
    """
    privacy = plan.privacy
    if isinstance(privacy, NoPrivacy) or privacy.epsilon is None:
        return plan
    sizes = _Sizes(clients, dim, layers)
    found, why = _search(plan, rounds, sizes)
    if found is not None and privacy.epsilon <= 0:
        raise ConfigurationError(not_positive(privacy.epsilon, found.epsilon))
    if found is None or found.epsilon > privacy.epsilon:
        wider = _smallest_ring(plan, rounds, sizes)
        raise ConfigurationError(_unreachable(plan, wider, found, why))
    budget = privacy.epsilon if privacy.epsilon_budget is None else privacy.epsilon_budget
    return replace(
        plan,
        privacy=replace(
            privacy,
            noise_multiplier=found.noise_multiplier,
            epsilon=None,
            epsilon_budget=budget,
        ),
    )


def with_noise(plan: RunPlan, noise_multiplier: float) -> RunPlan:
    """Return `plan` with another noise, and neither target nor budget."""
    if isinstance(plan.privacy, NoPrivacy):
        return plan
    return replace(
        plan,
        privacy=replace(
            plan.privacy, noise_multiplier=noise_multiplier, epsilon=None, epsilon_budget=None
        ),
    )


def bind_first(
    plan: RunPlan, *, clients: int, dim: int, layers: tuple[Layer, ...] = ()
) -> BoundRound:
    """Return the first round of a run put together: the others cost the same.

    What a round costs does not depend on how a clip is spread over layers.

    Args:
        plan: Its noise is stated.
        clients: How many are invited.
        dim: Length of the flat update.
        layers: Of the model; needed if small ones are sent whole.

    Raises:
        ConfigurationError: The stages do not fit each other, the cohort or the ring.
    """
    if isinstance(plan.clip, PerLayerClip):
        plan = replace(plan, clip=Clip(plan.clip.norm))
    first = RoundPlan(
        run=plan,
        run_id="preflight",
        round_number=1,
        attempt=1,
        clients=clients,
        dim=dim,
        model_digest="",
        clip_norm=first_norm(plan.clip),
        layers=layers if plan.names_layers else (),
    )
    return bind_round(replace(first, support=support_of(first, None)))


def projected_epsilon(bound: BoundRound, rounds: int, delta: float) -> float:
    """Return what `rounds` rounds like `bound` cost together."""
    release = bound.release(bound.plan.clients)
    return PrivacyLedger(delta=delta).projected_epsilon(release, rounds)


class _Sizes(NamedTuple):
    """Of a round: arguments of `bind_first`."""

    clients: int
    dim: int
    layers: tuple[Layer, ...]


def _search(
    plan: RunPlan, rounds: int, sizes: _Sizes
) -> tuple[Found | None, ConfigurationError | None]:
    """Return what was found, and why a noise near 1 did not work."""
    privacy, refusals = plan.privacy, dict[float, ConfigurationError]()
    if isinstance(privacy, NoPrivacy) or privacy.epsilon is None:
        return None, None

    def projection(noise: float) -> float | None:
        try:
            bound = bind_first(with_noise(plan, noise), **sizes._asdict())
        except ConfigurationError as error:
            refusals[abs(log(noise))] = error
            return None
        return projected_epsilon(bound, rounds, privacy.delta)

    # No noise reaches less than nothing: what is found then is the most noise that fits.
    found = least_noise(projection, privacy.epsilon if privacy.epsilon > 0 else -1.0)
    return found, refusals[min(refusals)] if refusals else None


def _unreachable(
    plan: RunPlan, wider: int | None, found: Found | None, why: ConfigurationError | None
) -> str:
    target = getattr(plan.privacy, "epsilon", None)
    if found is None:
        return f"no noise reaches privacy.epsilon={target:g}: {why}"
    ring = "" if wider is None else f", raise quantize.bits to {wider}"
    return (
        f"no noise that fits reaches privacy.epsilon={target:g}: the most is a noise multiplier of "
        f"{found.noise_multiplier:.4g}; raise privacy.epsilon to {rounded_up(found.epsilon):g}"
        f"{ring}, or run fewer rounds"
    )


def _smallest_ring(plan: RunPlan, rounds: int, sizes: _Sizes) -> int | None:
    """Return the fewest bits that reach the target; None if no number of bits does."""
    quantize = plan.quantize
    if not isinstance(quantize, Modular):
        return None
    for bits in range(quantize.bits + 1, WIDEST + 1):
        wider = replace(plan, quantize=replace(quantize, bits=bits))
        found, _ = _search(wider, rounds, sizes)
        if found is not None and found.epsilon <= getattr(plan.privacy, "epsilon", 0.0):
            return bits
    return None
