"""Devices that take their time, on any clock.

Work takes long on real fleets, and not alike: a few devices are tens of times slower than
most, and some go away in the middle. `PacedGrid` wraps any grid and holds every reply back
until its time has come; on a `VirtualClock` that costs nothing, so that a laptop shows in
a minute what a fleet does in a day.

    a message that carries a model     work: the device's duration of that round
    any other                          the latency of the link

Durations are log-normal, which is what measurements of fleets look like [HYP+22, figure 2]:

    seconds = median * exp(device_spread * z_device + task_spread * z_task)

with standard normal z that follow from the seed, the device's name, and for the task the
round's number: nobody's order of asking changes them.

A device may lapse instead: it goes away, and the ServerApp hears of it, as from a SuperLink,
`notice_seconds` later.

[HYP+22] Huba et al., "PAPAYA: Practical, Private, and Scalable Federated Learning",
         https://arxiv.org/abs/2111.04877
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, inf
from statistics import NormalDist
from typing import Literal

from flwr.app import Message
from flwr.serverapp import Grid

from fedcore.engine.clock import Clock
from fedcore.engine.faults import Describe, Fault, FaultyGrid
from fedcore.engine.wrapped import WrappedGrid
from fedcore.errors import ConfigurationError

_WORD = 8
_MOST_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class AtOnce:
    """Work takes as long as it takes here."""

    kind: Literal["at_once"] = "at_once"


@dataclass(frozen=True, slots=True)
class HeavyTailed:
    """Log-normal durations: of a device for the whole run, times those of a task.

    Attributes:
        seed: Another seed, other devices are slow.
        median_seconds: Of a task on the median device.
        device_spread: Of the logarithm over devices: with 1.0 the slowest tenth takes 3.6
            times as long as the median or longer.
        task_spread: Of the logarithm from task to task on one device.
        lapse: Probability that a device goes away while it works.
        notice_seconds: Until the ServerApp hears that it did.
        latency_seconds: Of a message that asks for no work.

    Example:
        >>> pace = HeavyTailed(device_spread=0.0, task_spread=0.0)
        >>> pace.seconds("7", round_number=1)
        60.0
    """

    kind: Literal["heavy_tailed"] = "heavy_tailed"
    seed: int = 0
    median_seconds: float = 60.0
    device_spread: float = 1.0
    task_spread: float = 0.3
    lapse: float = 0.0
    notice_seconds: float = 60.0
    latency_seconds: float = 0.2

    def __post_init__(self) -> None:
        for name, value, most in (
            ("median_seconds", self.median_seconds, _MOST_SECONDS),
            ("device_spread", self.device_spread, 4.0),
            ("task_spread", self.task_spread, 4.0),
            ("notice_seconds", self.notice_seconds, _MOST_SECONDS),
            ("latency_seconds", self.latency_seconds, _MOST_SECONDS),
        ):
            if not 0 <= value <= most:
                msg = f"pace.{name} must be in [0, {most:g}], got {value}"
                raise ConfigurationError(msg)
        if not 0 <= self.lapse < 1:
            msg = f"pace.lapse must be in [0, 1), got {self.lapse}"
            raise ConfigurationError(msg)

    def seconds(self, device: str, round_number: int) -> float:
        """Return how long a device works on a task."""
        z_device = _normal(self._uniform("device", device))
        z_task = _normal(self._uniform("task", device, round_number))
        spread = self.device_spread * z_device + self.task_spread * z_task
        return float(self.median_seconds * exp(spread))

    def lapses(self, device: str, round_number: int) -> bool:
        """Return whether a device goes away while it works on a task."""
        return self._uniform("lapse", device, round_number) < self.lapse

    def _uniform(self, *what: object) -> float:
        """Return a number in (0, 1) that follows from the seed and `what`."""
        text = "/".join(map(str, (self.seed, *what))).encode()
        word = int.from_bytes(hashlib.sha256(text).digest()[:_WORD])
        return float((word + 0.5) / (1 << 8 * _WORD))


def _normal(uniform: float) -> float:
    return float(NormalDist().inv_cdf(uniform))


class PacedGrid(WrappedGrid):
    """A grid on which every reply comes when its device would have sent it.

    Args:
        grid: Carries the messages.
        pace: How long everything takes.
        describe: Reads round, stage and device from a message.
        clock: Tells the time.
    """

    def __init__(self, grid: Grid, pace: HeavyTailed, describe: Describe, clock: Clock) -> None:
        super().__init__(FaultyGrid(grid, self._fault))
        self._pace = pace
        self._describe = describe
        self._clock = clock
        self._due: dict[str, float] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push messages, and note when their replies are due."""
        batch = list(messages)
        ids = list(self._grid.push_messages(batch))
        now = self._clock.now()
        for message in batch:
            self._due[message.metadata.message_id] = now + self._seconds(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are due."""
        now = self._clock.now()
        due = [key for key in message_ids if self._due.get(key, -inf) <= now]
        for reply in self._grid.pull_messages(due) if due else ():
            self._due.pop(reply.metadata.reply_to_message_id, None)
            yield reply

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push messages, wait for the last reply or the timeout, and return what has come."""
        ids = self.push_messages(messages)
        if not ids:
            return []
        last = max(self._due[key] for key in ids) - self._clock.now()
        self._clock.sleep(max(0.0, last if timeout is None else min(last, timeout)))
        return list(self.pull_messages(ids))

    def _fault(self, message: Message) -> Fault | None:
        return Fault.DROPPED if self._lapses(message) else None

    def _lapses(self, message: Message) -> bool:
        step = self._step(message)
        return step is not None and self._pace.lapses(*step)

    def _seconds(self, message: Message) -> float:
        step = self._step(message)
        if step is None:
            return self._pace.latency_seconds
        return self._pace.notice_seconds if self._lapses(message) else self._pace.seconds(*step)

    def _step(self, message: Message) -> tuple[str, int] | None:
        """Return device and round of a message that asks for work; None for any other."""
        if not message.content.array_records:
            return None
        found = self._describe(message)
        return None if found is None else (str(found[2]), found[0])
