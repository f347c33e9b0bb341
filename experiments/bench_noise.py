"""Nanoseconds of one core for a sample of noise, and how far a sample is from its distribution.

    table        AES-256-CTR and a table of cumulative probabilities (fedcore.privacy.samplers)
    rint(normal) numpy's PCG64, rounded: for comparison only. Its generator is predictable,
                 and the low bits of a float carry no proof [Mir12].

`distance` bounds the statistical distance of one sample of the table; `charge` is what that
adds to delta in `CHARGED` samples at epsilon 10, with `sampling_delta`.

[Mir12] Mironov, On significance of the least significant bits for differential privacy,
        CCS 2012.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Final, TypeAlias

import numpy as np

from fedcore.crypto import SystemEntropy
from fedcore.privacy import (
    IntegerTable,
    discrete_gaussian_table,
    sample,
    sampling_delta,
    skellam_table,
)
from fedcore.privacy.samplers import SEED_BYTES

Row: TypeAlias = dict[str, str | int | float]

SIGMAS: Final = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
SAMPLES: Final = 1_000_000
CHARGED: Final = 1000 * 100 * 10**6
"""Rounds times clients times coordinates of a large run."""


def measure_noise(repetitions: int = 5) -> list[Row]:
    """Return one row for each distribution and standard deviation; the median counts.

    Args:
        repetitions: How often each is measured.
    """
    rows: list[Row] = []
    for sigma in SIGMAS:
        tables = {
            "discrete gaussian": discrete_gaussian_table(sigma),
            "skellam": skellam_table(sigma**2),
        }
        rows += [
            {
                "noise": f"{name}, table",
                "sigma": sigma,
                "nanoseconds": _nanoseconds(partial(_sample, table), repetitions),
                "distance": table.distance,
                "charge": sampling_delta(10.0, distance=table.distance, samples=CHARGED),
            }
            for name, table in tables.items()
        ]
        rng = np.random.default_rng(0)
        rows.append(
            {
                "noise": "rint(normal), no proof",
                "sigma": sigma,
                "nanoseconds": _nanoseconds(partial(_rounded, rng, sigma), repetitions),
                "distance": "unknown",
                "charge": "unknown",
            }
        )
    return rows


def _sample(table: IntegerTable) -> None:
    sample(table, SystemEntropy().draw("noise", SEED_BYTES), SAMPLES)


def _rounded(rng: np.random.Generator, sigma: float) -> None:
    np.rint(rng.normal(scale=sigma, size=SAMPLES)).astype(np.int64)


def _nanoseconds(work: Callable[[], None], repetitions: int) -> float:
    """Return the median processor time of a sample; what else runs here does not count."""
    work()
    seconds = []
    for _ in range(repetitions):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return round(1e9 * median(seconds) / SAMPLES, 2)
