"""Sending one stage's messages and taking replies as they come.

Flower's own `send_and_receive` polls every three seconds, returns all replies as
one list and waits for heartbeats. A protocol of four stages cannot afford that:
`exchange` polls at its own pace, hands over each reply at once, so that uploads are
added and forgotten, has a deadline of its own, and maps an error to a node by the
message that it answers, since a silent node's error comes from the SuperLink. It ends
early when its caller has enough; what comes later is dropped (`strategies.stragglers`).

A grid over a network hands over all replies that have arrived as one list. So that not
all vectors of a cohort are ever held at once, it is asked for a few messages at a time;
an engine that runs devices on demand hands over one reply after the other by itself.

A message or a reply that got lost on the way is worth a second try: the node is asked
again, with the same content. A device that has answered sends the same bytes again
(`clients.requests`), so that asking twice is never more than asking once. An error of
the node's own program is final: it would fail again, or must not be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from flwr.app import Message
from flwr.serverapp import Grid

from fedcore.engine import Clock
from fedcore.engine.flower_private import ErrorCode
from strategies.stragglers import Stragglers

POLL_SECONDS = 0.1
LONGEST_POLL_SECONDS = 1.0
_OF_THE_WAIT = 0.05
"""A network is asked less often the longer it takes: each question costs a SuperLink as much as
part of an answer does, and a reply that took a minute may be found a second late."""
AT_ONCE = 16
"""Replies that are taken from a network in one go, and so held at a time, at most."""
RETRY_AT_ONCE = (0.0,)
"""One more try, without a pause: for engines in which a node is there or is not."""
RETRY_WITH_PATIENCE = (0.0, 5.0, 15.0, 45.0)
"""For real networks: a SuperNode that lost its link is back within a minute, or is not."""
LOST_ON_THE_WAY = frozenset(
    (
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
    )
)
"""Errors that a SuperLink reports in place of a node; asking again may help."""


def _never() -> bool:
    return False


def exchange(
    grid: Grid,
    messages: Mapping[int, Message],
    *,
    seconds: float,
    clock: Clock,
    retry_after: Sequence[float] = (),
    sent: Callable[[Message], None] = lambda _: None,
    enough: Callable[[], bool] = _never,
    grace: bool = False,
    stragglers: Stragglers | None = None,
) -> Iterator[tuple[int, Message]]:
    """Yield (key, reply) for each message that is answered in time, errors included.

    Args:
        grid: Carries the messages.
        messages: One per client, by the caller's key.
        seconds: How long to wait for the last reply.
        clock: Tells the time; virtual in tests.
        retry_after: Seconds to wait before a client whose message or reply got lost is
            asked again, for each time that it is. An error that leaves no time for that is
            yielded at once, as every other.
        sent: Called with every message that is sent, those that repeat one included.
        enough: Whether no more is needed; asked before waiting, and after each reply if the
            next one would only be made on demand.
        grace: Whether, once there is enough, the others get as much time again as that took.
        stragglers: Takes over what is not answered at the end, and all replies that nobody
            waits for.
    """
    late = Stragglers() if stragglers is None else stragglers
    asking = _Asking(grid, messages, clock, clock.now() + seconds, retry_after, sent)
    try:
        asking.push(dict(messages))
        while asking.pending or asking.waiting:
            found = False
            for lazy, reply in asking.replies(late):
                key = asking.pending.pop(reply.metadata.reply_to_message_id, None)
                if key is None:
                    late.take(reply)
                    continue
                found = True
                if not asking.postpone(key, reply):
                    yield key, reply
                if lazy and not grace and enough():
                    return
            found |= asking.repeat()
            if not (asking.pending or asking.waiting) or clock.now() >= asking.deadline:
                return
            if enough():
                if not grace:
                    return
                grace, asking.deadline = False, asking.time_again()
                enough = _never
            if not found:
                clock.sleep(asking.pause())
    finally:
        late.leave(
            {
                message_id: messages[key].metadata.dst_node_id
                for message_id, key in asking.pending.items()
            }
        )


@dataclass(slots=True)
class _Asking:
    """Which messages are out, and who is to be asked again when."""

    grid: Grid
    messages: Mapping[int, Message]
    clock: Clock
    deadline: float
    retry_after: Sequence[float]
    sent: Callable[[Message], None]
    pending: dict[str, int] = field(default_factory=dict)
    waiting: dict[int, float] = field(default_factory=dict)
    tries: dict[int, int] = field(default_factory=dict)
    eager: bool = False
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock.now()

    def time_again(self) -> float:
        """Return the deadline if waiting takes as long again as it did up to now."""
        return min(self.deadline, 2 * self.clock.now() - self.began)

    def pause(self) -> float:
        """Return how long to wait before the next look; nothing that is due is passed."""
        now = self.clock.now()
        waited = now - self.began if self.eager else 0.0
        seconds = min(_OF_THE_WAIT * waited, LONGEST_POLL_SECONDS)
        due = min([self.deadline, *self.waiting.values()])
        return max(POLL_SECONDS, min(seconds, due - now))

    def replies(self, late: Stragglers) -> Iterator[tuple[bool, Message]]:
        """Yield what has come, and whether more of it is made only on demand."""
        if not self.pending:
            return
        wanted = iter([*self.pending, *late.waiting])
        while batch := set(islice(wanted, AT_ONCE if self.eager else None)):
            replies = self.grid.pull_messages(batch)
            self.eager = not isinstance(replies, Iterator)
            for reply in replies:
                yield not self.eager, reply

    def push(self, batch: Mapping[int, Message]) -> None:
        """Send messages; what the grid does not take is not waited for."""
        accepted = {key for key in self.grid.push_messages(list(batch.values())) if key}
        for key, message in batch.items():
            self.sent(message)
            if message.metadata.message_id in accepted:
                self.pending[message.metadata.message_id] = key

    def postpone(self, key: int, reply: Message) -> bool:
        """Decide whether the client will be asked again, and when."""
        tried = self.tries.get(key, 0)
        if not reply.has_error() or reply.error.code not in LOST_ON_THE_WAY:
            return False
        if tried >= len(self.retry_after):
            return False
        due = self.clock.now() + self.retry_after[tried]
        if due >= self.deadline:
            return False
        self.tries[key], self.waiting[key] = tried + 1, due
        return True

    def repeat(self) -> bool:
        """Ask again whoever it is time for; tell whether there was anybody."""
        now = self.clock.now()
        due = [key for key, at in self.waiting.items() if at <= now]
        for key in due:
            del self.waiting[key]
        if due and now < self.deadline:
            self.push({key: _again(self.messages[key], self.deadline - now) for key in due})
        return bool(due)


def _again(message: Message, seconds: float) -> Message:
    """Return the same request in a message of its own, which lives for `seconds`."""
    asked = message.metadata
    return Message(
        message.content,
        asked.dst_node_id,
        asked.message_type,
        group_id=asked.group_id,
        ttl=seconds,
    )
