"""What is accepted as a data set, and what is said about everything else."""

import numpy as np
import pytest

from fedcore.data import Dataset, from_arrays
from fedcore.errors import DataError

GOOD = {
    "x_train": np.zeros((6, 3), np.float32),
    "y_train": np.array([0, 1, 2, 0, 1, 2]),
    "x_test": np.ones((2, 3), np.float32),
    "y_test": np.array([0, 1]),
}
NAN = np.full((6, 3), np.nan)

MALFORMED = {
    "objects": ({"x_train": np.array([[1], ["a"]] * 3, dtype=object)}, "real numbers"),
    "strings": ({"x_train": np.array([["a"]] * 6)}, "real numbers"),
    "complex": ({"x_train": np.zeros((6, 3), complex)}, "real numbers"),
    "nan": ({"x_train": NAN}, "finite"),
    "infinite after the cast": ({"x_train": np.full((6, 3), 1e300)}, "finite"),
    "nan in test": ({"x_test": NAN[:2]}, "finite"),
    "scalars": ({"x_train": np.zeros(6)}, r"shape \[examples, ...\]"),
    "empty": ({"x_train": np.zeros((0, 3)), "y_train": np.zeros(0, int)}, "not be empty"),
    "empty test": ({"x_test": np.zeros((0, 3)), "y_test": np.zeros(0, int)}, "not be empty"),
    "other test shape": ({"x_test": np.zeros((2, 4))}, r"shape \(3,\) like x_train"),
    "short labels": ({"y_train": np.array([0, 1])}, r"shape \[6\]"),
    "column of labels": ({"y_train": np.zeros((6, 1), int)}, r"shape \[6\]"),
    "float labels": ({"y_train": np.arange(6.0)}, "integers, got dtype float64"),
    "string labels": ({"y_train": np.array(list("abcabc"))}, "integers"),
    "object labels": ({"y_train": np.array([0, 1, None] * 2)}, "integers"),
    "negative labels": ({"y_train": np.array([-1, 0, 1, 2, 0, 1])}, "not be negative, got -1"),
    "negative test labels": ({"y_test": np.array([-5, 0])}, "not be negative"),
    "one class": ({"y_train": np.zeros(6, int)}, "at least 2 classes, got 1"),
    "stray label": ({"y_train": np.array([0, 1, 10**9] * 2)}, "renumber"),
    "huge label": ({"y_train": np.full(6, 2**64 - 1, np.uint64)}, "64 signed bits"),
    "clients missing": ({"client_ids": np.arange(5)}, r"client ids must have shape \[6\]"),
    "float clients": ({"client_ids": np.arange(6.0)}, "client ids must be integers"),
    "negative clients": ({"client_ids": np.arange(6) - 1}, "client ids must not be negative"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_data_set_is_refused_in_one_line_that_names_it(case):
    change, message = MALFORMED[case]
    with pytest.raises(DataError, match=message) as error:
        from_arrays("broken", **(GOOD | change))
    assert str(error.value).startswith("data set 'broken': ")
    assert "\n" not in str(error.value)


def test_the_constructor_takes_only_the_final_types():
    with pytest.raises(DataError, match="x_train must be float32, got float64"):
        Dataset("raw", **(GOOD | {"x_train": np.zeros((6, 3))}), classes=3)
    with pytest.raises(DataError, match="y_train must be int64, got int32"):
        Dataset("raw", **(GOOD | {"y_train": GOOD["y_train"].astype(np.int32)}), classes=3)
    with pytest.raises(DataError, match="labels must be below 2, got 2"):
        Dataset("raw", **GOOD, classes=2)


def test_classes_are_counted_over_both_splits():
    assert from_arrays("x", **(GOOD | {"y_test": np.array([4, 0])})).classes == 5


def test_bytes_become_pixels_between_zero_and_one_with_channels_first():
    grey = np.full((6, 4, 5), 255, np.uint8)
    dataset = from_arrays("grey", **(GOOD | {"x_train": grey, "x_test": grey[:2]}))
    assert dataset.input_shape == (1, 4, 5)
    assert dataset.x_train.dtype == np.float32
    assert dataset.x_train.max() == 1.0

    colour = np.zeros((6, 4, 5, 3), np.uint8)
    colour[..., 2] = 51
    dataset = from_arrays("colour", **(GOOD | {"x_train": colour, "x_test": colour[:2]}))
    assert dataset.input_shape == (3, 4, 5)
    np.testing.assert_allclose(dataset.x_train[:, 2], 0.2)
    assert not dataset.x_train[:, :2].any()


def test_other_numbers_keep_their_shape_and_value():
    windows = np.arange(6 * 2 * 8, dtype=np.float16).reshape(6, 2, 8)
    dataset = from_arrays("windows", **(GOOD | {"x_train": windows, "x_test": windows[:2]}))
    assert dataset.input_shape == (2, 8)
    np.testing.assert_array_equal(dataset.x_train, windows)


def test_the_callers_bytes_are_not_changed():
    grey = np.full((6, 4, 5), 255, np.uint8)
    from_arrays("grey", **(GOOD | {"x_train": grey, "x_test": grey[:2]}))
    assert (grey == 255).all()
