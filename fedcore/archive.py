"""Arrays out of an .npz file that anybody may have written.

numpy reads such a file with `zipfile`, `zlib`, `ast` and `tokenize`, and lets all their
exceptions through; a header that lies about a shape asks for any amount of memory. Here
a file that is not what it claims to be is a `ValueError`, whatever is wrong with it.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Collection
from tokenize import TokenError
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

UNREADABLE: Final = (
    ValueError,
    TypeError,
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    TokenError,
)
"""What numpy lets through from a file that is not what it claims to be."""


def read_arrays(
    file: BinaryIO, wanted: Collection[str]
) -> tuple[dict[str, npt.NDArray[Any]], list[str]]:
    """Return those of the `wanted` arrays that `file` holds, and the names of all it holds.

    Raises:
        ValueError: It is no .npz file without pickled objects; says why in one line.
        OSError: It cannot be read.
    """
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            msg = "it holds a single array (.npy)"
            raise ValueError(msg)  # noqa: TRY004 - as whatever else is wrong with it
        arrays: dict[str, Any] = {name: archive[name] for name in wanted if name in archive.files}
    except UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason) from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy hands over other members as bytes
            msg = f"{name} is no array"
            raise ValueError(msg)  # noqa: TRY004 - the file's contents, not an argument
    return arrays, list(archive.files)
