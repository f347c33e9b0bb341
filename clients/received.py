"""What a device was sent and what its train function returned, read with care.

Of a coordinator's bytes each is right or a `PeerProtocolError`; what the app of this device
returns is right or a `ConfigurationError`, which says how to mend it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.pipeline import PART, BoundRound, ByClass, Envelope, Layer, RoundPlan, bind_round
from fedcore.pipeline.envelope import Stage
from fedcore.secagg import Plan
from fedcore.secagg.fields import Reader
from fedcore.secagg.messages import Delivery, Request, Roster, Survivors
from fedcore.vectors import Layout, RealVector


@dataclass(frozen=True, slots=True)
class Received:
    """A model to train, flat, and the message that the train function expects."""

    content: RecordDict
    layout: Layout
    digest: str
    model: RealVector


def check_layers(plan: RoundPlan, found: tuple[Layer, ...]) -> None:
    """Refuse a plan that is not about the model that came with it.

    Raises:
        PeerProtocolError: It names other layers.
    """
    if found != plan.layers:
        msg = (
            "the plan must name the layers of the model that came with it, found others: "
            "this device does not take part"
        )
        raise PeerProtocolError(msg)


def seat_in(envelope: Envelope) -> int:
    """Return the device's index in a round with a helper.

    Raises:
        PeerProtocolError: The envelope holds something else.
    """
    reader = Reader(envelope.message)
    client = reader.u32()
    reader.end("an invitation to a round with a helper")
    return client


def stage_of(kind: type[Request], plan: Plan) -> Stage:
    """Return which stage a request of this type belongs to."""
    if kind is Survivors:
        return "endorse" if plan.authenticated else "reveal"
    stages: dict[type[Request], Stage] = {Roster: "share", Delivery: "upload"}
    return stages.get(kind, "reveal")


def bind(plan: RoundPlan) -> BoundRound:
    """Return a coordinator's plan, ready to work with.

    Raises:
        PeerProtocolError: It cannot work.
    """
    try:
        return bind_round(plan)
    except ConfigurationError as error:
        msg = f"the coordinator's plan cannot work: {error}"
        raise PeerProtocolError(msg) from error


def single_arrays(content: RecordDict, where: str) -> ArrayRecord:
    """Return the only arrays of `content`.

    Raises:
        ConfigurationError: There are none, or several.
    """
    if len(content.array_records) != 1:
        msg = f"{where} must hold exactly one ArrayRecord, found {len(content.array_records)}"
        raise ConfigurationError(msg)
    return next(iter(content.array_records.values()))


def class_in(plan: RoundPlan, content: RecordDict) -> int:
    """Return of which class the train function says that this device is.

    Raises:
        ConfigurationError: It does not say, and the plan has classes.
    """
    if not isinstance(plan.run.shares, ByClass):
        return 0
    index = content.config_records.get(PART, ConfigRecord()).get(PART)
    if not isinstance(index, int):
        msg = (
            "the plan has classes of devices, so the train function must say of which this one is, "
            f"in a ConfigRecord {PART!r} with the number {PART!r}"
        )
        raise ConfigurationError(msg)
    return index


def measurements(content: RecordDict, weight_key: str) -> tuple[int, Mapping[str, float]]:
    """Return the weight and the other metrics; lists become ``name[0], name[1], ...``.

    Raises:
        ConfigurationError: The weight is missing, or is none.
    """
    if len(content.metric_records) != 1:
        msg = (
            "the train function's reply must hold exactly one MetricRecord, "
            f"found {len(content.metric_records)}"
        )
        raise ConfigurationError(msg)
    record = dict(next(iter(content.metric_records.values())))
    weight = record.pop(weight_key, None)
    if not isinstance(weight, (int, float)) or not np.isfinite(weight) or weight < 0:
        msg = f"the train function must report {weight_key!r} as a number of 0 or more"
        raise ConfigurationError(msg)
    metrics: dict[str, float] = {}
    for name, value in sorted(record.items()):
        if isinstance(value, list):
            metrics |= {f"{name}[{place}]": float(item) for place, item in enumerate(value)}
        else:
            metrics[name] = float(value)
    return round(weight), metrics
