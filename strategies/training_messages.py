"""What a strategy sends to be trained, as a secure round reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import Message, MessageType, RecordDict

from fedcore.errors import ConfigurationError


def is_training(message: Message) -> bool:
    """Return whether the reply to a message would be a single client's update."""
    return message.metadata.message_type.split(".")[0] == MessageType.TRAIN


def common_content(batch: Sequence[Message]) -> RecordDict:
    """Return what all clients are sent.

    Raises:
        ConfigurationError: They are sent different things, or no single set of arrays.
    """
    first, kind = batch[0].content, batch[0].metadata.message_type
    if any(
        message.metadata.message_type != kind
        or (message.content is not first and message.content != first)
        for message in batch[1:]
    ):
        msg = (
            "a secure round sends the same model and configuration to every client, found "
            "messages that differ: what depends on the client would show in the sum"
        )
        raise ConfigurationError(msg)
    if len(first.array_records) != 1:
        found = len(first.array_records)
        msg = f"a training message must hold exactly one ArrayRecord, found {found}"
        raise ConfigurationError(msg)
    return first


def nested(metrics: Mapping[str, float]) -> dict[str, float | list[float]]:
    """Return metrics with ``name[0], name[1], ...`` gathered into lists again."""
    result: dict[str, float | list[float]] = {}
    for key, value in metrics.items():
        name, bracket, _ = key.partition("[")
        if not bracket:
            result[name] = value
            continue
        gathered = result.setdefault(name, [])
        if isinstance(gathered, list):
            gathered.append(value)
    return result
