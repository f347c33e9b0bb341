"""The global model on its way down: what changed since the version that a device has.

The coordinator keeps the model that devices have, the *broadcast* model, beside the one
that its strategy computes, and sends the difference between the two, rounded to few bits:

    delta_t = Q(target_t - broadcast_{t-1}),      broadcast_t = broadcast_{t-1} + delta_t

What rounding lost stays in the difference and goes out with a later delta: error feedback
at the coordinator, of which a device needs to know nothing [TYLZL19]. Every device adds
the same float32 numbers in the same order, so all hold the broadcast model bit for bit.

It starts from the model of zeros, which every device has. A version is called by its
digest. A device that missed some rounds gets the deltas
since its version, or the whole model where that takes fewer bytes, or where its version is
not remembered. The model was published round by round: none of this costs privacy.

[TYLZL19] Tang et al., "DoubleSqueeze", https://arxiv.org/abs/1905.05957
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.codec.lossless import decode_integers, encode_integers
from fedcore.crypto import DIGEST_BYTES, transcript_hash
from fedcore.errors import ConfigurationError, PeerProtocolError

Model: TypeAlias = npt.NDArray[np.float32]
"""Shape [dim]: a model laid out flat."""
NO_VERSION: Final = bytes(DIGEST_BYTES)
"""In place of a version: the device has none."""
_COUNT: Final = struct.Struct("<I")
_WHOLE, _CHAIN = b"w", b"c"
_FIRST_BITS: Final = 8
"""Of the first delta, at least: it carries a whole model."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Send devices what changed, `bits` bits an entry before entropy coding.

    Attributes:
        bits: 2..16. A step is a layer's largest change over 2^(bits-1) - 1.
    """

    bits: int = 8
    kind: Literal["delta"] = "delta"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            msg = f"downlink.bits must be in 2..16, got {self.bits}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Full:
    """Send devices the whole model as float32."""

    kind: Literal["full"] = "full"


@dataclass(frozen=True, slots=True)
class Step:
    """One delta.

    Attributes:
        base: Version that it changes.
        version: What that makes of it.
        data: Scales of the layers, and the integers.
    """

    base: bytes
    version: bytes
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The model that devices have, and how to get there; immutable.

    Attributes:
        layers: Sizes of the model's arrays; each has a scale of its own.
        bits: Of an entry of a delta.
        model: Shape [dim].
        version: Its digest.
        origin: Digest of the model of zeros.
        steps: The latest deltas, oldest first; together no longer than the model.
    """

    layers: tuple[int, ...]
    bits: int
    model: Model = field(repr=False)
    version: bytes
    origin: bytes
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, layers: tuple[int, ...], bits: int) -> Broadcast:
        """Start with the model of zeros."""
        zeros = np.zeros(sum(layers), np.float32)
        zeros.setflags(write=False)
        return cls(layers, bits, zeros, version_of(zeros), version_of(zeros))

    def towards(self, target: Model) -> Broadcast:
        """Return the next broadcast, as near to `target` [dim] as one delta brings it.

        Raises:
            ConfigurationError: `target` holds a number that is not finite.
        """
        change = np.subtract(target, self.model, dtype=np.float32)
        if not np.isfinite(change).all():
            msg = (
                "the global model must consist of finite numbers, found others: training "
                "diverged; lower strategy.learning_rate or training.learning_rate"
            )
            raise ConfigurationError(msg)
        first = self.version == self.origin
        bits = max(self.bits, _FIRST_BITS) if first else self.bits
        scales, integers = _quantise(change, self.layers, bits)
        if not integers.any():
            return self
        data = scales.astype("<f4").tobytes() + encode_integers(integers)
        model = _add(self.model, scales, integers, self.layers)
        step = Step(self.version, version_of(model), data)
        whole = model.nbytes
        steps = [*self.steps, step]
        while sum(len(each.data) for each in steps) > whole:
            steps.pop(0)
        return replace(self, model=model, version=step.version, steps=tuple(steps))

    def update_from(self, base: bytes) -> bytes:
        """Return what brings a device from `base` to this version: the fewest bytes that do."""
        if base == self.version:
            return _CHAIN
        places = [place for place, step in enumerate(self.steps) if step.base == base]
        if places:
            # A version that came back is known twice: the later one is nearer.
            chain = b"".join(
                _COUNT.pack(len(step.data)) + step.data for step in self.steps[places[-1] :]
            )
            if len(chain) < 3 * self.model.nbytes // 4 or len(chain) < len(self._whole()):
                return _CHAIN + chain
        return self._whole()

    def _whole(self) -> bytes:
        return _WHOLE + _squeeze(self.model)


