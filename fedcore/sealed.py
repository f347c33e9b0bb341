"""Files that only their device reads: encrypted, authenticated, bound to their place.

    file = format | nonce | AES-256-GCM(key, nonce, data; associated = format and name)

The key is drawn once for each device and lies in a file of mode 0600. A nonce is 96 random
bits for each write: below 2^32 writes under one key, as SP 800-38D section 8.3 asks. The
name is that of the file's purpose; a file under another's name does not open, nor one of
another device.

What it is for: a copy of the files (a backup, a card taken out of a drawer, a disk that
was sold) says nothing without the key. Keep the key where those copies are not: on a
credential of systemd, in a file system in memory that a TPM fills. What it is not for: who
reads the key or runs as the device's user reads everything; and an *older* file of the same
name opens. Where going back would harm, the journal of answers refuses (`clients.journal`).

Replacing goes by `fedcore.durable`: a crash leaves the old file or the new one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedcore.durable import replace_file
from fedcore.errors import ConfigurationError

KEY_BYTES: Final = 32
FORMAT: Final = b"fedcore sealed 1\n"
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
OVERHEAD: Final = len(FORMAT) + _NONCE_BYTES + _TAG_BYTES
"""Bytes by which a sealed file is longer than what it holds."""


class BrokenSealError(ConfigurationError):
    """A file that this key did not seal, under this name, in this form."""


@dataclass(frozen=True, slots=True)
class Seal:
    """A device's key for its own files.

    Attributes:
        key: 32 secret bytes.

    Example:
        >>> seal = Seal(bytes(32))
        >>> box = seal.close("answers", b"three rounds")
        >>> seal.open("answers", box)
        b'three rounds'
        >>> seal.open("contexts", box)
        Traceback (most recent call last):
        ...
        fedcore.sealed.BrokenSealError: the contexts were not sealed by this device's key, or \
altered since: restore the file or the key, or remove the file
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Check the length."""
        if len(self.key) != KEY_BYTES:
            msg = f"a device's key for its files has {KEY_BYTES} bytes, got {len(self.key)}"
            raise ConfigurationError(msg)

    def close(self, name: str, data: bytes) -> bytes:
        """Encrypt `data` for the file of this name."""
        # From the system, whatever the caller draws from: a nonce must never come twice.
        nonce = os.urandom(_NONCE_BYTES)
        return FORMAT + nonce + AESGCM(self.key).encrypt(nonce, data, _associated(name))

    def open(self, name: str, box: bytes) -> bytes:
        """Return what was sealed.

        Raises:
            BrokenSealError: Another key, another name, or altered bytes.
        """
        start = len(FORMAT) + _NONCE_BYTES
        whole = len(box) >= OVERHEAD and box.startswith(FORMAT)
        nonce = box[len(FORMAT) : start] if whole else bytes(_NONCE_BYTES)
        try:
            # What has another form fails as what has another key: it authenticates nothing.
            return AESGCM(self.key).decrypt(
                nonce, box[start:] if whole else bytes(_TAG_BYTES), _associated(name)
            )
        except InvalidTag as error:
            msg = (
                f"the {name} were not sealed by this device's key, or altered since: restore the "
                "file or the key, or remove the file"
            )
            raise BrokenSealError(msg) from error

    def write(self, path: Path, name: str, data: bytes) -> None:
        """Replace a file, durably.

        Raises:
            OSError: It cannot be written; the old one is still there.
        """
        replace_file(path, self.close(name, data))


def _associated(name: str) -> bytes:
    return FORMAT + name.encode("utf-8")
