"""Devices that disappear, on purpose and repeatably.

`FaultyGrid` wraps any Flower grid (in-process, Ray, SuperLink) and loses the messages or
replies that a script names. The ServerApp sees what a SuperLink reports for a device
that went silent: an error NODE_UNAVAILABLE whose source is the SuperLink, to be mapped
to the device by the message that it answers. It does not see *when* the device went:

    DROPPED       the message never arrives: the device was gone before the stage
    LOST_REPLY    the node did its work, and its reply got lost: it was gone after it

A real SuperLink takes about a minute to notice; here the error comes at once.

`DropScript` is the script of the experiments: which clients of a round disappear at
which protocol stage follows from its seed, the round and the cohort alone. A client that
is gone stays gone however often it is asked; a reply gets lost once, and the client can
be asked again. The script knows nothing of message formats; the caller passes the
function that reads them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, TypeAlias

from flwr.app import Message, Metadata
from flwr.serverapp import Grid

from fedcore.engine.flower_private import ErrorCode, set_message_id, unavailable
from fedcore.engine.wrapped import WrappedGrid
from fedcore.errors import ConfigurationError

NodeKey: TypeAlias = int | str


class Fault(Enum):
    """What happens to one exchange with a node."""

    DROPPED = auto()
    LOST_REPLY = auto()


Script: TypeAlias = Callable[[Message], Fault | None]
"""Decides about one message, once, when it is pushed."""
Describe: TypeAlias = Callable[[Message], tuple[int, str, NodeKey] | None]
"""Reads (round, stage, node) from a message; None for one that no script may touch."""


class FaultyGrid(WrappedGrid):
    """A grid that loses what a script tells it to lose.

    Args:
        grid: Carries everything else.
        script: Asked once for each message.
    """

    def __init__(self, grid: Grid, script: Script) -> None:
        super().__init__(grid)
        self._script = script
        self._count = 0
        self._dropped: dict[str, Metadata] = {}
        self._lost: dict[str, Metadata] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Push the messages that are not dropped; return the ids of all, in order."""
        batch = list(messages)
        kept, losing = self._split(batch)
        accepted = set(self._grid.push_messages(kept)) if kept else set()
        self._lost |= {m.metadata.message_id: m.metadata for m in losing}
        ids = [message.metadata.message_id for message in batch]
        return [key for key in ids if key in accepted or key in self._dropped]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield errors for dropped messages first, then what the wrapped grid replies."""
        asked = set(message_ids)
        dropped = [key for key in self._dropped if key in asked]
        return self._replies(dropped, asked.difference(dropped))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Exchange the messages that are not dropped; all replies in message order."""
        batch = list(messages)
        kept, losing = self._split(batch)
        replies = list(self._grid.send_and_receive(kept, timeout=timeout)) if kept else []
        self._lost |= {m.metadata.message_id: m.metadata for m in losing}
        answers = {reply.metadata.reply_to_message_id: self._filter(reply) for reply in replies}
        ids = [message.metadata.message_id for message in batch]
        answers |= {
            key: _silence(key, self._dropped.pop(key)) for key in ids if key in self._dropped
        }
        return [answers[key] for key in ids if key in answers]

    def _decide(self, messages: Sequence[Message]) -> Sequence[Fault | None]:
        return [self._script(message) for message in messages]

    def _split(self, batch: Sequence[Message]) -> tuple[list[Message], list[Message]]:
        """Return the messages to forward, and those of them whose reply gets lost."""
        kept, losing = [], []
        for message, fault in zip(batch, self._decide(batch), strict=True):
            if fault is Fault.DROPPED:
                set_message_id(message, f"dropped-{self._count}")
                self._dropped[message.metadata.message_id] = message.metadata
                self._count += 1
                continue
            kept.append(message)
            if fault is Fault.LOST_REPLY:
                losing.append(message)
        return kept, losing

    def _replies(self, dropped: Sequence[str], rest: Collection[str]) -> Iterator[Message]:
        for key in dropped:
            asked = self._dropped.pop(key, None)
            if asked is not None:
                yield _silence(key, asked)
        if rest:
            yield from map(self._filter, self._grid.pull_messages(rest))

    def _filter(self, reply: Message) -> Message:
        key = reply.metadata.reply_to_message_id
        asked = self._lost.pop(key, None)
        return reply if asked is None else _silence(key, asked)


