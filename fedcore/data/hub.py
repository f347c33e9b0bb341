"""Hugging Face data sets: conversion to arrays, partitions by flwr-datasets.

Two libraries do the work: `datasets` downloads and decodes, `flwr_datasets`
partitions. A partition depends on labels and client ids alone, so the
partitioners run on a small table of those and of row numbers; images are never
copied for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np
import numpy.typing as npt

from fedcore.data.dataset import Dataset, from_arrays
from fedcore.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from fedcore.data.partitions import Indices, PartitionConfig
    from fedcore.data.sources import HubDataset

_MISSING = "data sets of the hub need an extra that is missing: pip install fedcore[hub]"


def load_hub(config: HubDataset) -> Dataset:
    """Download a data set of the hub, or take it from the local cache.

    Raises:
        ConfigurationError: The extra is not installed.
        DataError: The hub cannot be reached, does not know the name, or its data do not fit.
    """
    try:
        from datasets import load_dataset  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(_MISSING) from error
    return convert_splits(_download(load_dataset, config), config)


def _download(load_dataset: Callable[[str], Any], config: HubDataset) -> Mapping[str, Any]:
    try:
        splits = load_dataset(config.name)
    except Exception as error:  # noqa: BLE001 - download stacks raise whatever they like
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        msg = f"data set {config.name!r} cannot be loaded from the hub: {reason}"
        raise DataError(msg) from None
    if not isinstance(splits, Mapping):
        msg = f"data set {config.name!r} must have named splits, got {type(splits).__name__}"
        raise DataError(msg)
    return splits


def convert_splits(splits: Mapping[str, Any], config: HubDataset) -> Dataset:
    """Turn a `datasets.DatasetDict` into arrays.

    Args:
        splits: Maps the name of a split to a `datasets.Dataset`.
        config: Names splits and columns.

    Raises:
        DataError: A split or column is missing, or its values are not arrays of one shape.
    """
    for split in (config.train_split, config.test_split):
        if split not in splits:
            _fail(config, f"has no split {split!r}, only {sorted(splits)}")
    train, test = splits[config.train_split], splits[config.test_split]
    clients = None
    if config.client_key is not None:
        # Sorted ids become 0, 1, ...: the same order for strings and numbers of one dtype.
        clients = np.unique(_column(train, config.client_key, config), return_inverse=True)[1]
    return from_arrays(
        config.name,
        _column(train, config.x_key, config),
        _column(train, config.y_key, config),
        _column(test, config.x_key, config),
        _column(test, config.y_key, config),
        client_ids=clients,
        origin="hub",
    )


def _column(split: Any, key: str, config: HubDataset) -> npt.NDArray[Any]:
    if key not in split.column_names:
        _fail(config, f"has no column {key!r}, only {sorted(split.column_names)}")
    values = [np.asarray(value) for value in split[key]]
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        _fail(config, f"column {key!r} must hold examples of one shape, got {len(shapes)} shapes")
    return np.stack(values) if values else np.zeros(0, np.float32)


def _fail(config: HubDataset, problem: str) -> None:
    msg = f"data set {config.name!r} {problem}"
    raise DataError(msg)


def partition_hub(
    dataset: Dataset, config: PartitionConfig, clients: int, seed: int
) -> tuple[Indices, ...]:
    """Partition with the partitioner of flwr-datasets that `config` stands for.

    The caller has checked that the numbers fit. Shards are of equal size here, so
    up to (number of shards - 1) examples at the end of the sorted set stay unused.

    Raises:
        ConfigurationError: The extra is missing, or its partitioner found no solution.
    """
    try:
        import datasets  # noqa: PLC0415
        import flwr_datasets.partitioner  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigurationError(_MISSING) from error
    ids = dataset.y_train if dataset.client_ids is None else dataset.client_ids
    table = datasets.Dataset.from_dict(
        {"row": np.arange(len(ids)), "label": dataset.y_train, "client": ids}
    )
    partitioner = _partitioner(config, clients, seed)
    # IidPartitioner cuts contiguous blocks and counts on a shuffled set.
    partitioner.dataset = table.shuffle(seed=seed)
    try:
        with warnings.catch_warnings():
            # One for each repeated draw; the last failure is an error anyway.
            warnings.filterwarnings("ignore", re.escape("The specified min_partition_size"))
            # datasets calls pyarrow in a way that its version 25 deprecates.
            warnings.filterwarnings("ignore", "Specifying null_placement", FutureWarning)
            parts = [partitioner.load_partition(client) for client in range(clients)]
    except ValueError as error:
        msg = f"flwr-datasets cannot split {dataset.name!r} into {clients} clients: {error}"
        raise ConfigurationError(msg) from error
    return tuple(np.sort(np.asarray(part["row"], dtype=np.int64)) for part in parts)


def _partitioner(config: PartitionConfig, clients: int, seed: int) -> Any:
    from flwr_datasets import partitioner  # noqa: PLC0415

    from fedcore.data.partitions import Dirichlet, Iid, Natural, Shards  # noqa: PLC0415

    match config:
        case Iid():
            return partitioner.IidPartitioner(clients)
        case Dirichlet():
            return partitioner.DirichletPartitioner(
                clients, "label", config.alpha, config.min_examples, seed=seed
            )
        case Shards():
            return partitioner.ShardPartitioner(
                clients, "label", num_shards_per_partition=config.shards_per_client, seed=seed
            )
        case Natural():
            return partitioner.NaturalIdPartitioner("client")
        case _:
            assert_never(config)
