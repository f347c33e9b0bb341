"""How old the updates of an asynchronous run were, in the words of its files.

`metrics.jsonl` has them under `buffer` for every buffer, `summary.json` for the whole run;
in a run of rounds both are null.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedcore.telemetry import BufferReport


def buffer_words(buffer: BufferReport | None) -> dict[str, float] | None:
    """Return what a line of `metrics.jsonl` says of its buffer; None in a round.

    Example:
        >>> words = buffer_words(BufferReport(staleness=(0, 0, 1, 3), running=8, waiting=2))
        >>> words["staleness_mean"], words["staleness_max"], words["running"]
        (1.0, 3, 8)
    """
    if buffer is None:
        return None
    return {
        **_ages(buffer.staleness),
        "running": buffer.running,
        "waiting": buffer.waiting,
        "dropped": buffer.dropped,
    }


def run_words(buffers: Sequence[BufferReport]) -> dict[str, float] | None:
    """Return what `summary.json` says of all buffers; None for a run of rounds."""
    if not buffers:
        return None
    ages = [age for buffer in buffers for age in buffer.staleness]
    return {**_ages(ages), "dropped": sum(buffer.dropped for buffer in buffers)}


def _ages(ages: Sequence[int]) -> dict[str, float]:
    """Return mean and maximum; 0 for nobody."""
    return {
        "staleness_mean": round(sum(ages) / len(ages), 4) if ages else 0.0,
        "staleness_max": max(ages, default=0),
    }
