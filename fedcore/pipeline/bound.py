"""A round plan put together: every stage knows its domain, or the round never starts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from fedcore.codec import (
    Bound,
    Compressor,
    Discretize,
    Domain,
    Embed,
    Hadamard,
    Integers,
    Quantize,
    Reals,
    RingElements,
    Tally,
    narrowest_ring,
)
from fedcore.errors import ConfigurationError
from fedcore.pipeline.choices import Bonawitz, Modular, SeedHelper
from fedcore.pipeline.clip_stage import ClipStage, clip_stage
from fedcore.pipeline.round_plan import RoundPlan
from fedcore.pipeline.selection import selection_of
from fedcore.privacy import (
    Calibration,
    Distributed,
    Drawn,
    MatrixGaussian,
    NoPrivacy,
    Release,
    calibrate,
    colluding,
    stated_noise,
)
from fedcore.privacy.calibration import MAX_INFLATION
from fedcore.privacy.samplers import MAX_SIGMA
from fedcore.ring import Ring
from fedcore.secagg import Plan, Threat, make_plan
from fedcore.secagg.plan import NOBODY
from fedcore.secagg.seed_helper import HelperPlan

_NO_TABLE = 2.0**52
"""Correlated noise is drawn without a table: it may be as wide as whole floats go."""
FIXED_SLOTS = 2
"""The tally's own numbers: the weight, and how many updates were clipped."""
_TALLY_BITS = 32
"""Of the ring in which updates that are not added there count their weights."""


@dataclass(frozen=True, slots=True)
class BoundRound:
    """Everything that both sides of a round derive from its plan.

    Attributes:
        plan: What it was derived from.
        select: The first stage (sparsify): which coordinates are sent.
        clip: The second one, which knows whether it changes a vector.
        kept: Both: what of an update is sent, and with an adaptive clip under noise one
            coordinate more, which says whether it was clipped.
        sent: The stages from there on, to ring elements.
        codec: All stages, from the flat update to ring elements.
        tally: Carries weights and metrics behind the update.
        secagg: Parameters of pairwise masks; None without them.
        helper: Parameters of masks whose seeds a helper knows; None without it.
        minimum_survivors: Fewer abort the round.
        calibration: Of scale and noise; None for uniform quantisation.
        compressor: Codes each update by itself, outside the ring; None under a sum.
    """

    plan: RoundPlan
    select: Bound = field(repr=False)
    clip: ClipStage
    kept: Bound = field(repr=False)
    sent: Bound = field(repr=False)
    codec: Bound = field(repr=False)
    tally: Tally
    secagg: Plan | None
    helper: HelperPlan | None
    minimum_survivors: int
    calibration: Calibration | None
    compressor: Compressor | None = None

    @property
    def ring(self) -> Ring:
        """Where the sum is taken."""
        return self.tally.ring

    @property
    def update_dim(self) -> int:
        """Ring elements of the encoded update."""
        return self.codec.target.dim

    @property
    def dim(self) -> int:
        """Ring elements of an upload: the update, then the tally."""
        return self.update_dim + self.tally.dim

    def release(self, survivors: int, drawn: Drawn | None = None) -> Release:
        """Return what the ledger records when a sum over `survivors` is revealed.

        Args:
            survivors: How many clients are in it.
            drawn: How all that were invited had been chosen. Once one of them is lost,
                nothing is known of those who are left.
        """
        release = self._release(survivors)
        if drawn is None or survivors < self.plan.clients:
            return release
        wanted = getattr(self.plan.run.privacy, "amplification", False)
        return replace(
            release,
            sampling=drawn.sampling,
            sampling_rate=drawn.rate,
            population=drawn.population,
            amplification_claimed=wanted and drawn.sampling == "poisson",
        )

    def _release(self, survivors: int) -> Release:
        if self.calibration is not None:
            return Release.of_sum(
                self.plan.round_number,
                self.plan.run.privacy,
                self.calibration,
                survivors=survivors,
                sampling="unknown",
            )
        return Release(
            round_number=self.plan.round_number,
            unit="device",
            mechanism="none",
            noise_multiplier=0.0,
            dim=max(1, self.kept.target.dim),
            clients=self.plan.clients,
            survivors=survivors,
        )


@lru_cache(maxsize=8)
def bind_round(plan: RoundPlan) -> BoundRound:
    """Put the stages of `plan` together.

    Raises:
        ConfigurationError: They do not fit each other, the cohort or the ring.
    """
    run = plan.run
    minimum = run.minimum_survivors(plan.clients)
    rotate = run.rotate
    if isinstance(rotate, Hadamard):
        rotate = replace(rotate, seed=plan.stage_seed("rotation"))
    sparsify = selection_of(plan)
    select = sparsify.bind(Reals(plan.dim))
    clip = clip_stage(plan, sparsify)
    kept = select.then(clip.bind(select.target))
    if run.compressor is not None:
        return _compressed(plan, select, clip, run.compressor)
    rotated = rotate.bind(kept.target)
    calibration = _calibrate(plan, rotated.target, minimum)
    integers = _quantize(plan, rotated, calibration)
    ring = _ring(plan, integers.target)
    embed = Embed(ring.bits, plan.clients, _tails(plan))
    sent = integers.then(embed.bind(integers.target))
    tally = Tally(0 if run.private else FIXED_SLOTS + run.metric_slots, plan.clients, ring)
    bound = BoundRound(
        plan=plan,
        select=select,
        clip=clip,
        kept=kept,
        sent=sent,
        codec=kept.then(sent),
        tally=tally,
        secagg=None,
        helper=None,
        minimum_survivors=minimum,
        calibration=calibration,
    )
    return replace(
        bound,
        secagg=_secagg(plan, bound.dim, ring, minimum),
        helper=_helper(plan, bound.dim, ring, minimum),
    )


