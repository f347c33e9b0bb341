"""Whole runs of small jobs on scikit-learn's digits."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from clients import DevicePolicy
from clients.client_app import build_client_app, replayed_entropy
from clients.simulated import simulated_identities, simulated_root
from fedcore.data import Iid
from fedcore.engine import run_in_process
from fedcore.job import Job, NoClip, NoQuantize, Preflight, check
from fedcore.models import Logistic
from fedcore.pipeline import Bonawitz, NoSecAgg
from fedcore.training import Evaluation, LocalTraining
from strategies.checkpoints import CheckpointFolder
from strategies.progress import Progress, Resumed
from strategies.server_app import build_server_app
from strategies.surroundings import coordinator_entropy

JOB = Job(
    model=Logistic(),
    partition=Iid(),
    clients=8,
    clients_per_round=6,
    rounds=3,
    training=LocalTraining(epochs=2, batch_size=20, learning_rate=0.3),
    dropout=0.2,
)
PLAIN = {"clip": NoClip(), "quantize": NoQuantize(), "secagg": NoSecAgg()}
CLEAR = {"secagg": NoSecAgg()}
SIGNED = {"secagg": Bonawitz(authority=simulated_root(0).public.raw.hex())}
OPEN = DevicePolicy(minimum_cohort=1, require_masks=False)


@dataclass
class Recorder:
    """An observer that keeps all that it is told."""

    progress: list[Progress] = field(default_factory=list)
    initial: Evaluation | None = None
    reasons: list[str] = field(default_factory=list)
    earlier: Resumed | None = None

    def started(self, job: Job, preflight: Preflight, initial: Evaluation) -> None:
        self.initial = initial

    def resumed(self, run: Resumed) -> None:
        self.earlier = run

    def round_finished(self, progress: Progress) -> None:
        self.progress.append(progress)

    def stopped(self, reason: str) -> None:
        self.reasons.append(reason)

    @property
    def last(self) -> Progress:
        return self.progress[-1]

    @property
    def reports(self) -> list[Any]:
        return [progress.report for progress in self.progress]

    @property
    def model(self) -> bytes:
        """All weights after the last round."""
        return model_bytes(self.last.arrays)

    @property
    def accuracy(self) -> float:
        evaluation = self.last.evaluation
        assert evaluation is not None
        return evaluation.accuracy


def model_bytes(arrays: Any) -> bytes:
    """A model's names and values."""
    return b"".join(name.encode() + np.asarray(array).tobytes() for name, array in arrays.items())


def run_job(
    *,
    seed: int = 0,
    workers: int = 0,
    nodes: int | None = None,
    recorder: Recorder | None = None,
    checkpoints: CheckpointFolder | None = None,
    **changes: Any,
) -> Recorder:
    """Run `JOB` with `changes`, every device enrolled and with replayed entropy."""
    job = replace(JOB, seed=seed, **changes)
    recorder = recorder or Recorder()
    run_in_process(
        build_server_app(
            recorder, check(job), entropy=coordinator_entropy(seed), checkpoints=checkpoints
        ),
        build_client_app(OPEN, entropy=replayed_entropy(seed), identity=simulated_identities(seed)),
        num_nodes=nodes or job.clients,
        run_config={"job": job.to_json()},
        workers=workers,
    )
    return recorder
