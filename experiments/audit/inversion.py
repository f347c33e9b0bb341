"""What do the bytes that a coordinator holds say about the images on a device?

One round of the real pipeline, in several ways, from the same model and the same images:

    one update      secagg=none and no noise: the upload of one device, decoded
    sum of n        the secure sum of the cohort as SecureGrid returns it, without noise
    one with noise  secagg=none: the upload of one device with its own share of noise
    noisy sum       the same with the run's noise: what is really revealed
    nothing         noise in the place of an update: what the attacks draw from no
                    information at all, matched in the same way

The uploads are taken off the wire, where a grid under `SecureGrid` sees every reply; the
sum is the reply that `SecureGrid` gives to a strategy. Each is decoded to an update and
given to the attacks of `reconstruct`. Views with noise exist if the run has noise. Only
what a view shows beyond "nothing" was leaked: the best of many candidates always bears
some likeness.

Attacks that read images need few examples for each device. `examples` sets how many a
device of this suite holds, dealt evenly: with 1, every update is one image's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import nn
from tqdm import tqdm

from experiments.audit.reconstruct import Recovered, analytic, best_matches, by_gradient
from experiments.audit.settings import InversionSettings
from experiments.training import simulated_devices
from fedcore.data import Dataset, Iid, Inputs, partition
from fedcore.engine import InProcessGrid, WrappedGrid, to_arrays, to_record
from fedcore.errors import ConfigurationError
from fedcore.job import Job, NoFaults, Preflight
from fedcore.models import build
from fedcore.pipeline import (
    RECORD,
    VECTOR,
    NoSecAgg,
    RoundPlan,
    RunPlan,
    bind_first,
    bind_round,
    layers_of,
    model_digest,
)
from fedcore.privacy import NoPrivacy
from fedcore.ring import unpack
from fedcore.training import get_arrays, one_thread
from fedcore.vectors import Layout, RealVector
from strategies.secure_grid import SecureGrid
from strategies.surroundings import connect_helper

SHOWN = 8
"""Originals that are attacked and drawn, at most."""


@dataclass(frozen=True, slots=True)
class View:
    """What one observer can recover.

    Attributes:
        name: Of what is observed.
        devices: Whose updates are in it.
        recovered: The best match for every original.
    """

    name: str
    devices: int
    recovered: Recovered


@dataclass(frozen=True, slots=True)
class InversionAudit:
    """The suite's result.

    Attributes:
        originals: Training images of the first devices, shape [shown, channels, height, width].
        noise_multiplier: Of the noisy sum; 0 if the run has no noise.
        cohort: Devices in a sum.
        examples: That each holds.
        views: From the one that shows most.
    """

    originals: Inputs = field(repr=False)
    noise_multiplier: float
    cohort: int
    examples: int
    views: tuple[View, ...]


def check_inversion(job: Job, preflight: Preflight, settings: InversionSettings) -> None:
    """Refuse a run whose updates this suite cannot read.

    Raises:
        ConfigurationError: Examples are no images, there are too few, or nothing is encoded.
    """
    dataset, shape = preflight.dataset, preflight.dataset.input_shape
    if len(shape) != 3 or shape[0] not in {1, 3} or min(shape[1:]) < 4:
        msg = (
            "suite=inversion recovers images [channels, height, width] with 1 or 3 channels, but "
            f"model {job.model.kind} is trained on inputs {list(shape)}: choose data=digits, "
            "or another suite"
        )
        raise ConfigurationError(msg)
    needed = settings.cohort * settings.examples
    if needed > len(dataset.y_train):
        msg = (
            f"inversion.cohort times inversion.examples must be at most {len(dataset.y_train)}, "
            f"the training examples, got {needed}"
        )
        raise ConfigurationError(msg)
    if job.plan is None:
        msg = (
            "suite=inversion reads encoded uploads, but quantize=none sends plain float32, which "
            "hides nothing: choose a quantizer"
        )
        raise ConfigurationError(msg)
    for plan in _plans(job.plan).values():  # a cohort that does not fit is refused now
        bind_first(plan, clients=settings.cohort, dim=preflight.parameters, layers=preflight.layers)


def audit_inversion(
    job: Job,
    preflight: Preflight,
    settings: InversionSettings,
    *,
    signed: bool = False,
    quiet: bool = False,
) -> InversionAudit:
    """Run one round in each way, and recover images from what it shows.

    Args:
        job: The run to audit; `check_inversion` accepts it.
        preflight: Of that run.
        settings: Of the suite.
        signed: Whether the devices are enrolled.
        quiet: Show no progress bar.

    Raises:
        ConfigurationError: A plan does not fit the model.
    """
    one_thread()
    dataset = preflight.dataset
    devices = replace(
        job,
        partition=Iid(),
        clients=len(dataset.y_train) // settings.examples,
        clients_per_round=min(settings.cohort, len(dataset.y_train) // settings.examples),
        faults=NoFaults(),
    )
    rows = _rows(devices, dataset, settings.cohort)
    model = build(job.model, dataset.input_shape, dataset.classes, job.seed)
    everything = np.concatenate(rows)
    originals = dataset.x_train[everything[:SHOWN]]
    lone = -(-len(originals) // settings.examples)
    plans = _plans(job.plan or RunPlan())
    views = []
    bar = tqdm(
        total=settings.steps * ((lone + 1) * len(plans) // 2 + 1),
        desc="inversion",
        unit="step",
        disable=quiet,
        dynamic_ncols=True,
        file=sys.stderr,
    )
    search = _Search(model, dataset, settings, bar.update)
    floor: RealVector = np.zeros(0)
    for name, plan in plans.items():
        updates = _observe(devices, plan, settings.cohort, get_arrays(model), signed=signed)
        # A lone update shows its own device only: the devices are attacked one by one.
        alone = not name.endswith("sum")
        attacked = zip(updates.single, rows, strict=True) if alone else [(updates.sum, everything)]
        found = search.match(originals, list(islice(attacked, lone)))
        views.append(View(name, 1 if alone else settings.cohort, found))
        floor = updates.sum
    noise = np.random.default_rng([settings.seed, 5]).standard_normal(floor.shape) * (floor != 0)
    views.append(View("nothing", 0, search.match(originals, [(noise, everything)])))
    bar.close()
    return InversionAudit(
        originals,
        getattr(job.privacy, "noise_multiplier", 0.0) if job.plan and job.plan.private else 0.0,
        settings.cohort,
        settings.examples,
        tuple(views),
    )


@dataclass(frozen=True, slots=True)
class _Search:
    """Both attacks on updates of one model."""

    model: nn.Module = field(repr=False)
    dataset: Dataset = field(repr=False)
    settings: InversionSettings
    on_step: Callable[[], object]

    def match(
        self, originals: Inputs, attacked: Sequence[tuple[RealVector, npt.NDArray[np.int64]]]
    ) -> Recovered:
        """Attack each update, given how many examples of which labels are in it."""
        shape = self.dataset.input_shape
        by_ratio = [analytic(self.model, update, shape) for update, _ in attacked]
        by_search = [
            by_gradient(
                self.model,
                update,
                self.dataset.y_train[source],
                shape,
                steps=self.settings.steps,
                seed=self.settings.seed,
                on_step=self.on_step,
            )
            for update, source in attacked
        ]
        return best_matches(
            originals,
            {"analytic": np.concatenate(by_ratio), "gradient": np.concatenate(by_search)},
        )


@dataclass(frozen=True, slots=True)
class Observed:
    """What a round showed: every lone upload in the clear, or the sum."""

    single: tuple[RealVector, ...] = field(repr=False)
    sum: RealVector = field(repr=False)


class TappedGrid(WrappedGrid):
    """Keeps the packed vector of every upload that passes, by node."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.uploads: dict[int, bytes] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Pass replies on, and keep what they carry."""
        for reply in self._grid.pull_messages(message_ids):
            arrays = (
                reply.content.array_records.get(f"{RECORD}.{VECTOR}")
                if reply.has_content()
                else None
            )
            if arrays is not None:
                self.uploads[reply.metadata.src_node_id] = arrays[VECTOR].data
            yield reply


