"""Data sets and how they are spread over clients; torch is not needed here."""

from fedcore.data.dataset import Dataset, Inputs, Labels, from_arrays
from fedcore.data.partitions import (
    Dirichlet,
    Iid,
    Indices,
    Natural,
    PartitionConfig,
    Shards,
    partition,
)
from fedcore.data.sources import DataConfig, Digits, HubDataset, NpzFile, load

__all__ = [
    "DataConfig",
    "Dataset",
    "Digits",
    "Dirichlet",
    "HubDataset",
    "Iid",
    "Indices",
    "Inputs",
    "Labels",
    "Natural",
    "NpzFile",
    "PartitionConfig",
    "Shards",
    "from_arrays",
    "load",
    "partition",
]
