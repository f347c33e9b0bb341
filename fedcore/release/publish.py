"""Release folders: what is published is complete, numbered and signed.

    <folder>/<version>/model.onnx      the weights
                       manifest.json   what is said about them
                       manifest.sig    64 bytes: by whom

A version is written beside its place, flushed to disk and renamed, so a reader
sees all of it or nothing, whenever the writer dies. Numbers only grow, and each
manifest names the hash of the one before.

The public key is not part of the folder: a device that took its trust from
where it takes its models would trust anybody who can write there. It is
installed on the device by another way, from the `.pub` file beside the private
key.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from fedcore.crypto.entropy import Entropy
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import ConfigurationError
from fedcore.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SIGNATURE_FILE,
    Description,
    Manifest,
    ModelFile,
    signed_message,
    version_numbers,
)


@dataclass(frozen=True, slots=True)
class Draft:
    """A complete, signed release that nobody can see yet.

    Attributes:
        path: Where it is now.
        target: Where it will be.
    """

    path: Path
    target: Path


def publish(folder: Path, model: bytes, description: Description, key: SigningKey) -> Path:
    """Add a version to `folder`, which is created when needed, and return its path.

    Raises:
        ConfigurationError: As `draft` does.
    """
    with draft(folder, model, description, key) as release:
        return release.target


@contextmanager
def draft(folder: Path, model: bytes, description: Description, key: SigningKey) -> Iterator[Draft]:
    """Write the next version of `folder`; publish it on leaving the block.

    The block may open the draft like any release, and prevents its publication by
    raising: then nothing is left of it.

    Raises:
        ConfigurationError: The description is too long for a manifest, or somebody
            else published this version in the meantime.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _next_manifest(folder, model, description)
    statement = manifest.to_bytes()
    if len(statement) > MAX_MANIFEST_BYTES:
        msg = (
            f"a manifest has at most {MAX_MANIFEST_BYTES} bytes, got {len(statement)}: "
            "shorten the labels"
        )
        raise ConfigurationError(msg)
    release = Draft(
        path=Path(mkdtemp(prefix=".draft-", dir=folder)), target=folder / str(manifest.version)
    )
    try:
        _write(release.path / manifest.file.name, model)
        _write(release.path / MANIFEST_FILE, statement)
        _write(release.path / SIGNATURE_FILE, key.sign(signed_message(statement)))
        release.path.chmod(0o755)
        _sync_directory(release.path)
        yield release
        _move(release)
    finally:
        shutil.rmtree(release.path, ignore_errors=True)


def load_or_create_key(path: Path, entropy: Entropy) -> SigningKey:
    """Return the signing key in `path`; on first use create it, and `path` + ".pub".

    The private key is a PEM file that only its owner may read (mode 0600). Keep it
    off the devices, and off every machine that only trains.

    Raises:
        ConfigurationError: `path` holds something else, or others may read it.
    """
    if path.exists():
        exposed = path.stat().st_mode & 0o077
        if os.name == "posix" and exposed:
            msg = f"{path} can be read by others: chmod 600 it, and consider a new key"
            raise ConfigurationError(msg)
        key = SigningKey.from_pem(path.read_bytes())
    else:
        key = SigningKey.generate(entropy)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Created with its final mode: there is no moment in which others may read it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.to_pem())
    public_key_path(path).write_bytes(key.public.to_pem())
    return key


def public_key_path(path: Path) -> Path:
    """Return where the public half of the signing key in `path` is kept."""
    return path.with_name(path.name + ".pub")


def _next_manifest(folder: Path, model: bytes, description: Description) -> Manifest:
    last = max(version_numbers(path.name for path in folder.iterdir()), default=0)
    previous = (folder / str(last) / MANIFEST_FILE).read_bytes() if last else None
    return Manifest(
        version=last + 1,
        previous_sha256=None if previous is None else hashlib.sha256(previous).hexdigest(),
        file=ModelFile.of(model),
        description=description,
    )


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _move(release: Draft) -> None:
    try:
        # Fails if the version exists: a directory is never renamed over a full one.
        release.path.rename(release.target)
    except OSError as error:
        if not release.target.exists():
            raise
        msg = f"{release.target} was published by somebody else just now: publish again"
        raise ConfigurationError(msg) from error
    _sync_directory(release.target.parent)


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
