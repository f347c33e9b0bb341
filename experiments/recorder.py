"""What a training run leaves on disk while it goes, and shows on the screen.

A line of `metrics.jsonl` and a new `ledger.json` after every round, so that a run that
is interrupted leaves everything it finished readable; `summary.json` at the end.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path
from typing import IO, Any

import numpy.typing as npt
from tqdm import tqdm

from experiments.staleness import buffer_words, run_words
from experiments.sweep import NOT_BEGUN
from experiments.wire import round_bytes, run_bytes
from fedcore.job import Job, Preflight
from fedcore.models import Structured
from fedcore.pipeline import NoSecAgg
from fedcore.pipeline.decline import add_reasons
from fedcore.privacy import PrivacyLedger
from fedcore.release import Measured
from fedcore.telemetry import RoundReport, Traffic
from fedcore.training import Evaluation
from strategies.progress import Past, Progress, Resumed
from strategies.refusals import add_refusals


class Recorder:
    """Observes a run: writes its files and shows its progress.

    Args:
        folder: Of the run; exists.
        quiet: Show no progress bar.

    Attributes:
        arrays: The latest global model; None before the first round.
        unpruned: The latest one before pruning; None without it, or if it came first.
    """

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        self.arrays: Mapping[str, npt.NDArray[Any]] | None = None
        self.unpruned: Mapping[str, npt.NDArray[Any]] | None = None
        self._folder = folder
        self._quiet = quiet
        self._lines: IO[str] | None = None
        self._bar: tqdm[Any] | None = None
        self._job: Job | None = None
        self._preflight: Preflight | None = None
        self._initial: Evaluation | None = None
        self._reports: list[RoundReport] = []
        self._evaluation: Evaluation | None = None
        self._example_epsilon: float | None = None
        self._stopped: str | None = None
        self._sampler_delta = 0.0
        self._seconds = 0.0

    @property
    def began(self) -> bool:
        """Whether the run began, so that there is something to summarise."""
        return self._job is not None

    def started(self, job: Job, preflight: Preflight, initial: Evaluation) -> None:
        """Open the files and the progress bar."""
        self._job, self._preflight, self._initial = job, preflight, initial
        self._lines = (self._folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._bar = tqdm(
            total=job.rounds,
            desc=job.name,
            unit="round",
            disable=self._quiet,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def resumed(self, run: Resumed) -> None:
        """Write the lines of the earlier rounds again, and their ledger."""
        self.arrays, self.unpruned = run.arrays, run.unpruned
        for past in run.past:
            self._tell(past)
        self._keep(run.ledger, run.examples)

    def round_finished(self, progress: Progress) -> None:
        """Write the round's line and the ledger; advance the bar."""
        self.arrays = progress.arrays
        if self._before_pruning(progress.report.round_number):
            self.unpruned = progress.arrays
        self._tell(progress.past)
        self._keep(progress.ledger, progress.examples)

    def _tell(self, past: Past) -> None:
        self._reports.append(past.report)
        self._evaluation = past.evaluation or self._evaluation
        self._example_epsilon = past.epsilon_example
        self._seconds = past.seconds
        if self._lines is not None:
            self._lines.write(json.dumps(self._line(past), allow_nan=False) + "\n")
            self._lines.flush()
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(past.report))
            self._bar.update()

    def _keep(self, ledger: PrivacyLedger, examples: PrivacyLedger | None) -> None:
        self._sampler_delta = ledger.sampler_delta
        _replace(self._folder / "ledger.json", ledger.to_json())
        if examples is not None:  # another unit: the two do not add up
            _replace(self._folder / "ledger_example.json", examples.to_json())

    def stopped(self, reason: str) -> None:
        """Remember why the run ended early."""
        self._stopped = reason

    def close(self, release: Mapping[str, object] | None = None) -> dict[str, object]:
        """Write and return the summary.

        Args:
            release: What became of the final model; None for nothing.
        """
        if self._bar is not None:
            self._bar.close()
        if self._lines is not None:
            self._lines.close()
        summary = self._summary(release)
        text = json.dumps(summary, indent=2, allow_nan=False)
        _replace(self._folder / "summary.json", text + "\n")
        return summary

    def _line(self, past: Past) -> dict[str, object]:
        report, evaluation = past.report, past.evaluation
        return {
            "round": report.round_number,
            "accuracy": None if evaluation is None else evaluation.accuracy,
            "loss": None if evaluation is None else _number(evaluation.loss),
            "train_accuracy": report.metrics.get("train-accuracy"),
            "train_loss": report.metrics.get("train-loss"),
            "invited": report.invited,
            "survivors": report.survivors,
            "lost": dict(report.lost),
            "declined": dict(report.declined),
            "refusals": dict(report.refusals),
            "buffer": buffer_words(report.buffer),
            "surplus": report.surplus,
            "late": report.late,
            "duplicates": report.duplicates,
            "paused": report.paused,
            "attempts": report.attempts,
            "aborted": list(report.aborted),
            "clipped": report.clipped,
            "clip_norm": report.clip_norm,
            "unclipped": report.unclipped,
            **round_bytes(report.traffic),
            "epsilon": finite(report.epsilon),
            "epsilon_example": None
            if past.epsilon_example is None
            else finite(past.epsilon_example),
            "seconds": round(past.seconds, 3),
        }

    def _postfix(self, report: RoundReport) -> str:
        accuracy = "" if self._evaluation is None else f"acc {self._evaluation.accuracy:.3f}, "
        up = report.traffic.up_total / max(1, report.traffic.uploads)
        return f"{accuracy}up {up / 1024:.1f} KiB/client, epsilon {report.epsilon:.3g}"

    def _summary(self, release: Mapping[str, object] | None) -> dict[str, object]:
        job, preflight = self._job, self._preflight
        if job is None or preflight is None or self._initial is None:
            return {"completed_rounds": 0, "stopped": self._stopped or NOT_BEGUN}
        evaluation = self._evaluation or self._initial
        seconds = self._seconds
        traffic = sum((report.traffic for report in self._reports), Traffic())
        spent = self._reports[-1].epsilon if self._reports else 0.0
        declined: dict[str, int] = {}
        refusals: dict[str, int] = {}
        for report in self._reports:
            declined = add_reasons(declined, report.declined)
            refusals = add_refusals(refusals, report.refusals)
        return {
            "experiment": job.name,
            "seed": job.seed,
            "rounds": job.rounds,
            "completed_rounds": len(self._reports),
            "stopped": self._stopped,
            "clients": job.clients,
            "clients_per_round": job.clients_per_round,
            "parameters": preflight.parameters,
            "initial_accuracy": self._initial.accuracy,
            "accuracy": evaluation.accuracy,
            "loss": _number(evaluation.loss),
            **self._bytes(preflight),
            "secagg": self._secagg(job),
            "declined": declined,
            "refusals": refusals,
            "buffer": run_words([r.buffer for r in self._reports if r.buffer is not None]),
            "surplus": sum(report.surplus for report in self._reports),
            "late": sum(report.late for report in self._reports),
            "duplicates": sum(report.duplicates for report in self._reports),
            "epsilon": finite(spent),
            "delta": preflight.delta,
            **self._privacy(preflight, spent),
            "sampler_delta": self._sampler_delta,
            "seconds_total": round(seconds, 3),
            "clients_per_second": round(traffic.uploads / seconds, 2) if seconds else 0.0,
            "peak_memory_mb": round(_peak_memory_mb(), 1),
            "release": None if release is None else dict(release),
        }

    def _privacy(self, preflight: Preflight, spent: float) -> dict[str, object]:
        """Return targets, the noise found for them, and what an example paid."""
        device, example = preflight.privacy.device, preflight.privacy.example
        main = device or example
        example_spent = spent if device is None else self._example_epsilon or 0.0
        return {
            "unit": None if main is None else main.unit,
            "epsilon_target": None if main is None else main.target,
            "noise_multiplier": None if main is None else main.noise_multiplier,
            "noise_inflation": None if device is None else device.inflation,
            "epsilon_example": None if example is None else finite(example_spent),
            "delta_example": None if example is None else example.delta,
            "epsilon_target_example": None if example is None else example.target,
            "noise_multiplier_example": None if example is None else example.noise_multiplier,
            "warnings": list(preflight.privacy.warnings),
        }

    def _before_pruning(self, round_number: int) -> bool:
        pruning = None if self._job is None else self._job.pruning
        return isinstance(pruning, Structured) and round_number <= pruning.after_round

    def _bytes(self, preflight: Preflight) -> dict[str, object]:
        """Return what was sent: for each weight that was there, and against the first model."""
        up = down = 0
        for report in self._reports:
            size = preflight.sizes[0 if self._before_pruning(report.round_number) else -1]
            up += size * report.traffic.uploads
            down += size * report.traffic.downloads
        total = sum((report.traffic for report in self._reports), Traffic())
        return run_bytes(total, preflight.parameters, up=up, down=down)

    def _secagg(self, job: Job) -> dict[str, object] | None:
        if job.plan is None or isinstance(job.secagg, NoSecAgg):
            return None
        return {
            "protocol": job.secagg.kind,
            "neighbours": max((report.neighbours for report in self._reports), default=0),
            "threshold": max((report.threshold for report in self._reports), default=0),
            "dropped_clients": sum(sum(report.lost.values()) for report in self._reports),
            "aborted_rounds": sum(report.survivors == 0 for report in self._reports),
        }


@dataclass(frozen=True, slots=True)
class ReleaseSummary:
    """What `summary.json` says about the released model, and those that it came from."""

    path: str
    version: int
    parameters: int
    macs: int
    onnx_bytes: int
    float_bytes: int
    agreement: float
    float_accuracy: float
    int8_accuracy: float
    device_latency_ms: float
    device_peak_memory_mb: float
    unpruned: Measured | None
    teacher: Measured | None

    def to_dict(self) -> dict[str, object]:
        """Return the fields by name."""
        return asdict(self)


def finite(value: float) -> float | str:
    """Return `value`, or "inf", which JSON has no number for."""
    return value if value < inf else "inf"


def _number(value: float) -> float | None:
    """Return `value`, or None for the loss of a model that diverged: JSON has no NaN."""
    return value if isfinite(value) else None


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all: an interrupt leaves the old one."""
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _peak_memory_mb() -> float:
    """Return the largest resident size of this process, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
