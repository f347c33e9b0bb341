"""Devices whose update the auditor writes, in a run that is otherwise the real one.

The only thing that differs is the train function: a Flower mod behind `secagg_mod`
answers in its place. What it returns is clipped, sparsified, rotated, quantised, given
its share of noise, masked and summed like any other update; messages, cohorts, drop-outs,
strategy and ledger are those of a training run.

    Canary     sends one random direction, long enough to be clipped to the full norm
    Silent     sends no change at all

A silent device still takes part: it is in the cohort and adds its share of noise. So
the fleet is the same whether a device is a canary or silent, and the two differ by
exactly what the ledger bounds: all that one device contributes to the sums.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from tqdm import tqdm

from experiments.training import simulated_devices
from fedcore.engine import run_in_process, to_arrays, to_record
from fedcore.errors import ConfigurationError
from fedcore.job import FedAvgM, Job, Preflight, assess
from fedcore.models import build
from fedcore.pipeline import ByExamples
from fedcore.privacy import PrivacyLedger
from fedcore.training import Evaluation, ExampleLevelPrivacy, get_arrays, one_thread
from fedcore.vectors import Layout
from strategies.progress import Progress, Resumed
from strategies.sampling import choose_cohort
from strategies.server_app import build_server_app
from strategies.surroundings import coordinator_entropy

Directions: TypeAlias = npt.NDArray[np.float32]
Published: TypeAlias = npt.NDArray[np.float32]
"""Shape [rounds + 1, dim]: the initial model, then the model after every round."""

STRENGTH = 100.0
"""A canary's length over the clip norm: what a sparsifier leaves of it is still clipped."""


@dataclass(frozen=True, slots=True)
class Canary:
    """Sends a random direction, uniform on the sphere, which follows from two numbers."""

    seed: int
    index: int

    def direction(self, dim: int) -> Directions:
        """Return the unit vector, shape [dim]."""
        drawn = np.random.default_rng([self.seed, 2, self.index]).standard_normal(dim, np.float32)
        unit: Directions = drawn / np.linalg.norm(drawn)
        return unit


@dataclass(frozen=True, slots=True)
class Silent:
    """Takes part and sends no change."""


Part: TypeAlias = Canary | Silent


@dataclass(frozen=True, slots=True)
class Fleet:
    """Who is in an audited run.

    Attributes:
        job: As the coordinator runs it: its `clients` are all devices, its seed is the run's.
        devices: As the devices know it: which data is whose follows from it.
        preflight: Of `job`.
        parts: Devices that do not train, by index.
    """

    job: Job
    devices: Job
    preflight: Preflight = field(repr=False)
    parts: Mapping[int, Part] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Trace:
    """Everything that a run published, and what the ledger says that it cost.

    Attributes:
        models: Of every round.
        arrays: The final model by name.
        ledger: Of the whole run.
        accuracy: Of the final model on the test examples.
        stopped: Why the run ended early; None if it did not.
    """

    models: Published = field(repr=False)
    arrays: Mapping[str, npt.NDArray[Any]] = field(repr=False)
    ledger: PrivacyLedger = field(repr=False)
    accuracy: float
    stopped: str | None


def planted_fleet(
    job: Job, preflight: Preflight, parts: Sequence[Part], *, every_round: bool
) -> Fleet:
    """Return the fleet of `job` with one more device for each of `parts`.

    Args:
        job: The run to audit.
        preflight: Of that run.
        parts: Of the devices that are added behind its own.
        every_round: Invite all devices to every round instead of a cohort of the run's size.

    Raises:
        ConfigurationError: The larger cohort does not fit the ring or the budget.
    """
    clients = job.clients + len(parts)
    larger = replace(
        job, clients=clients, clients_per_round=clients if every_round else job.clients_per_round
    )
    fewest = min(len(shard) for shard in preflight.shards)
    costs = assess(
        larger, parameters=preflight.parameters, fewest_examples=fewest, layers=preflight.layers
    )
    checked = replace(preflight, privacy=costs)
    return Fleet(checked.job, job, checked, {job.clients + i: part for i, part in enumerate(parts)})


def run_fleet(
    fleet: Fleet, *, signed: bool, workers: int = 0, title: str = "", quiet: bool = False
) -> Trace:
    """Run the fleet's job and keep what it publishes.

    Args:
        fleet: Who takes part.
        signed: Whether the devices are enrolled.
        workers: Processes that train devices; 0 trains them in this one.
        title: Of the progress bar.
        quiet: Show no progress bar.
    """
    one_thread()
    watcher = _Watcher(fleet, title, quiet=quiet)
    run_in_process(
        build_server_app(watcher, fleet.preflight, entropy=coordinator_entropy(fleet.job.seed)),
        simulated_devices(fleet.job, signed=signed, inner=[planted(fleet.devices, fleet.parts)]),
        num_nodes=fleet.job.clients,
        run_config={"job": fleet.job.to_json()},
        workers=workers,
    )
    return watcher.trace()


