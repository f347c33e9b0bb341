"""Parts of a model: fewer channels of every hidden layer, for devices that cannot train all.

A part of share s has ceil(s w) of the w channels of each hidden layer, the biases of those,
and of the next layer's weights the columns that read them (after Flatten, one for every
position of a channel's map). Inputs and logits stay whole. So a part is itself a chain
of the same kind, and what it trains goes back to where it was taken from.

Which channels, is public:

    nested    always the first: a smaller part lies within a larger one [DDT21, HLATVL21]
    rolling   a window that moves on by one channel a round, and around: after some rounds
              every weight has been trained on every device's data [AGZ+22]

All models here are chains (`fedcore.models.architectures`), so that the arrays alone tell
which channel is read where.

[DDT21]    Diao, Ding and Tarokh, "HeteroFL", ICLR 2021. https://arxiv.org/abs/2010.01264
[HLATVL21] Horvath et al., "FjORD", NeurIPS 2021. https://arxiv.org/abs/2102.13451
[AGZ+22]   Alam et al., "FedRolex", NeurIPS 2022. https://arxiv.org/abs/2212.01548
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigurationError
from fedcore.vectors import Entry, Layout

Structure: TypeAlias = Literal["nested", "rolling"]
Channels: TypeAlias = npt.NDArray[np.intp]
"""Which of a layer's channels, increasing."""
Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """Where a part of a model is.

    Attributes:
        layout: Of the whole model.
        places: Of each array, the rows and (of weights) the columns that belong to the part.
    """

    layout: Layout
    places: tuple[tuple[Channels, ...], ...] = field(repr=False)

    def take(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of the part: copies of what belongs to it."""
        return {
            entry.name: np.ascontiguousarray(arrays[entry.name][np.ix_(*place)])
            for entry, place in zip(self.layout.entries, self.places, strict=True)
        }

    def put(self, arrays: Arrays, trained: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return a copy of `arrays` whose part is what `trained` holds."""
        result = {}
        for entry, place in zip(self.layout.entries, self.places, strict=True):
            whole = np.array(arrays[entry.name])
            whole[np.ix_(*place)] = trained[entry.name]
            result[entry.name] = whole
        return result

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return which coordinates of the flat model belong to the part, shape [dim]."""
        masks = []
        for entry, place in zip(self.layout.entries, self.places, strict=True):
            mask = np.zeros(entry.shape, np.bool_)
            mask[np.ix_(*place)] = True
            masks.append(mask.ravel())
        return np.concatenate(masks)


def channels_of(width: int, share: float, structure: Structure, turn: int) -> Channels:
    """Return which of `width` channels a part of `share` has in a turn.

    Example:
        >>> channels_of(8, 0.5, "nested", 3), channels_of(8, 0.5, "rolling", 6)
        (array([0, 1, 2, 3]), array([0, 1, 6, 7]))
    """
    # The small term undoes the rounding of a product that is whole.
    kept = min(width, max(1, ceil(share * width - 1e-9)))
    start = turn % width if structure == "rolling" else 0
    return np.sort((start + np.arange(kept)) % width)


def part_of(layout: Layout, share: float, structure: Structure, turn: int) -> Part:
    """Return the part of `share` in a turn.

    Args:
        layout: Of a chain's arrays: ``weight`` [out, in, ...] and ``bias`` [out] of each layer.
        share: In (0, 1]; 1 is all of the model.
        structure: Which channels.
        turn: 0 or more; matters if they move.

    Raises:
        ConfigurationError: The arrays are not those of a chain.
    """
    layers = [entry.name.removesuffix(".weight") for entry in layout.entries if _is_weight(entry)]
    rows: dict[str, Channels] = {}
    columns: dict[str, Channels] = {}
    last = layers[-1] if layers else ""
    before: tuple[int, Channels] | None = None
    for entry in layout.entries:
        if not _is_weight(entry):
            continue
        name, (out, into) = entry.name.removesuffix(".weight"), entry.shape[:2]
        columns[name] = np.arange(into) if before is None else _read(entry.name, into, *before)
        whole = name == last
        rows[name] = np.arange(out) if whole else channels_of(out, share, structure, turn)
        before = out, rows[name]
    return Part(layout, tuple(_places(entry, rows, columns) for entry in layout.entries))


def _is_weight(entry: Entry) -> bool:
    return entry.name.endswith(".weight") and len(entry.shape) > 1


def _read(name: str, into: int, width: int, kept: Channels) -> Channels:
    """Return the columns that read the kept ones of `width` channels before."""
    positions, rest = divmod(into, width)
    if rest or not positions:
        msg = (
            f"parts are of chains, in which each layer reads the one before; {name} reads {into} "
            f"values of {width} channels: train the whole model on every device"
        )
        raise ConfigurationError(msg)
    return (kept[:, None] * positions + np.arange(positions)).ravel()


def _places(
    entry: Entry,
    rows: Mapping[str, Channels],
    columns: Mapping[str, Channels],
) -> tuple[Channels, ...]:
    name, _, kind = entry.name.rpartition(".")
    if name not in rows or kind not in {"weight", "bias"}:
        msg = (
            f"parts are of chains of weights and biases, found {entry.name!r:.60}: train the whole "
            "model on every device"
        )
        raise ConfigurationError(msg)
    if kind == "bias":
        return (rows[name],)
    return (rows[name], columns[name], *(np.arange(size) for size in entry.shape[2:]))
