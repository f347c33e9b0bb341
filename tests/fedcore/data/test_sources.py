"""Digits, local files, and every way in which a file can be wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from sklearn.datasets import load_digits

from fedcore.data import DataConfig, Digits, HubDataset, Natural, NpzFile, load, partition
from fedcore.errors import ConfigurationError, DataError

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
ARRAYS = {
    "x_train": np.arange(24, dtype=np.float32).reshape(8, 3),
    "y_train": np.arange(8) % 3,
    "x_test": np.zeros((2, 3), np.float32),
    "y_test": np.array([0, 1]),
}


def saved(folder: Path, **arrays: np.ndarray) -> str:
    path = folder / "set.npz"
    np.savez_compressed(path, **arrays)
    return str(path)


def test_the_digits_are_scaled_images_split_the_same_way_every_time():
    one, two = load(Digits()), load(Digits())
    assert one.input_shape == (1, 8, 8)
    assert len(one.x_train) + len(one.x_test) == 1797
    assert (one.x_train.min(), one.x_train.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(one.x_test, two.x_test)


def everything(dataset):
    x = np.concatenate([dataset.x_train, dataset.x_test]).reshape(-1, 64)
    y = np.concatenate([dataset.y_train, dataset.y_test])
    return sorted(map(tuple, np.column_stack([x, y]).tolist()))


@pytest.mark.parametrize("found", [True, False], ids=["read", "asked for"])
def test_the_digits_are_those_of_scikit_learn_wherever_it_keeps_them(monkeypatch, found):
    if not found:
        monkeypatch.setattr("fedcore.data.sources._DIGITS", "datasets/elsewhere.csv.gz")
    x, y = load_digits(return_X_y=True)
    expected = np.column_stack([(x / 16).astype(np.float32), y])
    assert everything(load(Digits())) == sorted(map(tuple, expected.tolist()))


def test_reading_the_digits_does_not_take_the_seconds_that_scikit_learn_does():
    code = (
        "import sys; from fedcore.data import Digits, load; load(Digits()); "
        "print(sorted({'sklearn', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_scikit_learn_there_are_no_digits(monkeypatch):
    monkeypatch.setattr("fedcore.data.sources.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"pip install fedcore\[train\]"):
        load(Digits())


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
def test_the_test_split_holds_the_same_share_of_every_class(fraction):
    dataset = load(Digits(test_fraction=fraction))
    train, test = np.bincount(dataset.y_train), np.bincount(dataset.y_test)
    assert (np.abs(test - fraction * (train + test)) <= 1).all()
    assert min(test) >= 1


def test_a_file_gives_back_what_was_saved(tmp_path):
    dataset = load(
        NpzFile(path=saved(tmp_path, **ARRAYS, who=np.arange(8) // 2), clients_key="who")
    )
    np.testing.assert_array_equal(dataset.x_train, ARRAYS["x_train"])
    np.testing.assert_array_equal(dataset.y_test, ARRAYS["y_test"])
    np.testing.assert_array_equal(dataset.client_ids, [0, 0, 1, 1, 2, 2, 3, 3])
    assert (dataset.name, dataset.classes) == ("set", 3)


def test_mnist_and_its_writers_load_from_two_files():
    dataset = load(
        NpzFile(
            path=str(SHARED / "mnist.npz"),
            clients_path=str(SHARED / "mnist_writers.npz"),
            clients_key="writer_train",
        )
    )
    assert dataset.x_train.shape == (60_000, 1, 28, 28)
    assert dataset.x_test.shape == (10_000, 1, 28, 28)
    assert np.bincount(dataset.y_test).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert abs(float(dataset.x_train.mean()) - 0.1307) < 1e-4
    writers = partition(dataset, Natural(), clients=539, seed=0)
    assert sorted(map(len, writers))[:: len(writers) - 1] == [19, 131]
    with pytest.raises(ConfigurationError, match="has 539 natural clients, got clients=540"):
        partition(dataset, Natural(), clients=540, seed=0)


def test_a_missing_array_is_named(tmp_path):
    path = saved(tmp_path, **{name: ARRAYS[name] for name in ("x_train", "y_train")})
    with pytest.raises(DataError, match=r"missing: \['x_test', 'y_test'\]"):
        load(NpzFile(path=path))
    with pytest.raises(DataError, match=r"missing: \['writer'\]"):
        load(NpzFile(path=saved(tmp_path, **ARRAYS), clients_key="writer"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.npz does not exist"):
        load(NpzFile(path=str(tmp_path / "nowhere.npz")))
    with pytest.raises(DataError, match=r"must hold x_train, .* found: \[\]"):
        load(NpzFile(path=str(tmp_path)))


def test_pickled_objects_are_never_loaded(tmp_path):
    objects = np.empty(8, object)
    path = saved(tmp_path, **(ARRAYS | {"x_train": objects}))
    with pytest.raises(DataError, match=r"cannot be read as \.npz without pickled objects"):
        load(NpzFile(path=path))


def test_what_is_no_archive_is_refused_in_one_line(tmp_path):
    single = tmp_path / "single.npz"
    with single.open("wb") as file:
        np.save(file, np.zeros(3))
    contents = {"empty": b"", "text": b"not an archive", "header": b"PK\x03\x04", "npy": None}
    for name, content in contents.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(single.read_bytes() if content is None else content)
        with pytest.raises(DataError) as error:
            load(NpzFile(path=str(path)))
        assert "\n" not in str(error.value)


def test_a_damaged_archive_is_refused_or_loads_never_anything_else(tmp_path):
    whole = Path(saved(tmp_path, **ARRAYS)).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.npz"
    outcomes = []
    for _ in range(400):
        damaged = bytearray(whole[: rng.integers(1, 5 * len(whole))])  # cut in one case of five
        for position in rng.integers(len(damaged), size=rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load(NpzFile(path=str(path)))
        except DataError as error:
            outcomes.append(str(error))
    assert len(outcomes) > 100
    assert not any("\n" in outcome for outcome in outcomes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(test_fraction=0.0), "data.test_fraction must be in"),
        (lambda: Digits(test_fraction=float("nan")), "data.test_fraction must be in"),
        (NpzFile, "data.path must name"),
        (lambda: NpzFile(path="a.npz", clients_path="b.npz"), "data.clients_key is not set"),
        (HubDataset, "data.name must name"),
    ],
)
def test_a_source_out_of_range_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_configuration_is_validated_by_kind():
    adapter = TypeAdapter(DataConfig)
    assert adapter.validate_python({"kind": "digits", "test_fraction": 0.3}) == Digits(
        "digits", 0.3
    )
    assert adapter.validate_python({"kind": "npz", "path": "a"}) == NpzFile(path="a")
    assert adapter.validate_python({"kind": "hub", "name": "a"}) == HubDataset(name="a")


def test_importing_data_models_and_training_loads_no_heavy_library():
    code = (
        "import sys, fedcore.data, fedcore.models, fedcore.training\n"
        "from fedcore.training import ExampleLevelPrivacy, LocalTraining\n"
        "ExampleLevelPrivacy(), LocalTraining()\n"
        "heavy = {'torch', 'opacus', 'sklearn', 'scipy', 'datasets', 'flwr_datasets', 'flwr'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