def _silence(message_id: str, asked: Metadata) -> Message:
    return unavailable(
        asked,
        message_id=message_id,
        run_id=asked.run_id,
        code=ErrorCode.NODE_UNAVAILABLE,
        reason="the node went silent (scripted fault)",
    )


@dataclass(frozen=True, slots=True)
class DropScript:
    """A few clients disappear in every round, or a few replies.

    Attributes:
        seed: Another seed, other victims.
        per_round: How many victims a round has, over all `stages` together.
        stages: Each victim disappears before one of these protocol stages, or its reply to
            one of them does.
        lose: `client`: it is gone, and never answers that stage. `reply`: it does its work,
            but its first reply gets lost on the way.

    Example:
        >>> script = DropScript(seed=1, per_round=2, stages=("upload",))
        >>> sorted(script.victims(1, "upload", range(10))) == sorted(
        ...     script.victims(1, "upload", reversed(range(10)))
        ... )
        True
        >>> script.victims(1, "unmask", range(10))
        frozenset()
    """

    kind: Literal["drop"] = "drop"
    seed: int = 0
    per_round: int = 1
    stages: tuple[str, ...] = ("upload",)
    lose: Literal["client", "reply"] = "client"

    def __post_init__(self) -> None:
        if self.per_round < 0:
            msg = f"faults.per_round must be >= 0, got {self.per_round}: 0 drops nobody"
            raise ConfigurationError(msg)
        if not self.stages:
            msg = "faults.stages must name at least one protocol stage, got (): add one"
            raise ConfigurationError(msg)

    def victims(
        self, round_number: int, stage: str, cohort: Iterable[NodeKey]
    ) -> frozenset[NodeKey]:
        """Return who disappears before `stage`, out of those that are asked to take part.

        A pure function: neither the order of the cohort nor earlier calls matter.
        """
        count = sum(self._stage(round_number, index) == stage for index in range(self.per_round))
        ranked = sorted(cohort, key=lambda node: self._hash(round_number, "node", node))
        return frozenset(ranked[:count])

    def _stage(self, round_number: int, index: int) -> str:
        return self.stages[self._hash(round_number, "stage", index) % len(self.stages)]

    def _hash(self, round_number: int, what: str, key: NodeKey) -> int:
        text = f"{self.seed}/{round_number}/{what}/{key}".encode()
        return int.from_bytes(hashlib.sha256(text).digest())


class DroppingGrid(FaultyGrid):
    """A grid on which clients or replies disappear as a `DropScript` says.

    The cohort of a stage is what the first push holds for it: push a stage's messages
    together. What is pushed later for a client of that cohort is a second try.

    Args:
        grid: Carries everything else.
        drops: Who disappears when.
        describe: Reads round, stage and node from a message.
    """

    def __init__(self, grid: Grid, drops: DropScript, describe: Describe) -> None:
        super().__init__(grid, lambda _: None)
        self._drop_script = drops
        self._describe = describe
        self._seen: dict[tuple[int, str], tuple[frozenset[NodeKey], frozenset[NodeKey]]] = {}

    def _decide(self, messages: Sequence[Message]) -> Sequence[Fault | None]:
        steps = [self._describe(message) for message in messages]
        cohorts: defaultdict[tuple[int, str], list[NodeKey]] = defaultdict(list)
        for step in steps:
            if step is not None:
                cohorts[step[:2]].append(step[2])
        faults = {
            (*stage, node): fault
            for stage, cohort in cohorts.items()
            for node, fault in self._faults(stage, cohort).items()
        }
        return [None if step is None else faults.get(step) for step in steps]

    def _faults(self, stage: tuple[int, str], cohort: Sequence[NodeKey]) -> dict[NodeKey, Fault]:
        """Return what happens to the victims of a stage, when `cohort` is asked for it."""
        known, victims = self._seen.get(stage, (frozenset(), frozenset()))
        again = known.issuperset(cohort)
        if not again:
            victims = self._drop_script.victims(*stage, cohort)
            this_round = {key: seen for key, seen in self._seen.items() if key[0] == stage[0]}
            self._seen = {**this_round, stage: (frozenset(cohort), victims)}
        if self._drop_script.lose == "client":
            return dict.fromkeys(victims, Fault.DROPPED)
        return {} if again else dict.fromkeys(victims, Fault.LOST_REPLY)
