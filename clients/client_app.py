"""The ClientApp: the same in a simulation and on a device.

It answers three messages: `train` trains on the device's examples, as much of the model
as the device is able to; `evaluate` tests on them; `query.profile` tells the device's name,
and what it is if its owner allows that. Where the examples come from is the
device's own affair: a node configured with `data-path` reads that file; otherwise it
takes its partition of the job's data set.

Most messages of a round do not train. torch is imported by the first one that does:
`training` and `models` import it when a function of theirs is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from clients.identity import IdentitySource
from clients.policy import DevicePolicy
from clients.priority import priority_of
from clients.profile import class_of, told
from clients.secagg_mod import EntropySource, secagg_mod
from clients.teacher import soft_targets
from fedcore import models, training
from fedcore.crypto import Entropy, ReplayedEntropy, SystemEntropy, generator
from fedcore.data import (
    DataConfig,
    Dataset,
    Indices,
    Inputs,
    Labels,
    NpzFile,
    PartitionConfig,
    load,
    partition,
)
from fedcore.engine import to_arrays, to_record
from fedcore.errors import ConfigurationError
from fedcore.job import Job, Mixed, of_examples, trains_for_int8
from fedcore.job.levels import NOISE_KEY
from fedcore.models import ModelConfig, Widths, fitting_widths, hidden_widths, widths_of
from fedcore.models.parts import Part, part_of
from fedcore.pipeline import PART, Uniform
from fedcore.vectors import Layout

if TYPE_CHECKING:
    from torch import nn

    from fedcore.training import ExampleLevelPrivacy, LocalTraining


def build_client_app(
    policy: DevicePolicy | None = None,
    *,
    entropy: EntropySource | None = None,
    identity: IdentitySource | None = None,
    keep_answer: bool = True,
    inner: Sequence[Mod] = (),
) -> ClientApp:
    """Return the ClientApp.

    Args:
        policy: What this device demands of every secure round.
        entropy: For simulations that must be repeatable; never set it on a device.
        identity: Gives the identity of an enrolled device; by default from the files
            that the node's configuration names.
        keep_answer: Whether the last reply is kept for a coordinator that asks again,
            see `clients.secagg_mod`.
        inner: Mods between the secure sum and the functions below: what they return is
            clipped, noised and masked like any other update.
    """
    source = entropy or system_entropy
    mod = secagg_mod(policy, entropy=source, identity=identity, keep_answer=keep_answer)
    app = ClientApp(mods=[mod, *inner])

    @app.train()
    def train_message(message: Message, context: Context) -> Message:
        return _train(message, context, source(context))

    @app.evaluate()
    def evaluate_message(message: Message, context: Context) -> Message:
        return _evaluate(message, context)

    @app.query("profile")
    def profile_message(message: Message, context: Context) -> Message:
        label = context.node_config.get("partition-id", context.node_id)
        record = ConfigRecord({"label": str(label), **_told(message, context)})
        return Message(RecordDict({"profile": record}), reply_to=message)

    return app


def _told(message: Message, context: Context) -> dict[str, int]:
    """Return what this device tells of itself beside its name."""
    wanted = message.content.config_records.get("profile", ConfigRecord()).get("wanted", [])
    if not isinstance(wanted, list) or not wanted:
        return {}
    job = _job(context)
    names = [name for name in wanted if isinstance(name, str)]
    return told(context, job, names, lambda: len(_examples(job, context)[1]))


def system_entropy(context: Context) -> Entropy:
    """Return the operating system's randomness: what every real device uses."""
    del context
    return SystemEntropy()


def replayed_entropy(seed: int) -> EntropySource:
    """Return a source from which a simulation draws the same bytes again."""
    return partial(_replay, seed)


def _replay(seed: int, context: Context) -> Entropy:
    return ReplayedEntropy(str(seed).encode()).child(f"node={context.node_config['partition-id']}")


def _train(message: Message, context: Context, entropy: Entropy) -> Message:
    priority_of(context.node_config).take()
    job = _job(context)
    x, y = _examples(job, context)
    config = message.content.config_records.get("config", ConfigRecord())
    round_number = config.get("server-round", 0)
    mu = config.get("proximal-mu", 0.0)
    if not isinstance(mu, (int, float)) or not isinstance(round_number, int):
        msg = (
            "proximal-mu and server-round must be numbers, found "
            f"{type(mu).__name__} and {type(round_number).__name__}"
        )
        raise ConfigurationError(msg)
    arrays = to_arrays(message.content.array_records["arrays"])
    index, part = _part(job, context, arrays, round_number)
    model = _load_model(job, context, arrays if part is None else part.take(arrays))
    local = job.training if index is None else _fewer_steps(job, index)
    rng = generator(entropy.child(f"training/round={round_number}"), "sgd")
    metrics: dict[str, int | float | list[int] | list[float]]
    privacy = _example_privacy(job, config)
    if privacy is not None:
        training.train_example_level(model, x, y, local, privacy, rng=rng, proximal_mu=float(mu))
        metrics = {}  # computed on raw examples: nothing of it may leave the device
    else:
        teacher = soft_targets(job, context.node_config, x, _classes_of(model))
        trained = training.fake_int8(model, x) if trains_for_int8(job, round_number) else model
        report = training.train(trained, x, y, local, rng, proximal_mu=float(mu), teacher=teacher)
        metrics = {"train-loss": report.loss, "train-accuracy": report.accuracy}
    # Flower weighs by what is reported here, also where no codec is in between.
    weight = 1 if isinstance(job.weighting, Uniform) else len(y)
    result = training.get_arrays(model, copy=False)
    content = RecordDict(
        {
            "arrays": to_record(result if part is None else part.put(arrays, result)),
            "metrics": MetricRecord({**metrics, "num-examples": weight}),
        }
    )
    if index is not None:
        content[PART] = ConfigRecord({PART: index})
    return Message(content, reply_to=message)


