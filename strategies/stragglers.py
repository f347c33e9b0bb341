"""Replies that nobody waits for any more, counted and dropped.

A stage ends when enough have answered, or at its deadline. What comes back later would
be added to a sum that is closed, so it never is; how much of it there is says whether a
deadline is too short. A second reply to the same message is dropped too: a grid may hand
over twice what a network has sent twice, and a sum must hold every device once.

Late replies are picked up along the way: each poll of a later stage also asks for the
messages of earlier ones. For a message that is never answered a SuperLink reports an
error when its time is over, so that nothing is asked for forever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from fedcore.telemetry import Traffic
from strategies.wire_bytes import content_bytes


@dataclass(frozen=True, slots=True)
class Dropped:
    """What was dropped.

    Attributes:
        late: Replies whose stage was over.
        duplicates: Replies to messages that had been answered.
        nodes: Whose late replies these were.
        traffic: Bytes of the late ones; what is handed over twice need not be sent twice.
    """

    late: int = 0
    duplicates: int = 0
    nodes: frozenset[int] = frozenset()
    traffic: Traffic = field(default_factory=Traffic)

    def __add__(self, other: Dropped) -> Dropped:
        """Return what was dropped here and there."""
        return Dropped(
            self.late + other.late,
            self.duplicates + other.duplicates,
            self.nodes | other.nodes,
            self.traffic + other.traffic,
        )


@dataclass(slots=True)
class Stragglers:
    """The messages of stages that are over, and what came back of them.

    Attributes:
        waiting: Node ids, by the ids of messages that may still be answered.
    """

    waiting: dict[str, int] = field(default_factory=dict)
    _late: list[int] = field(default_factory=list)
    _duplicates: int = 0
    _bytes: int = 0

    def leave(self, messages: Mapping[str, int]) -> None:
        """Wait no longer for these messages.

        Args:
            messages: Node ids by message id.
        """
        self.waiting |= messages

    def take(self, reply: Message) -> None:
        """Count a reply that no stage is waiting for, and drop it.

        Args:
            reply: A late one, a second one, or an error in place of one.
        """
        node = self.waiting.pop(reply.metadata.reply_to_message_id, None)
        if not reply.has_content():
            return
        if node is None:
            self._duplicates += 1
        else:
            self._late.append(node)
            self._bytes += content_bytes(reply.content)

    def finish(self, grid: Grid) -> Dropped:
        """Take what is there at the end of an attempt; return what was dropped since the last.

        Args:
            grid: Is asked once, and not waited for.
        """
        if self.waiting:
            for reply in grid.pull_messages(set(self.waiting)):
                self.take(reply)
        found = Dropped(
            late=len(self._late),
            duplicates=self._duplicates,
            nodes=frozenset(self._late),
            traffic=Traffic(up_total=self._bytes),
        )
        self._late, self._duplicates, self._bytes = [], 0, 0
        return found
