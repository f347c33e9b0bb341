"""Time to an accuracy on a fleet whose devices are not alike, in rounds and in buffers.

Digits on 100 devices with skewed labels; a task takes 60 s on the median device, and the
slowest are tens of times slower (`fedcore.engine.HeavyTailed`). Everything but time is real:
devices train, updates are clipped, rounded and added in a ring. Time is virtual, the same
for all rows, and counts only work and messages. Nothing is masked, which changes no bit.

    rounds      ten or thirty devices, nine tenths of which must answer within ten minutes
    deadline    the same, and as many as have answered after two minutes, but at least half
    buffered    ten updates, whoever is done; three or five times as many devices train
    alone       the same, and an update may be the only one of its version

An accuracy is reached with the first test at or above it. A row has the mean of the seconds
over its seeds, and "never" where one of them does not get there in its rounds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Final, TypeAlias

from experiments.training import simulated_devices
from fedcore.codec import Clip
from fedcore.engine import HeavyTailed, run_in_process
from fedcore.errors import ConfigurationError
from fedcore.job import Buffered, Job, Preflight, check
from fedcore.pipeline import NoSecAgg, Uniform
from fedcore.telemetry import RoundReport
from fedcore.training import Evaluation, LocalTraining, one_thread
from strategies.progress import Progress, Resumed
from strategies.server_app import build_server_app
from strategies.surroundings import coordinator_entropy

Row: TypeAlias = dict[str, str | int | float]
ACCURACIES: Final = (0.80, 0.85, 0.90, 0.93, 0.95)
SEEDS: Final = {"quick": (0,), "full": (0, 1, 2)}
JOB: Final = Job(
    name="buffered",
    clients=100,
    clients_per_round=10,
    training=LocalTraining(epochs=5, learning_rate=0.3),
    clip=Clip(1.0),
    weighting=Uniform(),
    secagg=NoSecAgg(),
    pace=HeavyTailed(),
)
DEADLINE: Final = replace(JOB, rounds=60, stage_seconds=120.0, dropout=0.5, attempts=1)
SCHEDULES: Final[Mapping[str, Job]] = {
    "rounds, 10 train": replace(JOB, rounds=60),
    "rounds, 30 train": replace(JOB, rounds=40, clients_per_round=30),
    "deadline, 10 train": DEADLINE,
    "deadline, 30 train": replace(DEADLINE, rounds=40, clients_per_round=30),
    "buffered, 30 train": replace(JOB, rounds=120, schedule=Buffered(concurrency=30)),
    "buffered, 50 train": replace(JOB, rounds=120, schedule=Buffered(concurrency=50)),
    "alone, 30 train": replace(JOB, rounds=120, schedule=Buffered(concurrency=30, same_model=1)),
}


@dataclass(slots=True)
class Course:
    """An observer that notes when the model was how good."""

    points: list[tuple[float, float]] = field(default_factory=list)
    reports: list[RoundReport] = field(default_factory=list)

    def started(self, job: Job, preflight: Preflight, initial: Evaluation) -> None:
        """Take note of nothing."""

    def resumed(self, run: Resumed) -> None:
        """Take note of nothing: these runs are not stopped."""

    def round_finished(self, progress: Progress) -> None:
        """Take note of a round."""
        self.reports.append(progress.report)
        if progress.evaluation is not None:
            self.points.append((progress.seconds, progress.evaluation.accuracy))

    def stopped(self, reason: str) -> None:
        """Refuse a run that is not whole."""
        raise ConfigurationError(reason)

    def reached(self, accuracy: float) -> float | None:
        """Return after how many seconds a test was as good; None for never."""
        return next((seconds for seconds, found in self.points if found >= accuracy), None)


def measure_buffered(size: str = "quick") -> list[Row]:
    """Return one row for each schedule.

    Args:
        size: quick for one seed, full for three.

    Raises:
        ConfigurationError: `size` is neither, or a run stopped early.
    """
    if size not in SEEDS:
        msg = f"size must be quick or full, got {size!r}"
        raise ConfigurationError(msg)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    one_thread()
    return [
        summed_up(name, [run(replace(job, seed=seed)) for seed in SEEDS[size]])
        for name, job in SCHEDULES.items()
    ]


def run(job: Job) -> Course:
    """Run a job to its end."""
    course, preflight = Course(), check(job)
    run_in_process(
        build_server_app(course, preflight, entropy=coordinator_entropy(job.seed)),
        simulated_devices(job, signed=False),
        num_nodes=job.clients,
        run_config={"job": preflight.job.to_json()},
    )
    return course


def summed_up(name: str, courses: Sequence[Course]) -> Row:
    """Return the row of a schedule from its runs, one for each seed."""
    reports = [report for course in courses for report in course.reports]
    buffers = [report.buffer for report in reports if report.buffer is not None]
    ages = [age for buffer in buffers for age in buffer.staleness] or [0]
    return {
        "schedule": name,
        "seeds": len(courses),
        **{
            column(accuracy): _mean([course.reached(accuracy) for course in courses])
            for accuracy in ACCURACIES
        },
        "trained": sum(report.traffic.downloads for report in reports),
        "added": sum(report.survivors for report in reports),
        "staleness": round(mean(ages), 2),
        "most": max(ages),
    }


def column(accuracy: float) -> str:
    """Return the key under which a row has the seconds to an accuracy.

    Example:
        >>> column(0.93)
        's to 93 %'
    """
    return f"s to {accuracy:.0%}".replace("%", " %")


def draw_buffered(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return the picture of accuracy over the fleet's time."""
    from experiments.plots_buffered import accuracy_over_time  # noqa: PLC0415 - matplotlib

    courses = {}
    for row in rows:
        times = [(row[column(accuracy)], accuracy) for accuracy in ACCURACIES]
        courses[str(row["schedule"])] = [
            (float(seconds), accuracy) for seconds, accuracy in times if isinstance(seconds, int)
        ]
    return accuracy_over_time(courses)


def _mean(seconds: Sequence[float | None]) -> int | str:
    known = [found for found in seconds if found is not None]
    return round(mean(known)) if len(known) == len(seconds) else "never"