def planted(devices: Job, parts: Mapping[int, Part]) -> Mod:
    """Return the mod that answers training messages for the devices in `parts`.

    The others run the train function, on the job that `devices` describes.
    """
    described = devices.to_json()

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        context.run_config["job"] = described
        part = parts.get(int(context.node_config["partition-id"]))
        if part is None or not message.metadata.message_type.startswith("train"):
            return call_next(message, context)
        return _answer(message, part, devices)

    return mod


def _answer(message: Message, part: Part, job: Job) -> Message:
    """Return what a device of this part sends instead of a trained model."""
    arrays = to_arrays(message.content.array_records["arrays"])
    layout = Layout.of(arrays)
    model = layout.flatten(arrays)
    examples = 1
    if isinstance(job.weighting, ByExamples):
        examples = job.weighting.max_examples if isinstance(part, Canary) else 0
    if isinstance(part, Canary):
        norm = getattr(job.clip, "norm", 1.0)
        model = model + STRENGTH * norm * part.direction(layout.dim)
    # All devices of a round must name the same metrics; their values are not looked at.
    named = not isinstance(job.privacy, ExampleLevelPrivacy)
    metrics = {"train-loss": 0.0, "train-accuracy": 0.0} if named else {}
    content = RecordDict(
        {
            "arrays": to_record(layout.unflatten(model)),
            "metrics": MetricRecord({**metrics, "num-examples": examples}),
        }
    )
    return Message(content, reply_to=message)


def rounds_of(fleet: Fleet, index: int) -> list[int]:
    """Return the rounds, 1-based, whose cohort the device `index` was drawn into."""
    return [number for number in range(1, fleet.job.rounds + 1) if index in _cohort(fleet, number)]


def _cohort(fleet: Fleet, number: int) -> set[int]:
    labels = [str(index) for index in range(fleet.job.clients)]
    size = fleet.job.clients_per_round
    chosen = choose_cohort(labels, size, seed=fleet.job.seed, round_number=number)
    return {int(label) for label in chosen}


def increments(models: Published, job: Job) -> Published:
    """Return what each round added to the model, shape [rounds, dim].

    Momentum at the server mixes a round's mean with older ones by a formula that
    everybody knows, so the observer undoes it. For adaptive strategies this is the
    change of the model itself.
    """
    changes: Published = np.diff(models, axis=0)
    if isinstance(job.strategy, FedAvgM):
        before = np.vstack([np.zeros_like(changes[:1]), changes[:-1]])
        changes = changes - np.float32(job.strategy.server_momentum) * before
    return changes


class _Watcher:
    """Keeps the published models; shows a progress bar."""

    def __init__(self, fleet: Fleet, title: str, *, quiet: bool) -> None:
        job, dataset = fleet.job, fleet.preflight.dataset
        initial = get_arrays(build(job.model, dataset.input_shape, dataset.classes, job.seed))
        self._models = [Layout.of(initial).flatten(initial)]
        self._arrays: Mapping[str, npt.NDArray[Any]] = initial
        self._ledger = PrivacyLedger(delta=fleet.preflight.delta or 1e-5)
        self._accuracy = 0.0
        self._stopped: str | None = None
        self._bar = tqdm(
            total=job.rounds,
            desc=title,
            unit="round",
            disable=quiet,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def started(self, job: Job, preflight: Preflight, initial: Evaluation) -> None:
        """Take note of the untrained model's accuracy."""
        del job, preflight
        self._accuracy = initial.accuracy

    def resumed(self, run: Resumed) -> None:
        """Refuse: an attack needs the model of every round, and a checkpoint has the last."""
        del run
        msg = "an attack is not resumed: start it anew"
        raise ConfigurationError(msg)

    def round_finished(self, progress: Progress) -> None:
        """Keep the round's model."""
        self._arrays = progress.arrays
        self._models.append(Layout.of(progress.arrays).flatten(progress.arrays))
        self._ledger = progress.ledger
        if progress.evaluation is not None:
            self._accuracy = progress.evaluation.accuracy
        self._bar.update()

    def stopped(self, reason: str) -> None:
        """Remember why the run ended early."""
        self._stopped = reason

    def trace(self) -> Trace:
        """Return everything that was seen."""
        self._bar.close()
        return Trace(
            np.stack(self._models), self._arrays, self._ledger, self._accuracy, self._stopped
        )
