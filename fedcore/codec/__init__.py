"""Composable stages that turn an update into ring elements whose sum decodes to the sum."""

from fedcore.codec.clip import Clip
from fedcore.codec.embed import Embed, narrowest_ring
from fedcore.codec.quantize import Discretize, Quantize
from fedcore.codec.rotate import Hadamard, NoRotation
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

__all__ = [
    "Bound",
    "Clip",
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
    "chain",
    "identity",
    "narrowest_ring",
]
