"""Data sets that are mapped: the same examples, in pages that are not copied."""

import mmap
import subprocess
import sys

import numpy as np
import pytest

from fedcore.data import NpzFile, load
from fedcore.data.__main__ import main
from fedcore.data.mapped import write_mapped
from fedcore.errors import DataError
from fedcore.training.sgd import as_tensor


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "pictures.npz"
    np.savez_compressed(
        path,
        x_train=rng.integers(0, 256, (3000, 8, 8), np.uint8),
        y_train=np.arange(3000) % 5,
        x_test=rng.integers(0, 256, (7, 8, 8), np.uint8),
        y_test=np.arange(7) % 5,
        who=np.arange(3000) // 100,
    )
    return path


@pytest.fixture
def folder(pictures, tmp_path):
    assert main([str(pictures), str(tmp_path / "mapped"), "--clients-key", "who"]) == 0
    return tmp_path / "mapped"


def mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_a_folder_holds_the_same_data_set_as_its_file(pictures, folder):
    read = load(NpzFile(path=str(pictures), clients_key="who"))
    found = load(NpzFile(path=str(folder), clients_key="clients"))
    for name in ("x_train", "y_train", "x_test", "y_test", "client_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(read, name))
        assert getattr(found, name).dtype == getattr(read, name).dtype
    assert found.classes == read.classes


def test_inputs_stay_in_the_file_s_pages_down_to_the_tensor_of_training(folder):
    x = load(NpzFile(path=str(folder))).x_train
    assert mapped(x)
    assert np.shares_memory(as_tensor(x, "cpu").numpy(), x)


def test_training_cannot_change_the_file(folder):
    x = load(NpzFile(path=str(folder))).x_train
    x += 1
    assert load(NpzFile(path=str(folder))).x_train.max() <= 1


def test_a_folder_that_exists_is_not_overwritten(pictures, folder):
    before = (folder / "x_train.npy").read_bytes()
    with pytest.raises(DataError, match="exists already: name a new folder"):
        write_mapped(load(NpzFile(path=str(pictures))), folder)
    assert (folder / "x_train.npy").read_bytes() == before


def test_a_folder_that_cannot_be_written_leaves_nothing_behind(pictures, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        write_mapped(load(NpzFile(path=str(pictures))), tmp_path / "file" / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pictures.npz"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="shorter than its header says"),
        pytest.param(lambda data: data[:5], id="cut in the header"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"PK" + data[2:], id="another format"),
        pytest.param(lambda data: data.replace(b"'<f4'", b"'|O' "), id="pickled objects"),
        pytest.param(lambda data: data.replace(b"), }", b"(, ["), id="a header without an end"),
    ],
)
def test_a_damaged_file_is_told_by_name(folder, damage):
    path = folder / "x_train.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"cannot be read as \.npy files .*x_train\.npy"):
        load(NpzFile(path=str(folder)))


def test_a_missing_array_is_named(folder):
    (folder / "y_test.npy").unlink()
    with pytest.raises(DataError, match=r"missing: \['y_test'\], found: \['clients'"):
        load(NpzFile(path=str(folder)))


def test_the_command_says_what_is_wrong_in_one_line_and_needs_no_torch(tmp_path):
    code = (
        "import sys; from fedcore.data.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "no.npz"), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: data file")
    assert done.stderr.count("\n") == 1
