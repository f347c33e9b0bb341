"""Sending one stage's messages and taking replies as they come.

Flower's own `send_and_receive` polls every three seconds, returns all replies as
one list and waits for heartbeats. A protocol of four stages cannot afford that:
`exchange` polls at its own pace, hands over each reply at once, so that uploads are
added and forgotten, has a deadline of its own, and maps an error to a node by the
message that it answers, since a silent node's error comes from the SuperLink.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedcore.engine import Clock

POLL_SECONDS = 0.1


def exchange(
    grid: Grid, messages: Mapping[int, Message], *, seconds: float, clock: Clock
) -> Iterator[tuple[int, Message]]:
    """Yield (key, reply) for each message that is answered in time, errors included.

    Args:
        grid: Carries the messages.
        messages: One per client, by the caller's key.
        seconds: How long to wait for the last reply.
        clock: Tells the time; virtual in tests.
    """
    deadline = clock.now() + seconds
    ids = grid.push_messages(list(messages.values()))
    pending = {message_id for message_id in ids if message_id}
    keys = {message.metadata.message_id: key for key, message in messages.items()}
    while pending:
        found = False
        for reply in grid.pull_messages(set(pending)):
            answered = reply.metadata.reply_to_message_id
            if answered not in pending:
                continue  # a late duplicate
            found = True
            pending.discard(answered)
            if answered in keys:
                yield keys[answered], reply
        if not pending or clock.now() >= deadline:
            return
        if not found:
            clock.sleep(POLL_SECONDS)


def array_bytes(content: RecordDict) -> int:
    """Return how many bytes the values of all arrays take."""
    return sum(
        len(array.data) for arrays in content.array_records.values() for array in arrays.values()
    )


def content_bytes(content: RecordDict) -> int:
    """Return how many bytes of payload the records hold, keys included."""
    total = array_bytes(content)
    for arrays in content.array_records.values():
        total += sum(len(name) for name in arrays)
    for metrics in content.metric_records.values():
        total += sum(len(name) + 8 for name in metrics)
    for config in content.config_records.values():
        total += _config_bytes(config)
    return total


def _config_bytes(config: ConfigRecord) -> int:
    total = 0
    for name, value in config.items():
        items = value if isinstance(value, list) else [value]
        total += len(name) + sum(
            len(item) if isinstance(item, (str, bytes)) else 8 for item in items
        )
    return total
