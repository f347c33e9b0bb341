"""Named numpy arrays as Flower's records, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord


def to_record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Return a record with a copy of `arrays`, in their order."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def to_arrays(record: ArrayRecord) -> dict[str, npt.NDArray[Any]]:
    """Return the record's arrays, in its order; read-only."""
    return {name: array.numpy() for name, array in record.items()}
