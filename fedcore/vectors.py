"""A model as one flat vector, and the way back.

Every stage after training works on a single real vector [dim]. A `Layout`
remembers which named arrays it was made of; it is public, since it follows
from the model's architecture alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigurationError

RealVector: TypeAlias = npt.NDArray[np.floating[Any]]
"""Shape [dim], float32 or float64."""
IntegerVector: TypeAlias = npt.NDArray[np.int64]
"""Shape [dim], signed integers."""
RingVector: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
"""Shape [dim], elements of Z/2^b in the narrowest unsigned dtype."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One named array of a model.

    Attributes:
        name: As in the model's state dict.
        shape: Of the array; () for a scalar.
        dtype: numpy's name of the element type, e.g. ``"float32"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The order, shapes and types in which named arrays are laid out flat."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Layout:
        """Return the layout of `arrays`, in the order of the mapping."""
        return cls(
            tuple(
                Entry(name, tuple(array.shape), array.dtype.name) for name, array in arrays.items()
            )
        )

    @property
    def dim(self) -> int:
        """Length of the flat vector."""
        return sum(entry.size for entry in self.entries)

    def flatten(self, arrays: Mapping[str, npt.NDArray[Any]]) -> RealVector:
        """Concatenate `arrays` into one float32 vector [dim].

        Raises:
            ConfigurationError: Names or shapes differ from this layout.
        """
        found = Layout.of(arrays)
        if [(e.name, e.shape) for e in found.entries] != [(e.name, e.shape) for e in self.entries]:
            msg = (
                f"expected arrays {_describe(self)}, found {_describe(found)}: "
                "client and server must use the same model"
            )
            raise ConfigurationError(msg)
        if not self.entries:
            return np.zeros(0, np.float32)
        return np.concatenate(
            [np.asarray(array, dtype=np.float32).ravel() for array in arrays.values()]
        )

    def unflatten(self, vector: RealVector) -> dict[str, npt.NDArray[Any]]:
        """Split a vector [dim] into named arrays of the recorded shapes and types.

        Integer arrays (counters of normalisation layers) are rounded.

        Raises:
            ConfigurationError: `vector` does not have `dim` entries.
        """
        if vector.shape != (self.dim,):
            msg = f"expected a vector of shape ({self.dim},), found {vector.shape}"
            raise ConfigurationError(msg)
        arrays: dict[str, npt.NDArray[Any]] = {}
        offset = 0
        for entry in self.entries:
            part = vector[offset : offset + entry.size].reshape(entry.shape)
            dtype = np.dtype(entry.dtype)
            arrays[entry.name] = (np.rint(part) if dtype.kind in "iub" else part).astype(dtype)
            offset += entry.size
        return arrays


def _describe(layout: Layout) -> str:
    shown = ", ".join(f"{e.name}{list(e.shape)}" for e in layout.entries[:6])
    rest = len(layout.entries) - 6
    return f"[{shown}{f', and {rest} more' if rest > 0 else ''}]"
