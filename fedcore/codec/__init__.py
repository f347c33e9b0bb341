"""Composable stages that turn an update into ring elements whose sum decodes to the sum."""

from fedcore.codec.clip import Clip
from fedcore.codec.embed import Embed, narrowest_ring
from fedcore.codec.quantize import Discretize, Quantize
from fedcore.codec.rotate import Hadamard, NoRotation
from fedcore.codec.segments import ClipSegments
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

__all__ = [
    "Bound",
    "Clip",
    "ClipSegments",
    "Dense",
    "Discretize",
    "Domain",
    "Embed",
    "Hadamard",
    "Integers",
    "NoRotation",
    "Quantize",
    "RandomK",
    "Reals",
    "RingElements",
    "Stage",
    "Tally",
    "TellingClip",
    "chain",
    "identity",
    "narrowest_ring",
]
