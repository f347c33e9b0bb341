"""The identity of a global model: what every key of a round is bound to.

A coordinator that sends different models to different devices could read from the
sum who had which. Devices hash what they were given; the hash is in the round plan,
and the plan's digest in every key, so two models never meet in one sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from fedcore.crypto import transcript_hash
from fedcore.vectors import Layout


def model_digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return SHA-256 in hex over names, types, shapes and little-endian values."""
    parts: list[bytes] = []
    for entry, array in zip(Layout.of(arrays).entries, arrays.values(), strict=True):
        parts.append(f"{entry.name}|{entry.dtype}|{entry.shape}".encode())
        parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return transcript_hash("fedcore/v1/model", *parts).hex()
