"""The files that make a device known: its secret key, its certificate, the root's key.

Keys are PEM files of Ed25519 (RFC 8410); a certificate is the canonical bytes of
`fedcore.secagg.Certificate`. No file is ever overwritten, a secret one never exists with
a wider mode than 0600, and one that others may read or change is not used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Final, TypeAlias

from fedcore.crypto.signatures import SigningKey, VerifyKey
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.secagg import Certificate, Identity

SECRET_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
_MOST_BYTES: Final = 64 << 20
Files: TypeAlias = Mapping[Path, tuple[bytes, int]]
"""What to create: contents and mode of each file."""


def load_identity(cert_path: Path, key_path: Path) -> Identity:
    """Return a device's identity; whether it is valid today is for its peers to say.

    Raises:
        ConfigurationError: A file is missing or malformed, others may read the key, or the
            two do not belong together.
    """
    return Identity(load_certificate(cert_path), load_key(key_path))


def load_authority(path: Path) -> bytes:
    """Return the root's public key to pin, 32 bytes.

    Raises:
        ConfigurationError: `path` holds no public key.
    """
    return VerifyKey.from_pem(read_file(path)).raw


def load_key(path: Path) -> SigningKey:
    """Return the secret key in `path`.

    Raises:
        ConfigurationError: It is missing or malformed, or others may read it.
    """
    return SigningKey.from_pem(read_file(path, secret=True))


def load_certificate(path: Path) -> Certificate:
    """Return the certificate in `path`; its signature is not checked yet.

    Raises:
        ConfigurationError: It is missing or malformed.
    """
    try:
        return Certificate.from_bytes(read_file(path))
    except PeerProtocolError as error:
        msg = f"{path} holds no certificate ({error}): pass a .crt file of this command"
        raise ConfigurationError(msg) from error


def create(files: Files) -> list[Path]:
    """Create all of `files` with their modes, or none; return their paths.

    Raises:
        ConfigurationError: One exists, or cannot be written.
    """
    taken = [path for path in files if path.exists() or path.is_symlink()]
    if taken:
        msg = f"{taken[0]} exists and is never overwritten: choose another name or folder"
        raise ConfigurationError(msg)
    created: list[Path] = []
    try:
        for path, (data, mode) in files.items():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # With its final mode from the start: there is no moment in which others may read it.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            created.append(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        for path in created:
            path.unlink(missing_ok=True)
        msg = f"{path} cannot be written: {error.strerror}"
        raise ConfigurationError(msg) from error
    return created


def read_file(path: Path, *, secret: bool = False) -> bytes:
    """Return the bytes of a plain file; of a secret one only if its owner alone can read it.

    Raises:
        ConfigurationError: It is missing, no plain file, too long, or open to others.
    """
    try:
        # Without blocking on a pipe; the checks are on what was opened, not on a name.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not S_ISREG(status.st_mode):
                msg = f"{path} must be a plain file"
                raise ConfigurationError(msg)
            if secret and os.name == "posix" and status.st_mode & 0o077:
                msg = (
                    f"{path} can be read or changed by others: chmod 600 it, and replace the key "
                    "if somebody may have read it"
                )
                raise ConfigurationError(msg)
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise ConfigurationError(msg) from error
    if len(data) > _MOST_BYTES:
        msg = f"{path} must have at most {_MOST_BYTES} bytes"
        raise ConfigurationError(msg)
    return data
