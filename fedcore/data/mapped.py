"""A data set that is mapped into memory instead of read.

    folder/x_train.npy, y_train.npy, x_test.npy, y_test.npy, and the array of client ids

An .npz is unpacked into memory as a whole, and pixels grow fourfold as they become float32. The
files of such a folder hold what training takes, aligned; the kernel brings in the pages that a
batch touches and drops them again when memory is short. On a board that forks a process for each
message, all of them share these pages.

`python -m fedcore.data examples.npz examples` makes the folder of a file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcore.archive import UNREADABLE
from fedcore.data.dataset import Dataset
from fedcore.errors import DataError

CLIENTS: Final = "clients"
"""Name of the array that says who recorded each training example."""
_SUFFIX: Final = ".npy"


def write_mapped(dataset: Dataset, folder: Path) -> None:
    """Write a data set as a folder of arrays: whole, or not at all.

    Args:
        dataset: Its client ids, if any, become the array `clients`.
        folder: Must not exist yet.

    Raises:
        DataError: It exists, or cannot be written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "x_train": dataset.x_train,
        "y_train": dataset.y_train,
        "x_test": dataset.x_test,
        "y_test": dataset.y_test,
    }
    if dataset.client_ids is not None:
        arrays[CLIENTS] = dataset.client_ids
    if folder.exists():
        msg = f"{folder} exists already: name a new folder"
        raise DataError(msg)
    unfinished = folder.with_name(folder.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, array in arrays.items():
            with (unfinished / f"{name}{_SUFFIX}").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        msg = f"cannot write {folder}: {error.strerror or error}"
        raise DataError(msg) from error


def map_arrays(
    folder: Path, wanted: Collection[str]
) -> tuple[dict[str, npt.NDArray[Any]], list[str]]:
    """Return those of the `wanted` arrays that `folder` has, and the names of all it has.

    What is written into them stays in this process: the files do not change.

    Raises:
        ValueError: A file is no .npy file without pickled objects; says why in one line.
        OSError: One cannot be read.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    found = sorted(path.stem for path in folder.glob(f"*{_SUFFIX}"))
    for name in wanted:
        if name not in found:
            continue
        try:
            arrays[name] = np.load(folder / f"{name}{_SUFFIX}", mmap_mode="c", allow_pickle=False)
        except UNREADABLE as error:
            msg = f"{name}{_SUFFIX}: {' '.join(str(error).split())}"
            raise ValueError(msg) from error
    return arrays, found
