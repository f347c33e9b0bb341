"""One attempt of a secure round: what is sent, who takes part, and how it went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import RecordDict

from fedcore.errors import ConfigurationError, RoundAbortedError
from fedcore.pipeline import BoundRound, MeanUpdate, RoundPlan, bind_round
from fedcore.secagg import roster_digest
from fedcore.telemetry import RoundReport, Traffic
from fedcore.vectors import Layout
from strategies.downlink import ModelDownload
from strategies.seats import Seats
from strategies.secure_round import Invited
from strategies.stragglers import Dropped


@dataclass(frozen=True, slots=True)
class Sent:
    """What every client of a round is sent to train."""

    content: RecordDict
    kind: str
    download: ModelDownload | None
    layout: Layout


@dataclass(frozen=True, slots=True)
class Attempt:
    """How one attempt went: a mean, or why it was given up."""

    bound: BoundRound
    mean: MeanUpdate | None
    traffic: Traffic
    lost: Mapping[str, int]
    aborted: str
    declined: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    surplus: int = 0
    dropped: Dropped = field(default_factory=Dropped)

    def report(
        self,
        *,
        asked: int,
        aborted: tuple[str, ...],
        traffic: Traffic,
        dropped: Dropped,
        epsilon: float,
    ) -> RoundReport:
        """Return what is told of a round whose last attempt this was.

        Args:
            asked: How many devices were.
            aborted: Why attempts were given up, this one included.
            traffic: Of all attempts.
            dropped: Replies that nobody waited for.
            epsilon: Spent, with this round.
        """
        bound, mean = self.bound, self.mean
        return RoundReport(
            round_number=bound.plan.round_number,
            attempts=bound.plan.attempt,
            invited=asked,
            survivors=0 if mean is None else mean.survivors,
            lost=self.lost,
            declined=self.declined,
            refusals=self.refusals,
            aborted=aborted,
            traffic=traffic,
            clipped=None if mean is None else mean.clipped,
            metrics={} if mean is None else mean.metrics,
            neighbours=0 if bound.secagg is None else bound.secagg.neighbours,
            threshold=0 if bound.secagg is None else bound.secagg.threshold,
            epsilon=epsilon,
            clip_norm=bound.plan.norm,
            unclipped=None if mean is None else mean.unclipped,
            surplus=self.surplus,
            late=dropped.late,
            duplicates=dropped.duplicates,
        )


def bound_to(
    seats: Seats, bound: BoundRound, planned: Callable[[RoundPlan, Sequence[Invited]], RoundPlan]
) -> BoundRound:
    """Return the round for those who are seated: all, or nearly all, that were asked.

    Raises:
        RoundAbortedError: Too few, as if the others had dropped out.
    """
    found, plan = len(seats.clients), bound.plan
    if found < bound.minimum_survivors:
        needed = bound.minimum_survivors
        raise RoundAbortedError(stage="identifying", needed=needed, found=found)
    if not seats.identity_keys:
        return bound
    roster = roster_digest(seats.identity_keys).hex()
    try:
        return bind_round(planned(replace(plan, roster=roster, buffer=None), seats.clients))
    except ConfigurationError as error:  # the cohort that was asked would do, this one does not
        raise RoundAbortedError(
            stage="identifying", needed=plan.clients, found=found, reason=str(error)
        ) from error
