"""Hub data sets, made in memory: conversion and flwr-datasets' partitioners."""

import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from fedcore.data import Dirichlet, HubDataset, Iid, Natural, Shards, hub, load, partition
from fedcore.data.hub import convert_splits
from fedcore.errors import ConfigurationError, DataError

CONFIG = HubDataset(name="toy", client_key="writer")
ROWS = 60


def splits():
    pixels = (np.arange(ROWS * 16) % 256).astype(np.uint8).reshape(ROWS, 4, 4)
    train = datasets.Dataset.from_dict(
        {
            "image": [Image.fromarray(image) for image in pixels],
            "label": [row % 3 for row in range(ROWS)],
            "writer": [f"w{row % 5}" for row in range(ROWS)],
        }
    )
    return datasets.DatasetDict(train=train, test=train.select(range(6))), pixels


def test_images_labels_and_writers_become_arrays():
    dataset_dict, pixels = splits()
    dataset = convert_splits(dataset_dict, CONFIG)
    np.testing.assert_allclose(dataset.x_train[:, 0], pixels / 255, rtol=1e-6)
    assert dataset.y_train.tolist() == [row % 3 for row in range(ROWS)]
    assert dataset.client_ids.tolist() == [row % 5 for row in range(ROWS)]
    assert (len(dataset.x_test), dataset.classes, dataset.origin) == (6, 3, "hub")


@pytest.mark.parametrize(
    ("config", "clients"),
    [(Iid(), 7), (Dirichlet(alpha=1.0), 6), (Shards(), 10), (Natural(), 5)],
)
def test_flower_partitions_are_disjoint_covering_and_repeatable(config, clients):
    dataset = convert_splits(splits()[0], CONFIG)
    one, two = (partition(dataset, config, clients, seed=3) for _ in range(2))
    assert all(map(np.array_equal, one, two))
    assert min(map(len, one)) >= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(one)), np.arange(ROWS))


def test_natural_flower_clients_are_the_writers_in_sorted_order():
    dataset = convert_splits(splits()[0], CONFIG)
    parts = partition(dataset, Natural(), clients=2, seed=0)
    assert [part.tolist() for part in parts] == [
        list(range(0, ROWS, 5)),
        list(range(1, ROWS, 5)),
    ]


def test_shards_of_a_hub_set_hold_few_labels():
    dataset = convert_splits(splits()[0], CONFIG)
    parts = partition(dataset, Shards(shards_per_client=1), clients=3, seed=0)
    assert [len(np.unique(dataset.y_train[part])) for part in parts] == [1, 1, 1]


def test_a_dirichlet_draw_without_solution_is_refused():
    dataset = convert_splits(splits()[0], CONFIG)
    with pytest.raises(ConfigurationError, match="flwr-datasets cannot split 'toy' into 20"):
        partition(dataset, Dirichlet(alpha=0.001, min_examples=3), clients=20, seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HubDataset(name="toy", train_split="training"), "no split 'training', only"),
        (HubDataset(name="toy", x_key="img"), "no column 'img', only"),
        (HubDataset(name="toy", y_key="writer"), "y_train must be integers"),
    ],
)
def test_a_split_or_column_that_is_not_there_is_named(config, message):
    with pytest.raises(DataError, match=message):
        convert_splits(splits()[0], config)


def test_images_of_different_sizes_are_refused():
    images = [Image.new("L", (4, 4)), Image.new("L", (5, 4))]
    train = datasets.Dataset.from_dict({"image": images, "label": [0, 1]})
    with pytest.raises(DataError, match="one shape, got 2 shapes"):
        convert_splits({"train": train, "test": train}, HubDataset(name="toy"))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match=r"pip install fedcore\[hub\]"):
        load(HubDataset(name="toy"))


def test_whatever_the_hub_raises_becomes_one_line(monkeypatch):
    def unreachable(name):
        msg = f"couldn't reach\n{name}"
        raise ConnectionError(msg)

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'toy' cannot be loaded from the hub: couldn't reach toy"):
        load(HubDataset(name="toy"))


def test_a_download_is_converted(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits()[0])
    assert load(CONFIG).name == "toy"
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits()[0]["train"])
    with pytest.raises(DataError, match="must have named splits"):
        hub.load_hub(CONFIG)
