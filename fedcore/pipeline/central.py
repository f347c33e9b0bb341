"""Noise that the coordinator adds to a sum before anybody else sees it.

The secure sum arrives as S mod 2^b, the sum S of integer vectors of bounded norm. What
is decoded, and only then published, is

    lift( (S + noise) mod 2^b ).

The noise is integer, so nothing here is a floating-point number whose low bits could
tell what it was added to [Mir12]; and since it is reduced together with the sum, the
result is a function of S + noise, whose privacy is that of the integer mechanism.

Noise added to the *lifted* sum would not do. The ring has room for the sum's standard
deviation, not for its largest value, so a single device can decide whether a coordinate
wraps around: its sensitivity would be 2^b, not the bound on the norm.

[Mir12] Mironov, On significance of the least significant bits for differential
        privacy, CCS 2012.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from fedcore.crypto import Entropy
from fedcore.errors import LocalProtocolError
from fedcore.pipeline.bound import BoundRound
from fedcore.privacy import CentralGaussian, discrete_gaussian_table, sample
from fedcore.privacy.samplers import SEED_BYTES
from fedcore.vectors import IntegerVector, RingVector


class CoordinatorNoise(Protocol):
    """Where the coordinator's noise comes from."""

    def draw(self, bound: BoundRound, /) -> IntegerVector:
        """Return the noise of one round, shape [bound.update_dim]; asked for once."""
        ...


@dataclass(frozen=True, slots=True)
class FreshNoise:
    """Discrete Gaussian noise, independent from round to round.

    Attributes:
        entropy: The operating system's; replayed in simulations.
    """

    entropy: Entropy = field(repr=False)

    def draw(self, bound: BoundRound, /) -> IntegerVector:
        """Return the noise of one attempt, at its calibrated standard deviation.

        Raises:
            LocalProtocolError: The round wants another noise, or is not calibrated.
        """
        plan = bound.plan
        if bound.calibration is None or not isinstance(plan.run.privacy, CentralGaussian):
            msg = (
                "fresh noise is for calibrated rounds of privacy=central_gaussian, "
                f"found privacy={plan.run.privacy.kind}"
            )
            raise LocalProtocolError(msg)
        source = self.entropy.child(f"round={plan.round_number}/attempt={plan.attempt}")
        table = discrete_gaussian_table(bound.calibration.sigma_local)
        return sample(table, source.draw("noise", SEED_BYTES), bound.update_dim)


def add_noise(bound: BoundRound, update: RingVector, noise: CoordinatorNoise | None) -> RingVector:
    """Return the revealed sum of the updates with the coordinator's noise, still in the ring.

    Args:
        bound: The round.
        update: Sum of the encoded updates, shape [bound.update_dim].
        noise: Draws the round's noise.

    Raises:
        LocalProtocolError: There is none: the sum must not be published.
    """
    if noise is None:
        msg = (
            f"privacy={bound.plan.run.privacy.kind} publishes a sum with the coordinator's noise "
            "only, but nothing draws it: hand decode_sum a source of noise"
        )
        raise LocalProtocolError(msg)
    return bound.ring.reduce(update + bound.ring.reduce(noise.draw(bound)))
