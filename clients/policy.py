"""What a device demands before it takes part, whatever the coordinator says.

A coordinator writes the plan of a round; the device's owner writes this. A plan that is
weaker is refused before the device trains, and the refusal names the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.errors import PeerProtocolError
from fedcore.pipeline import Bonawitz, NoSecAgg, RoundPlan, SeedHelper
from fedcore.secagg.parameters import COMPLETE_UP_TO
from fedcore.secagg.plan import MOST_CLIENTS


@dataclass(frozen=True, slots=True)
class DevicePolicy:
    """What a device demands of every round, whatever the coordinator says.

    Attributes:
        minimum_cohort: Fewer invited clients are refused.
        most_clients: More invited clients are refused. None is 128 with a pinned
            authority, so that the mask graph is complete and a device checks everybody
            in it; without one, as many as the protocol can name.
        require_masks: Whether uploads in the clear are refused.
        minimum_noise_multiplier: Less noise in the sum is refused; 0 demands none.
        minimum_corrupt: Parameters that withstand a smaller colluding fraction are refused.
        authority: Public key of the root that enrolls devices, 64 hexadecimal digits; with
            it, rounds whose keys that root does not certify are refused.
        helper_key: Public key of the seed helper, 64 hexadecimal digits; without it, rounds
            with a helper are refused.
    """

    minimum_cohort: int = 2
    most_clients: int | None = None
    require_masks: bool = True
    minimum_noise_multiplier: float = 0.0
    minimum_corrupt: float = 0.0
    authority: str | None = None
    helper_key: str | None = None

    def check(self, plan: RoundPlan) -> None:
        """Refuse a plan that is weaker than this policy.

        Raises:
            PeerProtocolError: Names the rule, and both values.
        """
        secagg = plan.run.secagg
        most = self.most_clients
        if most is None:
            most = MOST_CLIENTS if self.authority is None else COMPLETE_UP_TO
        noise = getattr(plan.run.privacy, "noise_multiplier", 0.0)
        authority = getattr(secagg, "authority", None)
        for broken, rule in (
            (
                plan.clients < self.minimum_cohort,
                f"at least {self.minimum_cohort} invited clients, found {plan.clients}",
            ),
            (
                plan.clients > most,
                f"at most {most} invited clients, found {plan.clients}",
            ),
            (
                self.require_masks and isinstance(secagg, NoSecAgg),
                f"masked uploads, found secagg={secagg.kind}",
            ),
            (
                noise < self.minimum_noise_multiplier,
                f"a noise multiplier of at least {self.minimum_noise_multiplier}, found {noise}",
            ),
            (
                isinstance(secagg, Bonawitz) and secagg.corrupt < self.minimum_corrupt,
                f"a colluding fraction of at least {self.minimum_corrupt} to be withstood, "
                f"found {getattr(secagg, 'corrupt', 0.0)}",
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
