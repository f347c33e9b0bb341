"""What the suite of codecs times: every stage of an update's way up and of a model's way down.

Each case is one call as a round makes it. What follows from a public seed (supports,
buckets, signs) is derived anew in every call that is called `derive`, and kept in all
others, as device and coordinator keep it during a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

import numpy as np
import numpy.typing as npt

from fedcore.codec import (
    Bound,
    Broadcast,
    Clip,
    Compressor,
    Discretize,
    Embed,
    Hadamard,
    Integers,
    PublicTopK,
    Qsgd,
    Quantize,
    RandomK,
    Reals,
    Sketch,
    SparseTernary,
    Stage,
    Support,
    TopK,
    apply_update,
)
from fedcore.codec.lossless import decode_integers, encode_integers
from fedcore.codec.rice import best_parameter, rice_decode, rice_encode
from fedcore.codec.rotate import rotate
from fedcore.codec.sketch import assignment
from fedcore.codec.sparsify import support
from fedcore.crypto import Entropy, ReplayedEntropy
from fedcore.pipeline import LocalUpdate, Modular, NoSecAgg, RoundPlan, RunPlan, Uniform
from fedcore.pipeline.bound import bind_round
from fedcore.pipeline.upload import make_upload
from fedcore.privacy import DistributedGaussian
from fedcore.privacy.mechanisms import DiscreteGaussianNoise, SkellamNoise
from fedcore.ring import Ring, pack, unpack
from fedcore.vectors import RealVector

FRACTION: Final = 0.1
"""Of the coordinates that a sparse stage sends."""
DENSITIES: Final = (0.01, 0.1, 0.5, 1.0)
"""Of the integer vectors that are coded without loss."""
WIDTHS: Final = (8, 12, 16, 20)
_CLIENTS: Final = 100
_LAYERS: Final = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One operation of one stage.

    Attributes:
        group: The family that the stage belongs to.
        stage: Its name, with its parameters.
        operation: ``derive``, ``encode`` or ``decode``, as device and coordinator call them.
        plain: Bytes of the vector that goes in or, when decoding, comes out.
        coded: Bytes of its encoding, on the other side; 0 for what has no other side.
        work: The call.
    """

    group: str
    stage: str
    operation: str
    plain: int
    coded: int
    work: Callable[[], object]


def cases(dim: int) -> Iterator[Case]:
    """Return all cases for vectors of `dim` coordinates, one after another.

    Example:
        >>> {case.group for case in cases(64)} >= {"stage", "packing", "lossless", "downlink"}
        True
    """
    rng = np.random.default_rng(0)
    x = rng.laplace(scale=0.01, size=dim).astype(np.float32)
    entropy = ReplayedEntropy(b"bench_codec")
    yield from _real_stages(x, entropy)
    yield from _integer_stages(x, entropy)
    yield from _packing(dim, rng)
    yield from _lossless(dim, rng)
    yield from _compressors(x, entropy)
    yield from _downlink(x, rng)
    yield from _uploads(x, entropy)


def _real_stages(x: RealVector, entropy: Entropy) -> Iterator[Case]:
    dim = len(x)
    kept, fresh = max(1, round(FRACTION * dim)), count(1)
    yield Case("stage", "random_k", "derive", 8 * dim, 0, lambda: support(next(fresh), dim, kept))
    yield from _stage("random_k", RandomK(FRACTION), x, entropy)
    yield Case("stage", "sketch", "derive", 8 * dim, 0, lambda: assignment(next(fresh), dim, kept))
    yield from _stage("sketch", Sketch(FRACTION), x, entropy)
    wide = x.astype(np.float64)
    choose = partial(PublicTopK(FRACTION).choose, wide, dim)
    yield Case("stage", "public_top_k", "derive", 8 * dim, 0, lambda: choose(next(fresh)))
    yield from _stage("public_top_k", Support(choose(0)), x, entropy)
    yield from _stage("clip", Clip(1.0), x, entropy, decode=False)
    size, turn = 8 * dim, lambda: rotate(wide, next(fresh))
    yield Case("stage", "hadamard", "derive + encode", size, size, turn)
    yield from _stage("hadamard", Hadamard(), x, entropy)


def _integer_stages(x: RealVector, entropy: Entropy) -> Iterator[Case]:
    dim, norm = len(x), float(np.linalg.norm(x.astype(np.float64)))
    bounded = Reals(dim, norm)
    yield from _stage("uniform, 16 bits", Quantize(16), x, entropy, source=bounded)
    scale = 100 * dim**0.5 / norm
    longest = (scale * norm) + dim**0.5  # never redrawn, as with the calibration's bound
    modular = Discretize(scale, longest, spread=1.0)
    yield from _stage("modular", modular, x, entropy, source=bounded)
    integers = Integers(dim, 1000)
    values = np.rint(scale * x).astype(np.int64).clip(-1000, 1000)
    for name, noise in (
        ("discrete gaussian", DiscreteGaussianNoise(10.0, _CLIENTS)),
        ("skellam", SkellamNoise(100.0, _CLIENTS)),
    ):
        yield from _stage(name, noise, values, entropy, source=integers, decode=False)
    embed = Embed(20, _CLIENTS)
    yield from _stage("embed, 20 bits", embed, values, entropy, source=integers)


