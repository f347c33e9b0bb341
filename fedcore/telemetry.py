"""What a round measured, as values.

Code that runs a round returns these; whoever runs it decides what to print, store
or plot. Byte counts are lengths of what was really sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one round, summed over its clients.

    Attributes:
        up_payload: The encoded updates alone.
        up_total: All that clients sent: updates, keys, shares, metrics, names.
        down_payload: The model alone.
        down_total: All that clients received.
        uploads: How many clients sent an update.
        downloads: How often a client was sent the model, second tries included.
    """

    up_payload: int = 0
    up_total: int = 0
    down_payload: int = 0
    down_total: int = 0
    uploads: int = 0
    downloads: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Return the traffic of both."""
        return Traffic(
            self.up_payload + other.up_payload,
            self.up_total + other.up_total,
            self.down_payload + other.down_payload,
            self.down_total + other.down_total,
            self.uploads + other.uploads,
            self.downloads + other.downloads,
        )


@dataclass(frozen=True, slots=True)
class BufferReport:
    """What an asynchronous fleet did while a buffer filled.

    Attributes:
        staleness: Of each member of the buffer, in ascending order.
        running: Devices that train, when the buffer is over.
        waiting: Devices that have checked in, and are in no buffer yet.
        dropped: Updates that were given up since the last buffer: too stale, or too few others
            of their version.
    """

    staleness: tuple[int, ...] = ()
    running: int = 0
    waiting: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class RoundReport:
    """How one round of aggregation went.

    Attributes:
        round_number: 1-based.
        attempts: How often it was tried.
        invited: Clients asked in the last attempt.
        survivors: Clients in the mean; 0 if every attempt was aborted.
        lost: Clients that fell silent or broke the protocol, by stage, last attempt.
        aborted: Attempts that were given up, with the reason of each.
        traffic: Over all attempts.
        clipped: Updates that the clip changed; None if not known.
        metrics: The cohort's mean training metrics; empty under differential privacy.
        neighbours: Degree of the mask graph; 0 in the clear.
        threshold: Shares that reconstruct a secret; 0 in the clear.
        epsilon: Spent so far, this round included; infinite without noise.
        clip_norm: Bound on the norm of what a client sends; None without a clip.
        unclipped: Fraction of the updates that fitted it: exact without noise, an estimate
            with an adaptive clip under noise, None if not known.
        declined: Of the lost, those that said why they do not take part, by reason; nobody
            learns here which device it was.
        refusals: Of the lost, those whose program failed or refused the plan, by what it said.
        buffer: Of asynchronous training; None in a round.
        surplus: Clients that were not waited for, because enough had answered; not lost.
        late: Replies that came after their stage was over; dropped. All attempts.
        duplicates: Second replies to one message; dropped. All attempts.
        paused: Devices that were left out of the draw, because they had failed before.
    """

    round_number: int
    attempts: int
    invited: int
    survivors: int
    lost: Mapping[str, int]
    aborted: tuple[str, ...]
    traffic: Traffic
    clipped: int | None
    metrics: Mapping[str, float]
    neighbours: int
    threshold: int
    epsilon: float
    clip_norm: float | None = None
    unclipped: float | None = None
    declined: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)
    buffer: BufferReport | None = None
    surplus: int = 0
    late: int = 0
    duplicates: int = 0
    paused: int = 0


def skipped(round_number: int, invited: int, reason: str, epsilon: float) -> RoundReport:
    """Return the report of a round that was not held.

    Args:
        round_number: 1-based.
        invited: How many clients it would have had.
        reason: Why not.
        epsilon: Spent so far.
    """
    return RoundReport(
        round_number=round_number,
        attempts=0,
        invited=invited,
        survivors=0,
        lost={},
        aborted=(reason,),
        traffic=Traffic(),
        clipped=None,
        metrics={},
        neighbours=0,
        threshold=0,
        epsilon=epsilon,
    )