def _compressed(
    plan: RoundPlan, select: Bound, clip: ClipStage, compressor: Compressor
) -> BoundRound:
    """Return a round in which only weights and metrics are summed in a ring."""
    ring = Ring(_TALLY_BITS)
    kept = select.then(clip.bind(select.target))
    nothing = Bound(
        source=kept.target,
        target=RingElements(0, ring.bits),
        encode=lambda _, __: ring.zeros(0),
        decode=lambda total: total,
    )
    return BoundRound(
        plan=plan,
        select=select,
        clip=clip,
        kept=kept,
        sent=nothing,
        codec=kept.then(nothing),
        tally=Tally(FIXED_SLOTS + plan.run.metric_slots, plan.clients, ring),
        secagg=None,
        helper=None,
        minimum_survivors=plan.run.minimum_survivors(plan.clients),
        calibration=None,
        compressor=compressor,
    )


def _calibrate(plan: RoundPlan, flat: Domain, minimum: int) -> Calibration | None:
    run = plan.run
    if not isinstance(run.quantize, Modular) or not isinstance(flat, Reals):
        return None
    privacy = run.privacy
    noise = stated_noise(privacy)
    if isinstance(privacy, MatrixGaussian):
        noise = privacy.released_multiplier
    return calibrate(
        clip=flat.norm,
        dim=flat.dim,
        peak=flat.peak,
        clients=plan.clients,
        minimum_survivors=minimum,
        noise_multiplier=noise,
        ring_bits=run.quantize.bits,
        tails=run.quantize.tails,
        colluders=colluding(privacy, plan.clients),
        max_inflation=MAX_INFLATION if isinstance(privacy, NoPrivacy) else privacy.max_inflation,
        central=run.central,
        largest_sigma=_NO_TABLE if isinstance(privacy, MatrixGaussian) else MAX_SIGMA,
    )


def _quantize(plan: RoundPlan, flat: Bound, calibration: Calibration | None) -> Bound:
    run = plan.run
    if isinstance(run.quantize, Quantize):
        return flat.then(run.quantize.bind(flat.target))
    if calibration is None:
        msg = f"quantize=modular takes real vectors, got {flat.target}"
        raise ConfigurationError(msg)
    # The coordinator's noise is added in the ring, to the sum: it takes room there.
    spread = calibration.spread if run.central else calibration.signal_spread
    discretize = Discretize(calibration.scale, calibration.rounded_norm, spread)
    integers = flat.then(discretize.bind(flat.target))
    if not isinstance(run.privacy, Distributed):
        return integers
    noise = run.privacy.noise(calibration.sigma_local, plan.clients)
    return integers.then(noise.bind(integers.target))


def _ring(plan: RoundPlan, integers: Domain) -> Ring:
    if isinstance(plan.run.quantize, Modular):
        return Ring(plan.run.quantize.bits)
    if not isinstance(integers, Integers):
        msg = f"the quantiser must return integers, got {integers}"
        raise ConfigurationError(msg)
    return Ring(narrowest_ring(integers, plan.clients))


def _tails(plan: RoundPlan) -> float:
    return plan.run.quantize.tails if isinstance(plan.run.quantize, Modular) else 4.0


def _secagg(plan: RoundPlan, dim: int, ring: Ring, minimum: int) -> Plan | None:
    secagg = plan.run.secagg
    if not isinstance(secagg, Bonawitz):
        return None
    _check_cohort(plan, minimum)
    threat = Threat(
        corrupt=secagg.corrupt,
        dropout=plan.run.dropout,
        security_bits=secagg.bits(plan.clients),
        correctness_bits=secagg.correctness_bits,
    )
    return make_plan(
        plan.clients,
        dim,
        ring.bits,
        threat=threat,
        minimum_survivors=minimum,
        context=plan.digest(),
        authority=NOBODY if secagg.authority is None else bytes.fromhex(secagg.authority),
        roster=bytes.fromhex(plan.roster) if plan.roster else NOBODY,
    )


def _helper(plan: RoundPlan, dim: int, ring: Ring, minimum: int) -> HelperPlan | None:
    secagg = plan.run.secagg
    if not isinstance(secagg, SeedHelper):
        return None
    _check_cohort(plan, minimum)
    return HelperPlan(
        clients=plan.clients,
        minimum_survivors=minimum,
        ring_bits=ring.bits,
        dim=dim,
        context=plan.digest(),
        helper_key=NOBODY if secagg.public_key is None else bytes.fromhex(secagg.public_key),
    )


def _check_cohort(plan: RoundPlan, minimum: int) -> None:
    if plan.clients < 2 or minimum < 2:
        msg = (
            "a secure sum over fewer than 2 clients reveals its input: invite at least 2 and "
            f"lower plan.dropout, got {plan.clients} clients with dropout={plan.run.dropout}"
        )
        raise ConfigurationError(msg)