def _stage(
    name: str,
    stage: Stage,
    x: npt.NDArray[np.generic],
    entropy: Entropy,
    *,
    source: Reals | Integers | None = None,
    decode: bool = True,
) -> Iterator[Case]:
    """Return both halves of a stage that is bound to `source`."""
    bound: Bound = stage.bind(Reals(len(x)) if source is None else source)
    encoded = bound.encode(x, entropy)
    coded = encoded.nbytes
    yield Case("stage", name, "encode", x.nbytes, coded, lambda: bound.encode(x, entropy))
    if decode:
        plain = bound.decode(encoded).nbytes
        yield Case("stage", name, "decode", plain, coded, lambda: bound.decode(encoded))


def _packing(dim: int, rng: np.random.Generator) -> Iterator[Case]:
    for bits in WIDTHS:
        ring = Ring(bits)
        x = rng.integers(0, 1 << bits, dim, np.uint64).astype(ring.dtype)
        data = pack(x, ring)
        encode, decode = partial(pack, x, ring), partial(unpack, data, dim, ring)
        yield Case("packing", f"{bits} bits", "encode", x.nbytes, len(data), encode)
        yield Case("packing", f"{bits} bits", "decode", x.nbytes, len(data), decode)


def _lossless(dim: int, rng: np.random.Generator) -> Iterator[Case]:
    for density in DENSITIES:
        x = np.where(rng.random(dim) < density, np.rint(rng.laplace(scale=3, size=dim)), 0)
        name, integers = f"{density:.0%} nonzero", x.astype(np.int64)
        data = encode_integers(integers)
        encode, decode = partial(encode_integers, integers), partial(decode_integers, data, dim)
        yield Case("lossless", name, "encode", 8 * dim, len(data), encode)
        yield Case("lossless", name, "decode", 8 * dim, len(data), decode)
    gaps = rng.geometric(0.05, dim).astype(np.uint64) - 1
    bits = best_parameter(gaps)
    data = rice_encode(gaps, bits)
    encode = partial(rice_encode, gaps, bits)
    decode = partial(rice_decode, data, dim, bits, 1 << 40)
    yield Case("lossless", "golomb_rice", "encode", 8 * dim, len(data), encode)
    yield Case("lossless", "golomb_rice", "decode", 8 * dim, len(data), decode)


def _compressors(x: RealVector, entropy: Entropy) -> Iterator[Case]:
    wide = x.astype(np.float64)
    listed: dict[str, Compressor] = {
        "top_k, 1 %": TopK(0.01),
        "top_k, 10 %": TopK(0.1),
        "sparse_ternary, 1 %": SparseTernary(0.01),
        "qsgd, 1 level": Qsgd(1),
        "qsgd, 4 levels": Qsgd(4),
    }
    for name, compressor in listed.items():
        data = compressor.compress(wide, entropy)
        encode = partial(compressor.compress, wide, entropy)
        yield Case("compressor", name, "encode", 8 * len(x), len(data), encode)
        decode = partial(compressor.decompress, data, len(x))
        yield Case("compressor", name, "decode", 8 * len(x), len(data), decode)


def _downlink(x: RealVector, rng: np.random.Generator) -> Iterator[Case]:
    size = len(x) // _LAYERS
    layers = (*[size] * (_LAYERS - 1), len(x) - size * (_LAYERS - 1))
    model = np.asarray(rng.normal(0, 0.1, len(x)), np.float32)
    for bits in (4, 8):
        before = Broadcast.of(layers, bits).towards(model)
        target = np.add(before.model, x, dtype=np.float32)
        after = before.towards(target)
        data = after.update_from(before.version)
        name, plain, coded = f"delta, {bits} bits", 4 * len(x), len(data)
        encode = partial(_next_update, before, target)
        yield Case("downlink", name, "encode", plain, coded, encode)
        decode = partial(apply_update, before.model, data, layers, after.version)
        yield Case("downlink", name, "decode", plain, coded, decode)


def _next_update(before: Broadcast, target: npt.NDArray[np.float32]) -> bytes:
    return before.towards(target).update_from(before.version)


def _uploads(x: RealVector, entropy: Entropy) -> Iterator[Case]:
    noise = DistributedGaussian(noise_multiplier=1.0, delta=1e-5)
    runs = {
        "modular, 16 bits": RunPlan(clip=Clip(1.0), quantize=Modular(16)),
        "the same with noise": RunPlan(
            clip=Clip(1.0), quantize=Modular(16), privacy=noise, weighting=Uniform()
        ),
        "random_k, feedback": RunPlan(
            clip=Clip(1.0), sparsify=RandomK(FRACTION), quantize=Modular(16), error_feedback=True
        ),
        "top_k, feedback": RunPlan(
            quantize=TopK(0.01), secagg=NoSecAgg(), weighting=Uniform(), error_feedback=True
        ),
    }
    update, residual = LocalUpdate(x, 10, {"loss": 1.0}), np.zeros_like(x)
    for name, run in runs.items():
        plan = RoundPlan(
            run=run,
            run_id="bench",
            round_number=1,
            attempt=1,
            clients=_CLIENTS,
            dim=len(x),
            model_digest="",
        )
        work = partial(make_upload, bind_round(plan), update, residual, entropy)
        made = work()
        coded = made.vector.nbytes + len(made.payload)
        yield Case("upload half", name, "encode", 4 * len(x), coded, work)