def apply_update(
    model: Model | None, data: bytes | memoryview, layers: tuple[int, ...], version: bytes
) -> Model:
    """Return the model of `version`, on a device.

    Args:
        model: What the device has, shape [dim]; None for the model of zeros.
        data: As `Broadcast.update_from` wrote it for that.
        layers: Sizes of the model's arrays.
        version: Digest of what must come out.

    Raises:
        PeerProtocolError: `data` is malformed, or leads to another version: the device
            has another base than the coordinator thought, or a damaged one.
    """
    view, dim = memoryview(data), sum(layers)
    form, rest = bytes(view[:1]), view[1:]
    if form == _WHOLE:
        result = _unsqueeze(rest, dim)
    elif form == _CHAIN and (model is None or model.shape == (dim,)):
        result = np.zeros(dim, np.float32) if model is None else model.astype(np.float32)
        while len(rest):
            scales, integers, rest = _read_step(rest, layers)
            result = _add(result, scales, integers, layers)
    else:
        msg = f"an update must hold a model of {dim} entries or changes to one that the device has"
        raise PeerProtocolError(msg)
    if version_of(result) != version:
        msg = "the updated model must have the announced digest, found another: ask for all of it"
        raise PeerProtocolError(msg)
    result.setflags(write=False)
    return result


def version_of(model: Model) -> bytes:
    """Return the 32 bytes that name a model [dim]."""
    return transcript_hash("fedcore/v1/broadcast", model.astype("<f4", copy=False).tobytes())


def _quantise(
    change: Model, layers: tuple[int, ...], bits: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Round a change to the nearest multiples of its layers' steps."""
    starts = np.cumsum([0, *layers[:-1]])
    filled = [place for place, size in enumerate(layers) if size]
    peaks = np.zeros(len(layers), np.float32)
    peaks[filled] = np.maximum.reduceat(np.abs(change), starts[filled])
    scales = (peaks / np.float32((1 << (bits - 1)) - 1)).astype(np.float32)
    units = np.repeat(np.where(scales > 0, scales, np.float32(1)), layers)
    return scales, np.rint(change / units).astype(np.int64)


def _add(
    model: Model,
    scales: npt.NDArray[np.float32],
    integers: npt.NDArray[np.int64],
    layers: tuple[int, ...],
) -> Model:
    """Add a delta in float32, one multiplication and one addition an entry: exact everywhere."""
    change = np.repeat(scales, layers)
    change *= integers.astype(np.float32)
    change += model
    return change


def _read_step(
    data: memoryview, layers: tuple[int, ...]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], memoryview]:
    if len(data) < _COUNT.size:
        msg = "a chain of deltas ended too early"
        raise PeerProtocolError(msg)
    (size,) = _COUNT.unpack_from(data)
    step, rest = data[_COUNT.size : _COUNT.size + size], data[_COUNT.size + size :]
    head = 4 * len(layers)
    if len(step) != size or size < head:
        msg = f"a delta must hold {len(layers)} scales and its integers, found {len(step)} bytes"
        raise PeerProtocolError(msg)
    scales = np.frombuffer(step[:head], "<f4").astype(np.float32)
    if not isfinite(float(np.abs(scales).max(initial=0.0))):
        msg = "the scales of a delta must be finite"
        raise PeerProtocolError(msg)
    integers = decode_integers(step[head:], sum(layers))
    if int(np.abs(integers).max(initial=0)) >= 1 << 15:
        msg = "an entry of a delta must fit 16 bits"
        raise PeerProtocolError(msg)
    return scales, integers, rest


def _squeeze(model: Model) -> bytes:
    """Return float32 numbers byte plane by byte plane: exponents of a layer are alike."""
    planes = model.astype("<f4", copy=False).view(np.uint8).reshape(-1, 4).T
    return zlib.compress(np.ascontiguousarray(planes).tobytes(), 6)


def _unsqueeze(data: memoryview, dim: int) -> Model:
    reader = zlib.decompressobj()
    try:
        planes = reader.decompress(data, 4 * dim)
        surplus = reader.decompress(reader.unconsumed_tail, 1)
    except zlib.error as error:
        msg = "a model must be a compressed block of float32 numbers, found anything else"
        raise PeerProtocolError(msg) from error
    if len(planes) != 4 * dim or surplus or not reader.eof or reader.unused_data:
        msg = f"a model of {dim} float32 numbers takes {4 * dim} bytes, found {len(planes)} or more"
        raise PeerProtocolError(msg)
    values = np.frombuffer(planes, np.uint8).reshape(4, dim).T
    return np.ascontiguousarray(values).view("<f4").reshape(dim).astype(np.float32)
