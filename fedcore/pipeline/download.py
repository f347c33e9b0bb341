"""The global model on the wire: how to make the round's model from what a device has.

Beside the update's bytes travels the layout, since a device that never saw the model must
know its arrays. It is bound like everything else: names, shapes and types are in the
model's digest, which is in the round's plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.codec.broadcast import Model, apply_update
from fedcore.errors import PeerProtocolError
from fedcore.pipeline.envelope import RECORD, typed
from fedcore.vectors import Entry, Layout

DOWNLOAD: Final = f"{RECORD}.download"
"""Name of the record that describes an update of the model."""
MODEL: Final = f"{RECORD}.model"
"""Name of the record that carries it."""
UPDATE: Final = "update"
"""Name of the array in it."""
UPDATE_TYPE: Final = "fedcore/model-update/v1"
"""Serialisation type of that array: bytes, one uint8 each."""
LACKING: Final = "lacking"
"""Entry of a device's reply: it cannot make the model from what it was sent."""
_MOST_ARRAYS: Final = 4096
_MOST_ENTRIES: Final = 1 << 31
_DTYPES: Final = frozenset(
    ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
)

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Download:
    """One device's way to the round's model.

    Attributes:
        name: Of the record that the train function expects the model in.
        layout: The model's arrays.
        version: Digest of the model, laid out flat.
        data: As `Broadcast.update_from` wrote it.
    """

    name: str
    layout: Layout
    version: bytes
    data: bytes = field(repr=False)

    def to_fields(self) -> dict[str, str | bytes]:
        """Return the entries of the record `DOWNLOAD`; `data` travels as an array."""
        entries = [[entry.name, list(entry.shape), entry.dtype] for entry in self.layout.entries]
        return {
            "name": self.name,
            "layout": json.dumps(entries, separators=(",", ":")),
            "version": self.version,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, object], data: bytes) -> Download:
        """Return the download that a record and an array hold.

        Raises:
            PeerProtocolError: An entry is missing, malformed or of the wrong type.
        """
        return cls(
            typed(fields, "name", str),
            _parse_layout(typed(fields, "layout", str)),
            typed(fields, "version", bytes),
            data,
        )

    def apply(self, model: Model | None) -> Model:
        """Return the round's model, flat, made from what the device has.

        Raises:
            PeerProtocolError: It cannot be made: the device has another base, or none.
        """
        sizes = tuple(entry.size for entry in self.layout.entries)
        return apply_update(model, self.data, sizes, self.version)


def _parse_layout(text: str) -> Layout:
    try:
        entries = json.loads(text)
        layout = Layout(tuple(_entry(*entry) for entry in entries))
    except (ValueError, TypeError, RecursionError):
        msg = "a layout must list the name, shape and type of each array, found anything else"
        raise PeerProtocolError(msg) from None
    if not 0 < len(layout.entries) <= _MOST_ARRAYS or layout.dim > _MOST_ENTRIES:
        msg = f"a model must have 1..{_MOST_ARRAYS} arrays, found {len(layout.entries)}"
        raise PeerProtocolError(msg)
    return layout


def _entry(name: object, shape: object, dtype: object) -> Entry:
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise TypeError
    if dtype not in _DTYPES or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError
    return Entry(name, tuple(shape), np.dtype(dtype).name)
