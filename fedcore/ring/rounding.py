"""Fixed point with unbiased rounding."""

from __future__ import annotations

import numpy as np

from fedcore.vectors import IntegerVector, RealVector


def round_stochastically(x: RealVector, rng: np.random.Generator) -> IntegerVector:
    """Round each entry to a neighbouring integer so that the mean is `x`.

    Args:
        x: Shape [dim], absolute values below 2^62.
        rng: Source of the coin flips; their secrecy protects nobody.
    """
    wide = x.astype(np.float64, copy=False)
    whole = np.floor(wide)
    # The coin meets the fraction alone: x + coin would round, and move large whole numbers.
    fraction = wide - whole
    fraction += rng.random(x.shape)
    whole += fraction >= 1
    return whole.astype(np.int64)
