"""How many bytes a message carries, counted from what it holds."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict


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
