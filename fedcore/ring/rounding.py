"""Fixed point with unbiased rounding."""

from __future__ import annotations

from typing import Final

import numpy as np

from fedcore.vectors import IntegerVector, RealVector

_BLOCK: Final = 1 << 14
"""Entries handled at once, in the cache; which coin meets which entry does not depend on it."""


def round_stochastically(x: RealVector, rng: np.random.Generator) -> IntegerVector:
    """Round each entry to a neighbouring integer so that the mean is `x`.

    Args:
        x: Shape [dim], absolute values below 2^62.
        rng: Source of the coin flips, one double for each entry; their secrecy protects nobody.
    """
    rounded = np.empty(len(x), np.int64)
    for start in range(0, len(x), _BLOCK):
        part = x[start : start + _BLOCK].astype(np.float64, copy=False)
        whole = np.floor(part)
        # The coin meets the fraction alone: x + coin would round, and move large whole numbers.
        fraction = part - whole
        fraction += rng.random(len(part))
        whole += fraction >= 1
        rounded[start : start + _BLOCK] = whole
    return rounded
