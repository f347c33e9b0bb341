"""Who is training, who has checked in, and whose updates make the next buffer.

    idle > asked to train > checked in > member of a buffer > idle

`concurrency` devices train at a time, each from the model that was the latest when it was
asked; as soon as one is done another is asked. A device is asked once between two buffers.
Those that have checked in wait, with their update, until `size` of them can be added up:
`choose` says which. What waits in vain is dropped, and its device is idle again: an update
that is too stale, and one whose version has too few others to join it and nobody left who
trains from it.

Devices come and go: whoever is connected can be asked, and who is new is asked for its name
first. Nobody has to be there at the start but as many as a buffer has members.

The age of an update is the coordinator's own count. A device that was given another model
than its seat says refuses the seat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from math import inf
from typing import Final

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedcore.engine import Clock, VirtualClock, to_arrays
from fedcore.engine.flower_private import pack_records, unpack_records
from fedcore.job import Buffered
from fedcore.pipeline import RECORD, Envelope, model_digest
from fedcore.pipeline.decline import DECLINE_CODE, add_reasons, counted_as, reason_in
from fedcore.pipeline.envelope import CHECK_IN
from fedcore.telemetry import BufferReport, Traffic
from strategies.cohort import ask
from strategies.exchange import POLL_SECONDS
from strategies.sampling import choose_cohort
from strategies.wire_bytes import array_bytes, content_bytes

log = getLogger(__name__)
LOOK_SECONDS: Final = 10.0
"""How often the coordinator looks who is connected, and how long it waits for new names."""


@dataclass(frozen=True, slots=True)
class Task:
    """A device's work on one update.

    Attributes:
        node_id: Of its node.
        version: Digest of the model that it trains from.
        round_number: That was the next when it was asked.
        asked_at: When it was, by the run's clock.
    """

    node_id: int
    version: str
    round_number: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class CheckInState:
    """What goes on between two buffers, for a simulation that goes on from there.

    Attributes:
        versions: Digests of the models, the latest first.
        running: Who trains, in the order of asking.
        waiting: Who has checked in, in the order of doing so.
        contents: What those who train were sent, by the number of the round, packed.
        now: The run's clock.
    """

    versions: tuple[str, ...] = ()
    running: tuple[Task, ...] = ()
    waiting: tuple[Task, ...] = ()
    contents: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    now: float = 0.0


def choose(groups: Mapping[int, int], size: int, fewest: int) -> dict[int, int] | None:
    """Return how many of each group make a buffer of `size`; None if they cannot.

    Each group has at least `fewest` in the buffer, or none; the oldest come first.

    Args:
        groups: How many wait, by staleness.
        size: Of a buffer.
        fewest: Of a group.

    Example:
        >>> choose({0: 5, 1: 2, 3: 1}, size=6, fewest=2)
        {1: 2, 0: 4}
        >>> choose({0: 2, 1: 5}, size=6, fewest=2)
        {1: 4, 0: 2}
    """
    left = {age: groups[age] for age in sorted(groups, reverse=True) if groups[age] >= fewest}
    chosen: dict[int, int] = {}
    if not _suffices(chosen, left, size, fewest):
        return None
    for age in list(left):
        count = left.pop(age)
        if _suffices({**chosen, age: count}, left, size, fewest):
            chosen[age] = count
    free = size - fewest * len(chosen)
    picked = {}
    for age, count in chosen.items():
        more = min(free, count - fewest)
        picked[age] = fewest + more
        free -= more
    return picked


def _suffices(chosen: Mapping[int, int], left: Mapping[int, int], size: int, fewest: int) -> bool:
    """Tell whether a buffer can have these groups, and as many of those left as it needs."""
    counts = list(chosen.values())
    for count in sorted(left.values(), reverse=True):  # the largest: so as few as can be
        if sum(counts) >= size:
            break
        counts.append(count)
    return sum(counts) >= size >= fewest * len(counts)


@dataclass(slots=True)
class CheckIns:
    """Asks devices to train, and gathers who is done.

    Attributes:
        grid: Carries the messages.
        clock: Tells the time.
        labels: Every node's label, by node id; those that come later are added to it.
        schedule: How many train at a time, and which updates are too old.
        size: Of a buffer.
        fewest: Updates of each version in it.
        seconds: After which a device that has not answered is given up.
        seed: Of the public order in which devices are asked.
        weight_key: As in `SecureGrid`.
        resumable: Whether to keep what those who train were sent.
    """

    grid: Grid
    clock: Clock
    labels: dict[int, str]
    schedule: Buffered
    size: int
    fewest: int
    seconds: float
    seed: int = 0
    weight_key: str = "num-examples"
    resumable: bool = False
    _versions: tuple[str, ...] = ()
    _running: dict[str, Task] = field(default_factory=dict)
    _waiting: list[Task] = field(default_factory=list)
    _contents: dict[int, RecordDict] = field(default_factory=dict, repr=False)
    _asked: set[int] = field(default_factory=set)
    _here: set[int] = field(default_factory=set)
    _looked_at: float = -inf
    _traffic: Traffic = field(default_factory=Traffic)
    _lost: int = 0
    _declined: dict[str, int] = field(default_factory=dict)
    _dropped: int = 0

    @property
    def versions(self) -> tuple[str, ...]:
        """Digests of the models that are admitted, the latest first."""
        return self._versions

    def gather(self, content: RecordDict, kind: str, round_number: int) -> dict[int, int]:
        """Return the members of the next buffer: the staleness of each, by node id.

        Args:
            content: What the strategy sends to devices: the latest model, and its words.
            kind: Flower's type of the message.
            round_number: Of the buffer.

        Returns:
            Nobody if nobody is left who could be asked or waited for.
        """
        self._publish(content, round_number)
        self._look_around()
        self._begin(content, kind, round_number)
        while (members := self._members()) is None:
            if not self._running:
                return {}
            found = False
            for reply in self.grid.pull_messages(set(self._running)):
                found |= self._take(reply)
                self._begin(content, kind, round_number)
                if (members := self._members()) is not None:
                    return members
            if not found:
                self.clock.sleep(POLL_SECONDS)
            self._give_up()
            self._look_around()
            self._begin(content, kind, round_number)
        return members

    def report(self) -> tuple[BufferReport, Traffic, int, Mapping[str, int]]:
        """Return what happened since the last call, and begin to count anew.

        Returns:
            The state of the fleet, the bytes, and how many devices were lost, or declined.
        """
        told = BufferReport(
            running=len(self._running), waiting=len(self._waiting), dropped=self._dropped
        )
        result = (told, self._traffic, self._lost, dict(self._declined))
        self._traffic, self._lost, self._declined, self._dropped = Traffic(), 0, {}, 0
        return result

    def state(self) -> CheckInState:
        """Return what another process needs to go on, in a simulation."""
        return CheckInState(
            versions=self._versions,
            running=tuple(self._running.values()),
            waiting=tuple(self._waiting),
            contents={number: pack_records(sent) for number, sent in self._contents.items()},
            now=self.clock.now(),
        )

    def go_on(self, state: CheckInState) -> None:
        """Take over from another process, whose nodes were restored: ask again what is running.

        On a virtual clock each device is asked at the time when it was, and is as far now; on
        any other it begins anew, with all of its time before it.
        """
        self._versions, self._waiting = state.versions, list(state.waiting)
        for number, data in state.contents.items():
            self._contents[number] = unpack_records(data)
        for task in state.running:
            self._pause_until(task.asked_at)
            asked = replace(task, asked_at=self.clock.now())
            self._push([asked], self._contents[task.round_number], "train")
        self._pause_until(state.now)
        self._traffic = Traffic()

    def _pause_until(self, moment: float) -> None:
        if isinstance(self.clock, VirtualClock):
            self.clock.sleep(max(0.0, moment - self.clock.now()))

    def _publish(self, content: RecordDict, round_number: int) -> None:
        """Take note of the latest model, and drop what it makes too old."""
        (record,) = content.array_records.values()
        digest = model_digest(to_arrays(record))
        if digest not in self._versions:
            keep = self.schedule.max_staleness + 1
            self._versions = (digest, *self._versions)[:keep]
        elif digest != self._versions[0]:  # a model that came back is as old as it is new
            place = self._versions.index(digest)
            self._versions = self._versions[place:]
        self._asked.clear()
        needed = {task.round_number for task in self._running.values()}
        self._contents = {
            number: sent for number, sent in self._contents.items() if number in needed
        }
        if self.resumable:
            self._contents[round_number] = content

    def _look_around(self) -> None:
        """Find out who is connected, now and then; who is new, or has come back, has a name."""
        now = self.clock.now()
        if now < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at, self._here = now, set(self.grid.get_node_ids())
        strangers = sorted(self._here - self.labels.keys())
        if not strangers:
            return
        found = ask(self.grid, strangers, seconds=LOOK_SECONDS, clock=self.clock).labels
        for node, label in found.items():
            others = [other for other, known in self.labels.items() if known == label]
            if any(other in self._here for other in others):
                log.warning("node %d calls itself %r, as another does: not asked", node, label)
                continue
            for other in others:  # the same device under another id
                del self.labels[other]
            self.labels[node] = label

    def _begin(self, content: RecordDict, kind: str, round_number: int) -> None:
        """Drop what waits in vain, and ask idle devices as long as there is room."""
        self._drop_in_vain()
        free = self.schedule.concurrency - len(self._running)
        if free <= 0:
            return
        busy = {task.node_id for task in (*self._running.values(), *self._waiting)}
        able = self._here - busy - self._asked
        idle = {label: node for node, label in self.labels.items() if node in able}
        chosen = choose_cohort(idle, free, seed=self.seed, round_number=round_number)
        now = self.clock.now()
        tasks = [Task(idle[name], self._versions[0], round_number, now) for name in chosen]
        self._asked |= {task.node_id for task in tasks}
        self._push(tasks, content, kind)

    def _push(self, tasks: Sequence[Task], content: RecordDict, kind: str) -> None:
        if not tasks:
            return
        messages = [self._message(task, content, kind) for task in tasks]
        accepted = set(self.grid.push_messages(messages))
        for task, message in zip(tasks, messages, strict=True):
            self._traffic += Traffic(
                down_payload=array_bytes(message.content),
                down_total=content_bytes(message.content),
                downloads=1,
            )
            if message.metadata.message_id in accepted:
                self._running[message.metadata.message_id] = task
            else:
                self._lost += 1

    def _message(self, task: Task, content: RecordDict, kind: str) -> Message:
        envelope = Envelope(
            stage=CHECK_IN,
            round_number=task.round_number,
            label=self.labels[task.node_id],
            plan=b"",
            message=b"",
            weight_key=self.weight_key,
        )
        record = ConfigRecord(dict(envelope.to_fields()))
        return Message(
            RecordDict({**content, RECORD: record}),
            task.node_id,
            kind,
            group_id=str(task.round_number),
            ttl=self.seconds,
        )

    def _take(self, reply: Message) -> bool:
        """Take note of a device that is done, or will not be; tell whether it was asked."""
        task = self._running.pop(reply.metadata.reply_to_message_id, None)
        if task is None:
            return False  # a duplicate
        if not reply.has_content():
            if reply.error.code == DECLINE_CODE:
                self._decline(counted_as(reply.error.reason))
            self._lost += 1
            return True
        self._traffic += Traffic(up_total=content_bytes(reply.content))
        fields = reply.content.config_records.get(RECORD, ConfigRecord())
        reason = reason_in(fields)
        if reason is not None:
            self._decline(reason)
        if reason is not None or fields.get(CHECK_IN) is not True:
            self._lost += 1
        else:
            self._waiting.append(task)
        return True

    def _decline(self, reason: str) -> None:
        self._declined = add_reasons(self._declined, {reason: 1})

    def _give_up(self) -> None:
        """Forget devices that have not answered in time."""
        latest = self.clock.now() - self.seconds
        late = [key for key, task in self._running.items() if task.asked_at < latest]
        for key in late:
            del self._running[key]
        self._lost += len(late)

    def _drop_in_vain(self) -> None:
        """Drop updates that no buffer will admit."""
        waiting = Counter(task.version for task in self._waiting)
        coming = {task.version for task in self._running.values()} | {self._versions[0]}
        kept = [
            task
            for task in self._waiting
            if task.version in self._versions
            and (waiting[task.version] >= self.fewest or task.version in coming)
        ]
        self._dropped += len(self._waiting) - len(kept)
        self._waiting = kept

    def _members(self) -> dict[int, int] | None:
        """Return who makes a buffer now, and stop waiting for more; None if nobody does."""
        ages = {version: place for place, version in enumerate(self._versions)}
        groups = Counter(ages[task.version] for task in self._waiting if task.version in ages)
        picked = choose(groups, self.size, self.fewest)
        if picked is None:
            return None
        members = dict(_first_of_each(self._waiting, ages, picked))
        self._waiting = [task for task in self._waiting if task.node_id not in members]
        return members


def _first_of_each(
    waiting: Iterable[Task], ages: Mapping[str, int], picked: Mapping[int, int]
) -> Iterator[tuple[int, int]]:
    """Yield (node, staleness) of those that came first, as many as were picked of each age."""
    left = dict(picked)
    for task in waiting:
        age = ages.get(task.version, -1)
        if left.get(age, 0) > 0:
            left[age] -= 1
            yield task.node_id, age
