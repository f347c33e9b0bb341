"""Files that a crash leaves whole: the old one or the new one.

    write beside > fsync > rename > fsync of the folder

The new bytes are on the disk before they get the name, and the name before the caller
goes on. Files are for their owner's eyes only, and never written through a link.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Make `data` the content of the file at `path`, durably.

    Raises:
        OSError: It cannot be written; the old file is still there.
    """
    new = beside(path, ".new")
    with open_private(new, os.O_WRONLY | os.O_TRUNC) as descriptor:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def beside(path: Path, suffix: str) -> Path:
    """Return the path of a file that belongs to the one at `path`."""
    return path.with_name(path.name + suffix)


@contextmanager
def open_private(path: Path, flags: int) -> Iterator[int]:
    """Open or make a file that only its owner may read; give its descriptor.

    Raises:
        OSError: It cannot be opened, or is a link.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
