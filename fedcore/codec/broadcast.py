"""The global model on its way down: what changed since the version that a device has.

The coordinator keeps the model that devices have, the *broadcast* model, beside the one
that its strategy computes, and moves the first towards the second by few bits an entry:

    broadcast_t = broadcast_{t-1} + 2^e Q((target_t - broadcast_{t-1}) / 2^e)

with Q rounding to integers and an exponent e for each layer, from its largest change. What
rounding lost stays in the difference and moves with a later round: error feedback at the
coordinator, of which a device needs to know nothing [TYLZL19].

Steps are powers of two, so every model is a vector of whole multiples of the finest step so
far, and float32 holds each exactly: an entry never takes more than its 24 bits. Sums of
them do not depend on their order. What changed over many rounds is therefore *one* vector
of integers, which takes far fewer bits than the rounds' own vectors one by one (g rounds of
changes to and fro add about log2(g) / 2 bits to an entry, not g times its bits), and every
device ends with the same model, bit for bit, however many rounds it slept.

It starts from the model of zeros, which every device has: what changed since then is the
whole model, for a device whose version is unknown, or forgotten, or so old that this takes
fewer bytes. A version is called by its digest. The model was published round by round: none
of this costs privacy.

[TYLZL19] Tang et al., "DoubleSqueeze", https://arxiv.org/abs/1905.05957
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.codec.lossless import decode_integers, encode_integers
from fedcore.crypto import DIGEST_BYTES, transcript_hash
from fedcore.errors import ConfigurationError, PeerProtocolError

Model: TypeAlias = npt.NDArray[np.float32]
"""Shape [dim]: a model laid out flat."""
Exponents: TypeAlias = npt.NDArray[np.int16]
NO_VERSION: Final = bytes(DIGEST_BYTES)
"""In place of a version: the device has none."""
_WHOLE, _CHANGE = b"w", b"c"
_FIRST_BITS: Final = 6
"""Of the first change, at least: it carries a whole model."""
_MANTISSA: Final = 24
"""Bits of a float32 number."""
_FINEST, _COARSEST = -126, 100
"""Range of exponents; none is subnormal."""
_LARGEST: Final = 2.0**_COARSEST
_SURELY_LESS: Final = 16
"""A change of a fraction of the model as float32 is shorter than the whole as integers."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Send devices what changed, `bits` bits an entry and round before entropy coding.

    Attributes:
        bits: 2..16. A step is a layer's largest change over 2^(bits-1) - 1, or nearly: the
            nearest power of two.
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
    """How one version became the next.

    Attributes:
        base: Version that it changed.
        exponents: Shape [layers]: of the steps' sizes.
        floor: Shape [layers]: with lower exponents, entries of the two would take too many bits.
        data: Integers [dim], encoded.
    """

    base: bytes
    exponents: Exponents = field(repr=False)
    floor: Exponents = field(repr=False)
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The model that devices have, and how to get there; immutable.

    Attributes:
        layers: Sizes of the model's arrays; each has steps of its own.
        bits: Of an entry of one round's change.
        model: Shape [dim].
        version: Its digest.
        origin: Digest of the model of zeros.
        finest: Shape [layers]: the model consists of multiples of 2 to this power.
        steps: The latest changes, oldest first; together no longer than the model.
    """

    layers: tuple[int, ...]
    bits: int
    model: Model = field(repr=False)
    version: bytes
    origin: bytes
    finest: Exponents = field(repr=False)
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(cls, layers: tuple[int, ...], bits: int) -> Broadcast:
        """Start with the model of zeros."""
        zeros = _frozen(np.zeros(sum(layers), np.float32))
        finest = np.full(len(layers), _COARSEST, np.int16)
        return cls(layers, bits, zeros, version_of(zeros), version_of(zeros), finest)

    def towards(self, target: Model) -> Broadcast:
        """Return the next broadcast, as near to `target` [dim] as one change brings it.

        Raises:
            ConfigurationError: `target` holds a number that is not finite, or above 2^100.
        """
        reach = np.maximum(_peaks(target, self.layers), _peaks(self.model, self.layers))
        if not (reach < _LARGEST).all():
            msg = (
                "the global model must consist of finite numbers below 2^100, found others: "
                "training diverged; lower strategy.learning_rate or training.learning_rate"
            )
            raise ConfigurationError(msg)
        # Rounding may take an entry beyond both: one bit is kept free for it.
        floor = np.where(reach > 0, np.frexp(reach)[1] - (_MANTISSA - 1), _FINEST)
        floor = np.maximum(floor, _FINEST).astype(np.int16)
        if (floor > self.finest).any():
            return self._coarser(floor).towards(target)
        bits = max(self.bits, _FIRST_BITS) if self.version == self.origin else self.bits
        change = np.subtract(target, self.model, dtype=np.float32)
        exponents = np.maximum(_exponents(_peaks(change, self.layers), bits), floor)
        integers = np.rint(change / _units(exponents, self.layers)).astype(np.int64)
        if not integers.any():
            return self
        model = _frozen(_add(self.model, exponents, integers, self.layers))
        step = Step(self.version, exponents, floor, encode_integers(integers))
        return replace(
            self,
            model=model,
            version=version_of(model),
            finest=np.minimum(self.finest, exponents),
            steps=_remembered((*self.steps, step), model.nbytes),
        )

    def update_from(self, base: bytes) -> bytes:
        """Return what brings a device from `base` to this version.

        That is what changed, as one change; or the whole model if `base` is not remembered, or
        if that takes fewer bytes, which is looked at where more than one round was missed.
        """
        if base == self.version:
            return _CHANGE
        # A version that came back is known twice: the later one is nearer.
        places = [place for place, step in enumerate(self.steps) if step.base == base]
        if not places:
            return self._whole()
        steps = self.steps[places[-1] :]
        change = _CHANGE + self._merged(steps)
        if len(steps) == 1 or len(change) < self.model.nbytes // _SURELY_LESS:
            return change
        return min(change, self._whole(), key=len)

    def _merged(self, steps: tuple[Step, ...]) -> bytes:
        """Return the one change that `steps` are together."""
        if len(steps) == 1:
            return steps[0].exponents.astype("<i2").tobytes() + steps[0].data
        exponents = np.minimum.reduce([step.exponents for step in steps])
        total = np.zeros(self.model.size, np.int64)
        for step in steps:
            integers = decode_integers(step.data, total.size)
            shifts = step.exponents - exponents
            if shifts.any():
                integers <<= np.repeat(shifts.astype(np.int64), self.layers)
            total += integers
        return _written(exponents, total)

    def _whole(self) -> bytes:
        """Return what changed since the model of zeros."""
        integers = (self.model / _units(self.finest, self.layers)).astype(np.int64)
        return _WHOLE + _written(self.finest, integers)

    def _coarser(self, floor: Exponents) -> Broadcast:
        """Return a model that leaves room for larger entries; all devices get it as a whole."""
        finest = np.maximum(self.finest, floor)
        units = _units(finest, self.layers)
        model = _frozen(np.rint(self.model / units) * units)
        return replace(self, model=model, version=version_of(model), finest=finest, steps=())


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
    if form == _WHOLE or (form == _CHANGE and model is None):
        result = np.zeros(dim, np.float32)
    elif form == _CHANGE and model is not None and model.shape == (dim,):
        result = model.astype(np.float32, copy=False)
    else:
        msg = f"an update must hold a model of {dim} entries or changes to one that the device has"
        raise PeerProtocolError(msg)
    if len(rest):
        result = _add(result, *_read(rest, layers), layers)
    if version_of(result) != version:
        msg = "the updated model must have the announced digest, found another: ask for all of it"
        raise PeerProtocolError(msg)
    return _frozen(result)


def version_of(model: Model) -> bytes:
    """Return the 32 bytes that name a model [dim]."""
    return transcript_hash("fedcore/v1/broadcast", model.astype("<f4", copy=False).tobytes())


def _remembered(steps: tuple[Step, ...], most: int) -> tuple[Step, ...]:
    """Return the latest of `steps` that take at most `most` bytes and fit the last one."""
    start, size = len(steps), 0
    for step in reversed(steps):
        size += len(step.data)
        if size > most or (step.floor > steps[-1].exponents).any():
            break
        start -= 1
    return steps[start:]


def _peaks(x: Model, layers: tuple[int, ...]) -> Model:
    """Return the largest magnitude of each layer, shape [layers]; NaN where one is in it."""
    starts = np.cumsum([0, *layers[:-1]])
    filled = [place for place, size in enumerate(layers) if size]
    peaks = np.zeros(len(layers), np.float32)
    peaks[filled] = np.maximum.reduceat(np.abs(x), starts[filled])
    return peaks


def _exponents(peaks: Model, bits: int) -> Exponents:
    """Return the power of two nearest to the step that rounds `peaks` to `bits` bits."""
    steps = peaks.astype(np.float64) / ((1 << (bits - 1)) - 1)
    exponents = np.full(len(peaks), _COARSEST, np.int16)
    exponents[steps > 0] = np.rint(np.log2(steps[steps > 0]))
    return exponents


def _units(exponents: Exponents, layers: tuple[int, ...]) -> Model:
    """Return the size of an entry's step, shape [dim]; to divide by it is exact."""
    return np.repeat(np.ldexp(np.float32(1), exponents), layers)


