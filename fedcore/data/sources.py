"""Where data sets come from: scikit-learn's digits, a local file, or the hub.

A configuration names a source and nothing else; `load` is the only way from it
to a `Dataset`. The libraries behind a source are imported when it is used.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from fedcore.archive import read_arrays
from fedcore.data.dataset import Dataset, from_arrays
from fedcore.data.mapped import map_arrays
from fedcore.errors import ConfigurationError, DataError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_SPLIT_SEED = 20_230_917  # the test split of the digits never changes between runs
_DIGITS = "datasets/data/digits.csv.gz"
"""Where scikit-learn keeps them."""


@dataclass(frozen=True, slots=True)
class Digits:
    """scikit-learn's 1797 digits of 8x8 pixels: part of the package, so always there."""

    kind: Literal["digits"] = "digits"
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0.01 <= self.test_fraction <= 0.9:
            msg = (
                f"data.test_fraction must be in [0.01, 0.9], got {self.test_fraction}: "
                "both splits need examples of every class"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class NpzFile:
    """A local .npz with x_train, y_train, x_test and y_test, or a folder of them as .npy.

    Attributes:
        path: The file, or a folder, which is mapped into memory; ``~`` is expanded.
        clients_key: Name of the array that says who recorded each training example.
        clients_path: Another .npz that holds it, when it is not in `path`.
    """

    kind: Literal["npz"] = "npz"
    path: str = ""
    clients_key: str | None = None
    clients_path: str | None = None

    def __post_init__(self) -> None:
        """Check that there is something to open."""
        if not self.path:
            msg = "data.path must name an .npz file, got an empty string"
            raise ConfigurationError(msg)
        if self.clients_path is not None and self.clients_key is None:
            msg = (
                f"data.clients_path is {self.clients_path!r} but data.clients_key is not set: "
                "name the array that holds the client of each example"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set of the Hugging Face hub, e.g. ``ylecun/mnist`` or ``flwrlabs/femnist``.

    Attributes:
        name: As on the hub.
        train_split: Name of the training split.
        test_split: Name of the test split.
        x_key: Column of the images or numbers.
        y_key: Column of the integer labels.
        client_key: Column that says who recorded an example (numbers or strings).
    """

    kind: Literal["hub"] = "hub"
    name: str = ""
    train_split: str = "train"
    test_split: str = "test"
    x_key: str = "image"
    y_key: str = "label"
    client_key: str | None = None

    def __post_init__(self) -> None:
        """Check that there is something to look up."""
        if not self.name:
            msg = "data.name must name a data set of the hub, got an empty string"
            raise ConfigurationError(msg)


DataConfig: TypeAlias = Digits | NpzFile | HubDataset


def load(config: DataConfig) -> Dataset:
    """Return the data set that `config` names.

    Example:
        >>> load(Digits()).input_shape
        (1, 8, 8)

    Raises:
        DataError: It is missing, unreadable or malformed.
        ConfigurationError: The library behind the source is not installed.
    """
    match config:
        case Digits():
            return _load_digits(config)
        case NpzFile():
            return _load_npz(config)
        case HubDataset():
            # A module of its own: what it converts is not ours to shape.
            from fedcore.data.hub import load_hub  # noqa: PLC0415

            return load_hub(config)
        case _:
            assert_never(config)


def _load_digits(config: Digits) -> Dataset:
    x, y = _read_digits()
    test = _stratified_test_rows(y, config.test_fraction)
    images = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return from_arrays("digits", images[~test], y[~test], images[test], y[test])


def _read_digits() -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return what scikit-learn's `load_digits` does.

    Its file is read without importing scikit-learn, which takes two seconds and brings scipy and
    pandas along: a board starts a process for each message, and its first one would pay.
    """
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        msg = "the digits come with scikit-learn, which is missing: pip install fedcore[train]"
        raise ConfigurationError(msg)
    file = Path(found.origin).parent / _DIGITS
    try:
        with gzip.open(file, "rt", encoding="ascii") as stream:
            table = np.loadtxt(stream, delimiter=",", dtype=np.float64)
    except FileNotFoundError:  # another release may keep it elsewhere
        from sklearn.datasets import load_digits  # noqa: PLC0415

        x, y = load_digits(return_X_y=True)
        return x, y
    return table[:, :-1], table[:, -1].astype(int)


def _stratified_test_rows(y: npt.NDArray[Any], fraction: float) -> npt.NDArray[np.bool_]:
    """Choose the same share of every class, the same rows in every run."""
    rng = np.random.default_rng(_SPLIT_SEED)
    test = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        test[rows[: max(1, round(fraction * len(rows)))]] = True
    return test


def _load_npz(config: NpzFile) -> Dataset:
    x_train, y_train, x_test, y_test = _read_npz(config.path, ARRAYS)
    clients = None
    if config.clients_key is not None:
        (clients,) = _read_npz(config.clients_path or config.path, (config.clients_key,))
    name = Path(config.path).stem
    return from_arrays(name, x_train, y_train, x_test, y_test, client_ids=clients)


def _read_npz(path: str, names: tuple[str, ...]) -> list[npt.NDArray[Any]]:
    file = Path(path).expanduser()
    if not file.exists():
        msg = f"data file {path} does not exist: check data.path"
        raise DataError(msg)
    folder = file.is_dir()
    try:
        if folder:
            arrays, found = map_arrays(file, names)
        else:
            with file.open("rb") as stream:
                arrays, found = read_arrays(stream, names)
    except (OSError, ValueError) as error:
        kind = ".npy files" if folder else ".npz"
        msg = f"data file {path} cannot be read as {kind} without pickled objects: {error}"
        raise DataError(msg) from None
    missing = [name for name in names if name not in arrays]
    if missing:
        msg = f"data file {path} must hold {', '.join(names)}; missing: {missing}, found: {found}"
        raise DataError(msg)
    return [arrays[name] for name in names]
