"""How often a device takes part in a run, and how many rounds apart.

Correlated noise hides a device that contributes at most `participations` times, never
twice within `min_separation` rounds; `fedcore.privacy.matrix` says why. The coordinator
chooses its cohorts accordingly, and every device counts for itself: whatever it answered
is a participation, also if the round was aborted, since it cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.errors import PeerProtocolError
from fedcore.pipeline import RoundPlan
from fedcore.privacy import MatrixGaussian


@dataclass(frozen=True, slots=True)
class Spacing:
    """What the noise of a run demands of each device.

    Attributes:
        separation: Rounds from one participation to the next, at least.
        participations: In the whole run, at most.
    """

    separation: int
    participations: int

    def check(self, round_number: int, *, last: int, taken: int) -> None:
        """Refuse a round that comes too early, or is one too many.

        Args:
            round_number: That the device is asked to take part in.
            last: That it took part in last; the same for another attempt.
            taken: How many it took part in.

        Raises:
            PeerProtocolError: It must not take part.
        """
        if round_number == last:
            return
        if round_number - last < self.separation:
            msg = (
                f"this device took part in round {last} and sits out until round "
                f"{last + self.separation}, asked for round {round_number}: the noise of the run "
                "hides no more"
            )
            raise PeerProtocolError(msg)
        if taken >= self.participations:
            msg = (
                f"this device took part in {taken} rounds of the run, as many as its noise hides, "
                f"asked for round {round_number}"
            )
            raise PeerProtocolError(msg)


def spacing_of(plan: RoundPlan) -> Spacing | None:
    """Return what a plan's noise demands; None if it demands nothing."""
    privacy = plan.run.privacy
    if not isinstance(privacy, MatrixGaussian):
        return None
    return Spacing(privacy.min_separation, privacy.participations)