def _part(
    job: Job, context: Context, arrays: Mapping[str, npt.NDArray[Any]], round_number: int
) -> tuple[int | None, Part | None]:
    """Return this device's class, and where its part of the model is; None for all of it."""
    index = class_of(context, job)
    if index is None or not isinstance(job.devices, Mixed):
        return None, None
    width = job.devices.classes[index].width
    if width == 1:
        return index, None
    return index, part_of(Layout.of(arrays), width, job.devices.structure, round_number - 1)


def _fewer_steps(job: Job, index: int) -> LocalTraining:
    if not isinstance(job.devices, Mixed):
        return job.training
    return replace(
        job.training, epochs=round(job.training.epochs * job.devices.classes[index].steps)
    )


def _example_privacy(job: Job, config: ConfigRecord) -> ExampleLevelPrivacy | None:
    """Return how examples are protected; a job with a target is told the noise by the message."""
    privacy = of_examples(job.privacy)
    noise = config.get(NOISE_KEY)
    if privacy is None or privacy.noise_multiplier is not None or not isinstance(noise, float):
        return privacy  # without a stated noise training refuses to begin
    return replace(privacy, noise_multiplier=noise, epsilon=None)


def _evaluate(message: Message, context: Context) -> Message:
    job = _job(context)
    x, y = _examples(job, context)
    arrays = to_arrays(message.content.array_records["arrays"])
    result = training.evaluate(_load_model(job, context, arrays), x, y)
    metrics = MetricRecord(
        {
            "eval-loss": result.loss,
            "eval-accuracy": result.accuracy,
            "num-examples": result.examples,
        }
    )
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _job(context: Context) -> Job:
    return _parse_job(str(context.run_config.get("job", "")))


@lru_cache(maxsize=4)
def _parse_job(text: str) -> Job:
    return Job.from_json(text) if text else Job()


def _examples(job: Job, context: Context) -> tuple[Inputs, Labels]:
    """Return this device's training examples."""
    path = context.node_config.get("data-path")
    if isinstance(path, str):
        dataset = _dataset(NpzFile(path=path))
        return dataset.x_train, dataset.y_train
    index = context.node_config.get("partition-id")
    if not isinstance(index, int) or not 0 <= index < job.clients:
        msg = (
            f"a node needs data-path, or partition-id in 0..{job.clients - 1}, in its node "
            f"configuration; found partition-id={index!r}"
        )
        raise ConfigurationError(msg)
    dataset = _dataset(job.data)
    rows = _shards(job.data, job.partition, job.clients, job.seed)[index]
    return dataset.x_train[rows], dataset.y_train[rows]


@lru_cache(maxsize=2)
def _dataset(config: DataConfig) -> Dataset:
    return load(config)


@lru_cache(maxsize=2)
def _shards(
    data: DataConfig, config: PartitionConfig, clients: int, seed: int
) -> tuple[Indices, ...]:
    return partition(_dataset(data), config, clients, seed)


def _load_model(job: Job, context: Context, arrays: Mapping[str, npt.NDArray[Any]]) -> nn.Module:
    """Return a model of the process, with these weights: of all the model or of a part."""
    path = context.node_config.get("data-path")
    dataset = _dataset(NpzFile(path=path) if isinstance(path, str) else job.data)
    widths = fitting_widths(job.model, job.pruning, arrays)
    if isinstance(job.devices, Mixed) and widths_of(arrays) != hidden_widths(job.model):
        widths = widths_of(arrays)
    model = _model(job.model, dataset.input_shape, job.classes or dataset.classes, widths)
    training.set_arrays(model, arrays)
    return model


def _classes_of(model: nn.Module) -> int:
    """Return how many logits the last layer gives."""
    *_, last = model.parameters()
    return len(last)


@lru_cache(maxsize=4)
def _model(
    config: ModelConfig, input_shape: tuple[int, ...], classes: int, widths: Widths | None
) -> nn.Module:
    training.one_thread()
    return models.build(config, input_shape, classes, 0, widths)


app = build_client_app()