def _add(
    model: Model,
    exponents: Exponents,
    integers: npt.NDArray[np.int64],
    layers: tuple[int, ...],
) -> Model:
    """Add a change: sums are exact, whatever the order, where `Broadcast` made it."""
    change = integers.astype(np.float32)
    change *= _units(exponents, layers)
    change += model
    return change


def _written(exponents: Exponents, integers: npt.NDArray[np.int64]) -> bytes:
    return exponents.astype("<i2").tobytes() + encode_integers(integers)


def _read(data: memoryview, layers: tuple[int, ...]) -> tuple[Exponents, npt.NDArray[np.int64]]:
    head = 2 * len(layers)
    if len(data) < head:
        msg = f"a change must hold {len(layers)} exponents and integers, found {len(data)} bytes"
        raise PeerProtocolError(msg)
    exponents = np.frombuffer(data[:head], "<i2").astype(np.int16)
    if exponents.size and not _FINEST <= exponents.min() <= exponents.max() <= _COARSEST:
        msg = f"the exponents of a change must be in {_FINEST}..{_COARSEST}, found another"
        raise PeerProtocolError(msg)
    integers = decode_integers(data[head:], sum(layers))
    if int(np.abs(integers).max(initial=0)) > 2 << _MANTISSA:
        msg = f"an entry of a change must be at most 2^{_MANTISSA + 1}, found a larger one"
        raise PeerProtocolError(msg)
    return exponents, integers


def _frozen(model: Model) -> Model:
    model.setflags(write=False)
    return model
