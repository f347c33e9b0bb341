"""How long a stage is waited for, from what the invited devices told of themselves.

For a device with c cores, a link of b bits a second and n examples, and a model of d
weights of which its class trains the share w (all that it does grows at most like w):

    keys, shares, secrets    latency
    vectors                  latency + (model down + vector up) / b + 6 n e s d w / (c f)

with e epochs, the class' share s of them, f operations a core and second, and 6 = 2 forward
+ 4 backward for each weight and example (a convolution uses a weight at many positions: its
f is lower by as much). The stage waits for `margin` times the slowest, and never longer than
`stage_seconds`; what a device does not tell makes its time unknown, and `stage_seconds` is
waited for. Buckets are rounded to the worse side, so the estimate is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedcore.job import Job, Mixed, Profile
from fedcore.pipeline import RunPlan, bind_first, layers_of
from fedcore.pipeline.envelope import Stage
from fedcore.ring import packed_size
from fedcore.vectors import Layout

_OPERATIONS = 6
_BITS = 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """What goes over the link and into the cores in one round.

    Attributes:
        weights: Of the model.
        down_bytes: Of the model on its way to a device.
        up_bytes: Of a vector on its way back.
    """

    weights: int
    down_bytes: int
    up_bytes: int


def device_seconds(
    devices: Mixed, profile: Profile, stage: Stage, sizes: Sizes, epochs: int
) -> float | None:
    """Return how long a device needs for a stage, at most; None if that is unknown.

    Args:
        devices: Of the job.
        profile: Of the device.
        stage: Of the round.
        sizes: Of the round.
        epochs: Of local training.
    """
    if stage != "upload":
        return devices.latency_seconds
    index = devices.class_of(profile)
    if index is None or not (profile.cores and profile.link_kbps and profile.examples):
        return None
    known = devices.classes[index]
    wire = _BITS * (sizes.down_bytes + sizes.up_bytes) / (1000 * profile.link_kbps)
    work = _OPERATIONS * profile.examples * epochs * known.steps * sizes.weights * known.width
    return devices.latency_seconds + wire + work / (profile.cores * devices.core_gflops * 1e9)


def patience(
    job: Job, profiles: Mapping[int, Profile], sizes: Sizes
) -> Callable[[Stage, Iterable[int]], float]:
    """Return what tells for how many seconds a stage waits for these nodes.

    Args:
        job: With its devices; `stage_seconds` is the most.
        profiles: By node id.
        sizes: Of a round.
    """

    def seconds(stage: Stage, nodes: Iterable[int]) -> float:
        devices = job.devices
        if not isinstance(devices, Mixed):
            return job.stage_seconds
        slowest = 0.0
        for node_id in nodes:
            profile = profiles.get(node_id, Profile())
            needed = device_seconds(devices, profile, stage, sizes, job.training.epochs)
            if needed is None:
                return job.stage_seconds
            slowest = max(slowest, needed)
        return min(job.stage_seconds, devices.margin * slowest)

    return seconds


def patience_of(
    job: Job, plan: RunPlan, layout: Layout, profiles: Mapping[int, Profile]
) -> Callable[[Stage, Iterable[int]], float] | None:
    """Return the patience of a job; None if nobody was asked for a profile.

    Args:
        job: Says how devices train.
        plan: Says what they send.
        layout: Of the model that they get, as float32.
        profiles: By node id.
    """
    if not profiles:
        return None
    layers = layers_of(plan, layout)
    bound = bind_first(plan, clients=job.invited, dim=layout.dim, layers=layers)
    up = packed_size(bound.dim, bound.ring.bits)
    return patience(job, profiles, Sizes(layout.dim, down_bytes=4 * layout.dim, up_bytes=up))
