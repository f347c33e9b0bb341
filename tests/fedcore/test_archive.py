import io
import zipfile

import numpy as np
import pytest

from fedcore.archive import read_arrays

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def archive(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    buffer.seek(0)
    return buffer


def npy(header):
    text = f"{header:<117}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24)


def test_the_arrays_that_are_wanted_and_there_are_returned_with_the_names_of_all():
    buffer = io.BytesIO()
    np.savez(buffer, x=X, more=X)
    buffer.seek(0)
    arrays, found = read_arrays(buffer, ("x", "y"))
    np.testing.assert_array_equal(arrays.pop("x"), X)
    assert not arrays
    assert found == ["x", "more"]


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (b"just text", "x is no array"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3"), "multi-line statement"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1 << 44,), }"), "."),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 60},), }}"), "."),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "allow_pickle=False"),
    ],
)
def test_an_array_that_is_none_is_a_value_error_in_one_line(member, why):
    with pytest.raises(ValueError, match=why) as caught:
        read_arrays(archive({"x.npy" if member[:1] == b"\x93" else "x": member}), ("x",))
    assert "\n" not in str(caught.value)


def test_a_compression_that_is_unknown_is_a_value_error():
    data = bytearray(archive({"x.npy": npy("{}")}).getvalue())
    data[8], data[data.rindex(b"PK\x01\x02") + 10] = 99, 99
    with pytest.raises(ValueError, match="compression method"):
        read_arrays(io.BytesIO(data), ("x",))


def test_a_single_array_is_no_archive():
    buffer = io.BytesIO()
    np.save(buffer, X)
    buffer.seek(0)
    with pytest.raises(ValueError, match="single array"):
        read_arrays(buffer, ("x",))
