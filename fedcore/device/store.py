"""Releases on a device: read a little, verify it, and only then believe it.

Every byte in a release folder comes from a stranger until the pinned key says
otherwise. So the order is fixed: manifest and signature are read up to a limit,
the signature is checked over the raw bytes, only then are they parsed, and only
the parsed size and hash decide how much of the model file is read and whether
it is the right one. What is handed on are the verified bytes, not a path: the
file may change after it was checked, the bytes cannot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fedcore.crypto.signatures import SIGNATURE_BYTES, VerifyKey
from fedcore.errors import VerificationError
from fedcore.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SIGNATURE_FILE,
    Manifest,
    parse_manifest,
    signed_message,
    version_numbers,
)


@dataclass(frozen=True, slots=True)
class VerifiedRelease:
    """A release whose signature, size and hash were checked; made by `open_release` only."""

    manifest: Manifest
    model: bytes = field(repr=False)


def open_release(
    folder: Path, trusted_key: VerifyKey | bytes, *, minimum_version: int = 1
) -> VerifiedRelease:
    """Read and verify the release in `folder`.

    Args:
        folder: One version, or a folder of versions, of which the highest is taken.
        trusted_key: The publisher's, pinned on this device; bytes are the 32 raw ones.
        minimum_version: The version installed now: an older one is an attack or an
            accident, however well it is signed.

    Raises:
        VerificationError: The release is incomplete, changed, signed by another key,
            or older than `minimum_version`.
    """
    key = trusted_key if isinstance(trusted_key, VerifyKey) else VerifyKey(trusted_key)
    release = newest(folder)
    statement = _read(release / MANIFEST_FILE, MAX_MANIFEST_BYTES)
    signature = _read(release / SIGNATURE_FILE, SIGNATURE_BYTES)
    key.verify(signed_message(statement), signature)
    manifest = parse_manifest(statement)
    if manifest.version < minimum_version:
        msg = (
            f"expected version {minimum_version} or newer, found {manifest.version}: "
            "a downgrade is refused"
        )
        raise VerificationError(msg)
    model = _read(release / manifest.file.name, manifest.file.size)
    manifest.file.verify(model)
    return VerifiedRelease(manifest, model)


def newest(folder: Path) -> Path:
    """Return `folder` if it is a release, else its subfolder with the highest number.

    Raises:
        VerificationError: There is neither.
    """
    try:
        if (folder / MANIFEST_FILE).is_file():
            return folder
        numbers = version_numbers(path.name for path in folder.iterdir())
    except OSError as error:
        msg = f"cannot read the release folder {folder}: {error.strerror}"
        raise VerificationError(msg) from error
    if not numbers:
        msg = f"expected {MANIFEST_FILE} or numbered versions in {folder}, found neither"
        raise VerificationError(msg)
    return folder / str(numbers[-1])


def _read(path: Path, limit: int) -> bytes:
    """Read at most `limit` bytes of a plain file."""
    try:
        # A pipe or a device would block, or never end.
        if not path.is_file():
            msg = f"{path.name} is missing from the release (or no plain file): fetch it again"
            raise VerificationError(msg)
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        msg = f"cannot read {path.name}: {error.strerror}"
        raise VerificationError(msg) from error
    if len(data) > limit:
        msg = f"{path.name} must have at most {limit} bytes, found more: fetch the release again"
        raise VerificationError(msg)
    return data
