"""Nanoseconds of processor time for a coordinate, stage by stage, beside copying its bytes.

Two limits are measured in the same run, each a copy (`numpy.copyto`, which is memcpy)
between two arrays that exist already:

    copy        the vector that goes in or, when decoding, comes out
    copy_both   as many bytes as the vector and its encoding have together

A stage has to read the one and write the other. A copy reads and writes each of its bytes,
so `copy` moves at least what a stage must move where the encoding is no longer than the
vector, and `copy_both` twice that. `times` and `times_both` are the stage over each.

All are processor time, the least of several measurements: what else runs on the machine
only ever adds to one. Arrays of one size are reused, so all of them are as near to the
processor as their size allows, the copies' as well as the stages'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Final, TypeAlias

import numpy as np

from experiments.codec_cases import cases
from fedcore.errors import ConfigurationError

Row: TypeAlias = dict[str, str | int | float]

SIZES: Final[Mapping[str, tuple[int, ...]]] = {
    "quick": (100_000, 1_000_000),
    "full": (100_000, 1_000_000, 10_000_000),
}
"""Coordinates."""
_BEST_OF: Final = 7
_SECONDS: Final = 0.002
"""That a measurement takes at least: the clock's own cost is a microsecond."""


def measure_codecs(size: str = "quick") -> list[Row]:
    """Return one row for each operation and length.

    Args:
        size: ``"quick"`` or ``"full"``, which has 10^7 coordinates as well.

    Raises:
        ConfigurationError: There is no such size.
    """
    if size not in SIZES:
        msg = f"size must be one of {', '.join(SIZES)}, got {size!r}"
        raise ConfigurationError(msg)
    rows: list[Row] = []
    for dim in SIZES[size]:
        limit = cache(_copy_seconds)
        for case in cases(dim):
            seconds = best_seconds(case.work)
            copy, copy_both = limit(case.plain), limit(case.plain + case.coded)
            rows.append(
                {
                    "dim": dim,
                    "group": case.group,
                    "stage": case.stage,
                    "operation": case.operation,
                    "nanoseconds": _three_digits(1e9 * seconds / dim),
                    "bytes": _three_digits(case.plain / dim),
                    "coded_bytes": _three_digits(case.coded / dim),
                    "copy": _three_digits(1e9 * copy / dim),
                    "copy_both": _three_digits(1e9 * copy_both / dim),
                    "times": _three_digits(seconds / copy),
                    "times_both": _three_digits(seconds / copy_both),
                }
            )
    return rows


def best_seconds(work: Callable[[], object], best_of: int = _BEST_OF) -> float:
    """Return the least processor time of one call, all threads together.

    Args:
        work: Called once before anything is measured, and in a row where it is short.
        best_of: How many measurements.
    """
    work()
    calls, best = 1, float("inf")
    while best_of:
        started = time.process_time()
        for _ in range(calls):
            work()
        seconds = time.process_time() - started
        if seconds < _SECONDS and calls < 1 << 20:
            calls *= 2
            continue
        best, best_of = min(best, seconds / calls), best_of - 1
    return best


def _copy_seconds(size: int) -> float:
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    return best_seconds(lambda: np.copyto(target, source), 3 * _BEST_OF)


def draw_codecs(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return a PNG: nanoseconds of each operation at the largest length, beside the copy."""
    from experiments.plots_codec import Bar, nanoseconds_by_stage  # noqa: PLC0415 - see there

    largest = max(int(str(row["dim"])) for row in rows)
    bars = [
        Bar(
            group=str(row["group"]),
            name=str(row["stage"]),
            operation=str(row["operation"]),
            nanoseconds=float(str(row["nanoseconds"])),
            copy=float(str(row["copy_both"])),
        )
        for row in rows
        if row["dim"] == largest
    ]
    return nanoseconds_by_stage(bars, largest)


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
