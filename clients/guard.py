"""When a device works for a federation: its owner's limits, and the decision.

    limits, readings  ->  a reason not to, or None

A limit that is not set asks nothing. One that is set holds also where its sensor cannot be
read: a device that does not know its temperature must not assume a good one. The device
decides before it makes a key for a round, and again before it trains; whatever it finds,
it answers at once, so that nobody waits for it. It tells the first reason alone, as a word
of `fedcore.pipeline.decline`, or not even that.

Idle, charging and on an unmetered network is what phones ask for [BEG+19, section 3].

[BEG+19] Bonawitz et al., "Towards federated learning at scale: system design".
         https://arxiv.org/abs/1902.01046
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from flwr.app import Context

from clients.limits import Limits, limits_of
from clients.sensors import KernelSensors, Readings, Sensors
from fedcore.pipeline.decline import Reason

Guard: TypeAlias = Callable[[Context], Reason | None]
"""Tells why a node does not work now; None if it does."""
SensorSource: TypeAlias = Callable[[Limits], Sensors]
"""Gives a device its sensors; those of the kernel unless a test brings others."""


def kernel_sensors(limits: Limits) -> Sensors:
    """Return the sensors of this Linux device, and the files that its limits name."""
    return KernelSensors(
        opt_out=None if limits.opt_out is None else Path(limits.opt_out).expanduser(),
        metered=None if limits.metered is None else Path(limits.metered).expanduser(),
    )


def guard_of(context: Context) -> Reason | None:
    """Decide with the kernel's sensors and the limits of the node's configuration.

    Raises:
        ConfigurationError: The node's configuration has a limit that is none.
    """
    return _guard(context, kernel_sensors)


def guard_with(sensors: SensorSource) -> Guard:
    """Return a guard that reads other sensors."""
    return lambda context: _guard(context, sensors)


def _guard(context: Context, sensors: SensorSource) -> Reason | None:
    limits = limits_of(context.node_config)
    if limits == Limits(reasons=limits.reasons):
        return None  # nothing is asked, so nothing is read
    return decide(limits, sensors(limits).read())


def decide(limits: Limits, readings: Readings) -> Reason | None:
    """Return why a device in this state does not work; None if every limit is kept.

    Example:
        >>> decide(Limits(charging=True), Readings(external_power=False))
        'not_charging'
        >>> decide(Limits(most_celsius=60), Readings(celsius=None))
        'unknown_temperature'
    """
    for asked, kept, passed, unknown in _questions(limits, readings):
        if asked and not kept:
            reason = unknown if kept is None else passed
            return reason if limits.reasons else "unfit"
    return None


def _questions(
    limits: Limits, readings: Readings
) -> Iterator[tuple[bool, bool | None, Reason, Reason]]:
    """Yield for each limit whether it is set, and kept, and what there is to say otherwise.

    The user's own word comes first. A limit of which it is not known whether it is kept
    says None.
    """
    opted_in, unmetered = _not(readings.opted_out), _not(readings.metered)
    charged = _at_least(readings.battery_percent, limits.least_battery_percent)
    room = _at_least(readings.memory_mib, limits.least_memory_mib)
    cool = _at_least(limits.most_celsius, readings.celsius)
    idle = _at_least(limits.most_load, readings.load)
    battery, memory = limits.least_battery_percent, limits.least_memory_mib
    yield limits.opt_out is not None, opted_in, "opted_out", "unknown_opt_out"
    yield True, limits.in_hours(readings.minute), "outside_hours", "outside_hours"
    yield limits.charging, readings.external_power, "not_charging", "unknown_power"
    yield battery is not None, charged, "low_battery", "unknown_battery"
    yield limits.most_celsius is not None, cool, "too_warm", "unknown_temperature"
    yield limits.most_load is not None, idle, "busy", "unknown_load"
    yield memory is not None, room, "low_memory", "unknown_memory"
    yield limits.metered is not None, unmetered, "metered", "unknown_link"


def _not(value: bool | None) -> bool | None:  # noqa: FBT001 - a reading
    return None if value is None else not value


def _at_least(value: float | None, bound: float | None) -> bool | None:
    """Tell whether `value` reaches `bound`; None if one of them is not known."""
    return None if value is None or bound is None else value >= bound
