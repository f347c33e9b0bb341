"""Composable stages that turn an update into ring elements whose sum decodes to the sum."""

from fedcore.codec.broadcast import Broadcast, Delta, Full, apply_update
from fedcore.codec.clip import Clip
from fedcore.codec.compressors import Compressor, Qsgd, SparseTernary, TopK
from fedcore.codec.embed import Embed, narrowest_ring
from fedcore.codec.partly_dense import PartlyDense, outside, small_layers
from fedcore.codec.quantize import Discretize, Quantize
from fedcore.codec.rotate import Hadamard, NoRotation
from fedcore.codec.segments import ClipSegments
from fedcore.codec.sketch import Sketch
from fedcore.codec.sparsify import Dense, RandomK
from fedcore.codec.stage import (
    Bound,
    Domain,
    Integers,
    Reals,
    RingElements,
    Stage,
    chain,
    identity,
)
from fedcore.codec.tally import Tally
from fedcore.codec.telling import TellingClip
from fedcore.codec.top_support import PublicTopK, Support

__all__ = [
    "Bound",
    "Broadcast",
    "Clip",
    "ClipSegments",
    "Compressor",
    "Delta",
    "Dense",
    "Discretize",
    "Domain",
    "Embed",
    "Full",
    "Hadamard",
    "Integers",
    "NoRotation",
    "PartlyDense",
    "PublicTopK",
    "Qsgd",
    "Quantize",
    "RandomK",
    "Reals",
    "RingElements",
    "Sketch",
    "SparseTernary",
    "Stage",
    "Support",
    "Tally",
    "TellingClip",
    "TopK",
    "apply_update",
    "chain",
    "identity",
    "narrowest_ring",
    "outside",
    "small_layers",
]
