"""Public randomness that device and coordinator expand alike.

Supports and rotations must agree bit for bit between a board and a server with
different versions of numpy, so they come from a cipher's key stream and not
from a library's generator.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedcore.crypto import expand, transcript_hash
from fedcore.ring import Ring


def public_words(purpose: str, seed: int, count: int) -> npt.NDArray[np.uint64]:
    """Return `count` uniform 64-bit words that follow from `purpose` and `seed`."""
    key = transcript_hash(f"fedcore/v1/{purpose}", seed.to_bytes(16, "little", signed=True))
    return expand(key, count, Ring(64)).astype(np.uint64, copy=False)