def _observe(
    devices: Job,
    plan: RunPlan,
    cohort: int,
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    signed: bool,
) -> Observed:
    """Run one round of `plan` on the first `cohort` devices."""
    job = replace(devices, secagg=plan.secagg, privacy=plan.privacy)
    helper = None
    if plan.secagg.kind == "seed_helper":
        helper, key = connect_helper(job)
        plan = replace(plan, secagg=replace(plan.secagg, public_key=key))
    app = simulated_devices(job, signed=signed and not isinstance(plan.secagg, NoSecAgg))
    with InProcessGrid(app, [{}] * cohort, {"job": job.to_json()}) as engine:
        tapped = TappedGrid(engine)
        nodes = list(engine.get_node_ids())
        labels = {node: str(index) for index, node in enumerate(nodes)}
        grid = SecureGrid(tapped, plan, labels=labels, helper=helper)
        content = RecordDict(
            {"arrays": to_record(arrays), "config": ConfigRecord({"server-round": 1})}
        )
        replies = list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))
        if not replies:
            msg = "the round that was to be attacked was aborted: raise dropout or attempts"
            raise ConfigurationError(msg)
        layout = Layout.of(arrays)
        before = layout.flatten(arrays)
        mean = layout.flatten(to_arrays(_arrays(replies[0]))) - before
        single: tuple[RealVector, ...] = ()
        if isinstance(plan.secagg, NoSecAgg):
            bound = bind_round(_round_plan(plan, cohort, layout, model_digest(arrays)))
            vectors = (unpack(tapped.uploads[node], bound.dim, bound.ring) for node in nodes)
            single = tuple(bound.codec.decode(vector[: bound.update_dim]) for vector in vectors)
    return Observed(single, mean)


def _plans(plan: RunPlan) -> dict[str, RunPlan]:
    """Return the rounds to run, by what they show."""
    clear = replace(plan, secagg=NoSecAgg())
    plans = {
        "one update": replace(clear, privacy=NoPrivacy()),
        "sum": replace(plan, privacy=NoPrivacy()),
    }
    return plans | ({"one noisy update": clear, "noisy sum": plan} if plan.private else {})


def _round_plan(plan: RunPlan, cohort: int, layout: Layout, digest: str) -> RoundPlan:
    layers = layers_of(plan, layout)
    first = bind_first(plan, clients=cohort, dim=layout.dim, layers=layers).plan
    return replace(first, run_id="audit", model_digest=digest)


def _rows(devices: Job, dataset: Dataset, cohort: int) -> list[npt.NDArray[np.int64]]:
    """Return which training examples the first devices hold."""
    return list(partition(dataset, devices.partition, devices.clients, devices.seed)[:cohort])


def _arrays(reply: Message) -> ArrayRecord:
    return next(iter(reply.content.array_records.values()))
