"""What a device demands before it takes part, whatever the coordinator says.

A coordinator writes the plan of a round; the device's owner writes this. A plan that is
weaker is refused before the device trains, and the refusal names the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.errors import PeerProtocolError
from fedcore.pipeline import Bonawitz, ByClass, NoSecAgg, RoundPlan, SeedHelper
from fedcore.privacy import Distributed, stated_noise
from fedcore.secagg.parameters import GRINDING_BITS, SECURITY_BITS
from fedcore.secagg.plan import MOST_CLIENTS


@dataclass(frozen=True, slots=True)
class DevicePolicy:
    """What a device demands of every round, whatever the coordinator says.

    Attributes:
        minimum_cohort: Fewer invited clients are refused.
        most_clients: More invited clients are refused. At most 128 all share secrets with
            all, and a device checks everybody's certificate; beyond, its neighbours' only.
        sparse_security_bits: Authenticated rounds of more than 128 are refused if a draw of
            their graph may fail more often than 2^-this: a coordinator may draw often.
        most_dropout: Plans that let a larger fraction disappear are refused.
        require_masks: Whether uploads in the clear are refused.
        minimum_noise_multiplier: Less noise in the sum is refused; 0 demands none. Noise that
            the coordinator adds does not count: it has seen the sum without.
        largest_clip: A larger bound on the norm of the update is refused, also where the
            bound adapts from round to round; None allows any.
        minimum_corrupt: Parameters that withstand a smaller colluding fraction are refused.
        authority: Public key of the root that enrolls devices, 64 hexadecimal digits; with
            it, rounds whose keys that root does not certify are refused.
        minimum_same_model: Buffers are refused in which fewer members trained the model of any
            one of them, that one included, whoever drops out; 1 demands nothing. See
            `fedcore.pipeline.buffer`.
        allow_parts: Whether plans in which some devices train a part of the model are accepted;
            it is the coordinator's word that no weight is trained by one device alone.
        least_trainers: Plans that reveal a coordinate's sum over fewer devices are refused.
        helper_key: Public key of the seed helper, 64 hexadecimal digits; without it, rounds
            with a helper are refused.
    """

    minimum_cohort: int = 2
    most_clients: int = MOST_CLIENTS
    sparse_security_bits: int = SECURITY_BITS + GRINDING_BITS
    most_dropout: float = 0.5
    require_masks: bool = True
    minimum_noise_multiplier: float = 0.0
    largest_clip: float | None = None
    minimum_corrupt: float = 0.0
    authority: str | None = None
    minimum_same_model: int = 2
    allow_parts: bool = True
    least_trainers: int = 2
    helper_key: str | None = None

    def check(self, plan: RoundPlan) -> None:
        """Refuse a plan that is weaker than this policy.

        Raises:
            PeerProtocolError: Names the rule, and both values.
        """
        secagg = plan.run.secagg
        bits = secagg.bits(plan.clients) if isinstance(secagg, Bonawitz) else 0
        privacy, shares = plan.run.privacy, plan.run.shares
        noise = stated_noise(privacy) if isinstance(privacy, Distributed) else 0.0
        authority = getattr(secagg, "authority", None)
        dropped = plan.clients - plan.run.minimum_survivors(plan.clients)
        alike = plan.clients if plan.buffer is None else plan.buffer.alike(dropped)
        for broken, rule in (
            (
                plan.clients < self.minimum_cohort,
                f"at least {self.minimum_cohort} invited clients, found {plan.clients}",
            ),
            (
                plan.clients > self.most_clients,
                f"at most {self.most_clients} invited clients, found {plan.clients}",
            ),
            (
                plan.run.dropout > self.most_dropout,
                f"at most a fraction of {self.most_dropout} to disappear, found {plan.run.dropout}",
            ),
            (
                isinstance(secagg, Bonawitz)
                and secagg.must_pay_for_draws(plan.clients)
                and bits < self.sparse_security_bits,
                f"{self.sparse_security_bits} bits for a sparse graph that the coordinator may "
                f"draw again, found {bits}",
            ),
            (
                alike < self.minimum_same_model and not isinstance(secagg, NoSecAgg),
                f"at least {self.minimum_same_model} members of a buffer with the same model, "
                f"whoever drops out, found {alike}",
            ),
            (
                self.require_masks and isinstance(secagg, NoSecAgg),
                f"masked uploads, found secagg={secagg.kind}",
            ),
            (
                noise < self.minimum_noise_multiplier,
                f"a noise multiplier of at least {self.minimum_noise_multiplier}, found {noise} "
                f"on the devices (privacy={privacy.kind})",
            ),
            (
                self.largest_clip is not None and plan.norm > self.largest_clip,
                f"a clip of at most {self.largest_clip}, found {plan.norm:g}",
            ),
            (
                isinstance(secagg, Bonawitz) and secagg.corrupt < self.minimum_corrupt,
                f"a colluding fraction of at least {self.minimum_corrupt} to be withstood, "
                f"found {getattr(secagg, 'corrupt', 0.0)}",
            ),
            (
                isinstance(shares, ByClass) and shares.narrow and not self.allow_parts,
                "that all devices train the whole model, found classes that train parts",
            ),
            (
                isinstance(shares, ByClass) and shares.least_trainers < self.least_trainers,
                f"at least {self.least_trainers} devices that train each coordinate, found "
                f"{getattr(shares, 'least_trainers', 0)}",
            ),
            (
                self.authority is not None and authority != self.authority,
                f"keys certified by the pinned authority, found {authority!s:.16}",
            ),
            (
                isinstance(secagg, SeedHelper)
                and (self.helper_key is None or secagg.public_key != self.helper_key),
                "the seed helper that it pins, found another or pins none",
            ),
        ):
            if broken:
                msg = f"this device's policy demands {rule}; it does not take part"
                raise PeerProtocolError(msg)
