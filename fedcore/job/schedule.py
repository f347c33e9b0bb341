"""When updates are added up: in rounds, or whenever enough devices have checked in.

A round waits for the devices that it has invited. In a buffered run [NMZ+22] devices train
whenever they can, from the model that is the latest then, and check in; as soon as
`clients_per_round` of them wait, their updates are one buffer: one secure sum, one step of
the strategy, one entry in the ledger. `fedcore.pipeline.buffer` has the law of the weights.

[NMZ+22] https://arxiv.org/abs/2106.06639
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from fedcore.errors import ConfigurationError
from fedcore.job.backoff import NoBackOff
from fedcore.job.sampling import FixedSize
from fedcore.models import NoPruning
from fedcore.pipeline.buffer import MOST_VERSIONS, check_buffered, check_exponent

if TYPE_CHECKING:  # settings.py checks a job; here it is only read
    from fedcore.job.settings import Job

_MOST_SAME_MODEL: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Rounds:
    """Everybody who is invited trains from the same model, and is waited for."""

    kind: Literal["rounds"] = "rounds"


@dataclass(frozen=True, slots=True)
class Buffered:
    """Devices train at their own pace; every `clients_per_round` updates are one buffer.

    Attributes:
        concurrency: How many devices train at a time.
        max_staleness: Updates from a model that is more versions old are dropped.
        exponent: Of the weight of an update, (1 + staleness)^-exponent.
        same_model: Of each version in a buffer there are at least so many updates, whoever
            drops out: what protects devices from a coordinator that hands out models to read
            one update out of the sum. 1 demands nothing.
    """

    kind: Literal["buffered"] = "buffered"
    concurrency: int = 20
    max_staleness: int = 10
    exponent: float = 0.5
    same_model: int = 2

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("concurrency", self.concurrency, 1, 1 << 20),
            ("max_staleness", self.max_staleness, 0, MOST_VERSIONS - 1),
            ("same_model", self.same_model, 1, _MOST_SAME_MODEL),
        ):
            if not low <= value <= high:
                msg = f"schedule.{name} must be in {low}..{high}, got {value}"
                raise ConfigurationError(msg)
        check_exponent("schedule.exponent", self.exponent)

    def fewest(self, dropped: int) -> int:
        """Return how many updates of a version a buffer takes at least.

        Args:
            dropped: How many members of a buffer may be lost.
        """
        return 1 if self.same_model == 1 else self.same_model + dropped


ScheduleConfig: TypeAlias = Rounds | Buffered


def check_schedule(job: Job) -> None:
    """Refuse what has no meaning without rounds.

    Raises:
        ConfigurationError: Names the key, and what to choose.
    """
    schedule, plan = job.schedule, job.plan
    if isinstance(schedule, Rounds):
        return
    if plan is None:
        msg = (
            "schedule=buffered adds up what a plan describes, and quantize=none sends plain "
            "float32 without one: choose a quantizer (secagg=none leaves it in the clear)"
        )
        raise ConfigurationError(msg)
    check_buffered(plan)
    size = job.clients_per_round
    fewest = schedule.fewest(size - plan.minimum_survivors(size))
    for broken, why in (
        (
            not isinstance(job.sampling, FixedSize),
            "who is in a buffer is left to the devices, and nothing is drawn: choose "
            f"sampling=fixed, got sampling={job.sampling.kind}",
        ),
        (
            isinstance(job.sampling, FixedSize) and job.sampling.over_selection > 1,
            "a buffer is closed when it is full, and invites nobody beyond: choose "
            "sampling.over_selection=1",
        ),
        (
            not isinstance(job.backoff, NoBackOff),
            "nobody is drawn, so nobody can be left out of the draw: choose backoff=none",
        ),
        (
            not isinstance(job.pruning, NoPruning),
            "updates of the model before pruning do not fit the one after it: choose pruning=none",
        ),
        (
            schedule.concurrency > job.clients,
            f"schedule.concurrency must be at most clients={job.clients}, got "
            f"{schedule.concurrency}: lower it, or raise clients",
        ),
        (
            fewest > size,
            f"a buffer of clients_per_round={size} must hold {fewest} updates of each version "
            "(same_model, and those that may drop out): raise clients_per_round, or lower "
            "schedule.same_model or dropout",
        ),
    ):
        if broken:
            msg = f"schedule=buffered: {why}"
            raise ConfigurationError(msg)
