"""What makes two requests the same: a hash over everything in them.

A reply can get lost after the device has worked. The coordinator then asks again, and
gets the bytes that got lost, provided that it asks for exactly the same: the stage, the
protocol's message, the model, the configuration, every name and every type. Whatever
differs in one bit is another request, and another request is not answered twice.

Not in the hash is what the transport writes on a message: its id, its time, its life.
"""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from fedcore.crypto import transcript_hash


def request_digest(message: Message) -> bytes:
    """Return SHA-256 over the type and the whole content of `message`.

    Records and their entries are sorted by name, since Flower reads them by name; arrays
    are not, since their order is the model's. No array is copied.
    """
    parts = [_text(message.metadata.message_type)]
    for name, record in sorted(message.content.items()):
        parts += [_text(name), _text(type(record).__name__), _count(len(record))]
        parts += _arrays(record) if isinstance(record, ArrayRecord) else _entries(record)
    return transcript_hash("fedcore/v1/request", *parts)


def _arrays(record: ArrayRecord) -> Iterator[bytes]:
    for name, array in record.items():
        yield _text(name)
        yield _text(f"{array.dtype}|{tuple(array.shape)}|{array.stype}")
        yield array.data


def _entries(record: ConfigRecord | MetricRecord) -> Iterator[bytes]:
    for name, value in sorted(record.items()):
        yield _text(name)
        items = value if isinstance(value, list) else [value]
        yield _text(type(value).__name__)
        yield _count(len(items))
        for item in items:
            yield _text(type(item).__name__)
            yield item if isinstance(item, bytes) else _text(repr(item))


def _text(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def _count(value: int) -> bytes:
    return value.to_bytes(8, "little")
