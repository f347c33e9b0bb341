"""A labelled data set in memory, checked once.

Everything behind this door may rely on the following, and checks nothing again:
inputs are finite float32 with the examples along the first axis and, for images,
the channels along the second; labels are 0..classes-1; both splits hold examples.
Raw arrays become a `Dataset` through `from_arrays` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import DataError

Inputs: TypeAlias = npt.NDArray[np.float32]
"""Shape [examples, *input_shape]."""
Labels: TypeAlias = npt.NDArray[np.int64]
"""Shape [examples]."""
Origin: TypeAlias = Literal["local", "hub"]
"""Where a data set came from; it decides which library partitions it."""
_BLOCK = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Training and test examples of one classification task.

    Attributes:
        name: For reports.
        x_train: Shape [n, *input_shape]; images are [n, channels, height, width].
        y_train: Shape [n], in 0..classes-1.
        x_test: Shape [m, *input_shape].
        y_test: Shape [m].
        classes: Number of classes over both splits.
        client_ids: Shape [n], who recorded each training example, or None.
        origin: "hub" lets flwr-datasets do the partitioning.

    Raises:
        DataError: An array breaks one of the promises above.
    """

    name: str
    x_train: Inputs = field(repr=False)
    y_train: Labels = field(repr=False)
    x_test: Inputs = field(repr=False)
    y_test: Labels = field(repr=False)
    classes: int
    client_ids: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    origin: Origin = "local"

    def __post_init__(self) -> None:
        """Check every promise."""
        _check_inputs(self.name, "x_train", self.x_train)
        _check_inputs(self.name, "x_test", self.x_test)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            _fail(
                self.name,
                f"x_test must have examples of shape {self.x_train.shape[1:]} like x_train, "
                f"got {self.x_test.shape[1:]}",
            )
        _check_ids(self.name, "y_train", self.y_train, len(self.x_train))
        _check_ids(self.name, "y_test", self.y_test, len(self.x_test))
        if self.client_ids is not None:
            _check_ids(self.name, "client ids", self.client_ids, len(self.x_train))
        _check_classes(self)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, channels first."""
        return self.x_train.shape[1:]


def from_arrays(
    name: str,
    x_train: npt.NDArray[Any],
    y_train: npt.NDArray[Any],
    x_test: npt.NDArray[Any],
    y_test: npt.NDArray[Any],
    *,
    client_ids: npt.NDArray[Any] | None = None,
    origin: Origin = "local",
) -> Dataset:
    """Bring raw arrays into the product's form.

    Bytes (uint8) are taken for pixels: they are scaled to [0, 1], and images
    get their channel axis first. Other numbers are cast and keep their shape,
    so that a sensor window is [channels, length] and a table row [features].

    Args:
        name: For reports and errors.
        x_train: Any real dtype, examples along the first axis.
        y_train: Any integer dtype.
        x_test: As `x_train`.
        y_test: As `y_train`.
        client_ids: Any integer dtype, one a training example.
        origin: See `Dataset`.

    Raises:
        DataError: The arrays are not a data set.
    """
    train, test = (
        _as_integers(name, "y_train", y_train),
        _as_integers(name, "y_test", y_test),
    )
    return Dataset(
        name=name,
        x_train=_as_inputs(name, "x_train", x_train),
        y_train=train,
        x_test=_as_inputs(name, "x_test", x_test),
        y_test=test,
        classes=1 + max((int(labels.max()) for labels in (train, test) if labels.size), default=0),
        client_ids=None if client_ids is None else _as_integers(name, "client ids", client_ids),
        origin=origin,
    )


def _as_inputs(name: str, what: str, x: npt.NDArray[Any]) -> Inputs:
    if x.dtype.kind not in "uifb":
        _fail(name, f"{what} must hold real numbers, got dtype {x.dtype}")
    if x.dtype != np.uint8:
        with np.errstate(over="ignore"):  # the check for finite values follows, with a message
            return np.ascontiguousarray(x, dtype=np.float32)
    if x.ndim == 3:
        x = x[:, np.newaxis]
    elif x.ndim == 4 and x.shape[3] in {1, 3, 4} and x.shape[1] not in {1, 3}:
        x = x.transpose(0, 3, 1, 2)
    scaled: Inputs = np.ascontiguousarray(x, dtype=np.float32)
    scaled /= 255  # an array of our own: its dtype changed
    return scaled


def _as_integers(name: str, what: str, y: npt.NDArray[Any]) -> Labels:
    if y.dtype.kind not in "ui":
        _fail(name, f"{what} must be integers, got dtype {y.dtype}: number them from 0")
    if y.size and int(y.max()) > np.iinfo(np.int64).max:
        _fail(name, f"{what} must fit into 64 signed bits, got {int(y.max())}")
    return np.ascontiguousarray(y, dtype=np.int64)


def _check_inputs(name: str, what: str, x: Inputs) -> None:
    if x.dtype != np.float32:
        _fail(name, f"{what} must be float32, got {x.dtype}")
    if x.ndim < 2:
        _fail(name, f"{what} must have shape [examples, ...], got {list(x.shape)}")
    if x.size == 0:
        _fail(name, f"{what} must not be empty, got shape {list(x.shape)}")
    # In blocks: of a mapped set, no more than that is in memory at a time.
    if not all(np.isfinite(x[at : at + _BLOCK]).all() for at in range(0, len(x), _BLOCK)):
        _fail(name, f"{what} must be finite: impute or drop NaN and infinite values first")


def _check_ids(name: str, what: str, y: Labels, examples: int) -> None:
    if y.dtype != np.int64:
        _fail(name, f"{what} must be int64, got {y.dtype}")
    if y.shape != (examples,):
        _fail(name, f"{what} must have shape [{examples}] like the inputs, got {list(y.shape)}")
    if int(y.min()) < 0:
        _fail(name, f"{what} must not be negative, got {int(y.min())}: number them from 0")


def _check_classes(dataset: Dataset) -> None:
    found = len(np.unique(dataset.y_train))
    if found < 2:
        _fail(dataset.name, f"y_train must hold at least 2 classes, got {found}")
    largest = int(max(dataset.y_train.max(), dataset.y_test.max()))
    if largest >= dataset.classes:
        _fail(dataset.name, f"labels must be below {dataset.classes}, got {largest}")
    # One output per class number: a stray 10^9 must not become a model of that size.
    if dataset.classes > len(dataset.y_train):
        _fail(
            dataset.name,
            f"labels must be numbered 0..classes-1, got {found} classes numbered up to "
            f"{dataset.classes - 1} for {len(dataset.y_train)} examples: renumber them",
        )


def _fail(name: str, problem: str) -> None:
    msg = f"data set {name!r}: {problem}"
    raise DataError(msg)
