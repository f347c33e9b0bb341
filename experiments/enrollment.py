"""Who may take part: the files of a root that enrolls devices.

    root.key    0600  the root's secret key       stays with whoever enrolls, offline
    root.pub          its public key              pinned on every device
    root.crt          the root's own certificate  until when it enrolls
    NAME.key    0600  a device's secret key       stays on the device
    NAME.crt          its certificate             on the device; the root may publish it
    roster.json       all certificates            for whoever wants to know who is enrolled

Keys are PEM files of Ed25519 (RFC 8410); a certificate is the canonical bytes of
`fedcore.secagg.identity.Certificate`. No file is ever overwritten, a secret one never
exists with a wider mode, and one that others may read is not used.

The time comes in as an argument: Unix time in seconds.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from typing import Final, TypeAlias

from fedcore.crypto import Entropy
from fedcore.crypto.signatures import SigningKey, VerifyKey
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.secagg.identity import Certificate, Identity

MOST_DAYS: Final = 3650
SECONDS_A_DAY: Final = 86_400
SECRET_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
_ROOT: Final = "root"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""As in a certificate."""
_MOST_BYTES: Final = 64 << 20
_ROSTER_FORMAT: Final = 1
Files: TypeAlias = Mapping[Path, tuple[bytes, int]]
"""What to create: contents and mode of each file."""


@dataclass(frozen=True, slots=True)
class Root:
    """What it takes to enroll: the secret key, and until when it is meant to be used."""

    key: SigningKey
    certificate: Certificate

    def enroll(self, name: str, key: bytes, *, days: int, now: int) -> Certificate:
        """Return the certificate of a device.

        Args:
            name: Of the device.
            key: Its public key, 32 bytes.
            days: How long the certificate is valid.
            now: Unix time in seconds.

        Raises:
            ConfigurationError: The name or key is malformed, or the certificate would
                outlive the root.
        """
        expires_at = now + _seconds(days)
        if expires_at > self.certificate.expires_at:
            msg = (
                f"a certificate of {days} days would outlive the root, which ends on "
                f"{when(self.certificate.expires_at)}: pass fewer --days, or create a new root"
            )
            raise ConfigurationError(msg)
        if key == self.certificate.key:
            msg = "a device needs a key of its own, found the root's: create one for the device"
            raise ConfigurationError(msg)
        return Certificate.issue(self.key, name=name, key=key, expires_at=expires_at)


def is_name(text: str) -> bool:
    """Tell whether a device may be called `text`; it becomes part of file names."""
    return text != _ROOT and _NAME.fullmatch(text) is not None


def create_root(folder: Path, *, days: int, now: int, entropy: Entropy) -> list[Path]:
    """Create a root in `folder`; return its files.

    Raises:
        ConfigurationError: There is one already, or `days` is out of range.
    """
    key = SigningKey.generate(entropy)
    certificate = Certificate.issue(
        key, name=_ROOT, key=key.public.raw, expires_at=now + _seconds(days)
    )
    return create(
        {
            folder / f"{_ROOT}.key": (key.to_pem(), SECRET_MODE),
            folder / f"{_ROOT}.pub": (key.public.to_pem(), PUBLIC_MODE),
            folder / f"{_ROOT}.crt": (certificate.to_bytes(), PUBLIC_MODE),
        }
    )


def load_root(key_path: Path, now: int) -> Root:
    """Return the root whose secret key is in `key_path` and whose certificate is beside it.

    Raises:
        ConfigurationError: They are missing, malformed, not of each other, or it has expired.
    """
    key, path = load_key(key_path), key_path.with_suffix(".crt")
    certificate = load_certificate(path)
    check_certificate(certificate, key.public.raw, now, path)
    if certificate.key != key.public.raw:
        msg = f"{path} is the certificate of a device: pass the root's own key"
        raise ConfigurationError(msg)
    return Root(key, certificate)


def create_key(folder: Path, name: str, *, entropy: Entropy) -> list[Path]:
    """Create a device's key pair where it will be used; return its files.

    Raises:
        ConfigurationError: There is one already.
    """
    key = SigningKey.generate(entropy)
    return create(
        {
            folder / f"{name}.key": (key.to_pem(), SECRET_MODE),
            folder / f"{name}.pub": (key.public.to_pem(), PUBLIC_MODE),
        }
    )


def enroll_devices(
    root: Root, names: Iterable[str], folder: Path, *, days: int, now: int, entropy: Entropy
) -> list[Path]:
    """Create a secret key and a certificate for each of `names`; return the files.

    Raises:
        ConfigurationError: A name is malformed or taken; nothing was created.
    """
    files: dict[Path, tuple[bytes, int]] = {}
    for name in names:
        key = SigningKey.generate(entropy)
        certificate = root.enroll(name, key.public.raw, days=days, now=now)
        files[folder / f"{name}.key"] = (key.to_pem(), SECRET_MODE)
        files[folder / f"{name}.crt"] = (certificate.to_bytes(), PUBLIC_MODE)
    return create(files)


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
    return VerifyKey.from_pem(_read(path)).raw


def load_key(path: Path) -> SigningKey:
    """Return the secret key in `path`.

    Raises:
        ConfigurationError: It is missing or malformed, or others may read it.
    """
    return SigningKey.from_pem(_read(path, secret=True))


def load_certificate(path: Path) -> Certificate:
    """Return the certificate in `path`; its signature is not checked yet.

    Raises:
        ConfigurationError: It is missing or malformed.
    """
    try:
        return Certificate.from_bytes(_read(path))
    except PeerProtocolError as error:
        msg = f"{path} holds no certificate ({error}): pass a .crt file of this command"
        raise ConfigurationError(msg) from error


def check_certificate(certificate: Certificate, authority: bytes, now: int, path: Path) -> None:
    """Accept what `authority` signed and what has not expired.

    Raises:
        ConfigurationError: Anything else; names the file.
    """
    try:
        certificate.check(authority, now)
    except PeerProtocolError as error:
        msg = f"{path}: {error}"
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


def collect(folder: Path, authority: bytes, now: int) -> list[Certificate]:
    """Return the certificates of all devices in `folder`, by name.

    Args:
        folder: Holds .crt files; the root's own is passed over.
        authority: The root's public key, 32 bytes.
        now: Unix time in seconds.

    Raises:
        ConfigurationError: One is malformed, expired or not the root's, a name or a key
            is there twice, or there is none.
    """
    found: dict[str, Path] = {}
    certificates: list[Certificate] = []
    for path in sorted(folder.glob("*.crt")):
        certificate = load_certificate(path)
        check_certificate(certificate, authority, now, path)
        if certificate.key == authority:
            continue
        for mark in (f"name {certificate.name}", f"key {certificate.key.hex()}"):
            if mark in found:
                msg = f"{path} has the {mark} of {found[mark]}: keep one of them"
                raise ConfigurationError(msg)
            found[mark] = path
        certificates.append(certificate)
    if not certificates:
        msg = f"expected certificates of devices (NAME.crt) in {folder}, found none"
        raise ConfigurationError(msg)
    return sorted(certificates, key=lambda certificate: certificate.name)


def roster_json(authority: bytes, certificates: Iterable[Certificate]) -> bytes:
    """Return the contents of a roster file."""
    devices = [
        {
            "name": certificate.name,
            "key": certificate.key.hex(),
            "expires": when(certificate.expires_at),
            "certificate": b64encode(certificate.to_bytes()).decode("ascii"),
        }
        for certificate in certificates
    ]
    roster = {"format": _ROSTER_FORMAT, "authority": authority.hex(), "devices": devices}
    return (json.dumps(roster, indent=1) + "\n").encode("ascii")


def describe(path: Path, now: int) -> str:
    """Return what `path` is, in words, and nothing secret.

    Raises:
        ConfigurationError: It is none of our files, or a secret key that others may read.
    """
    data = _read(path)
    if b"PRIVATE KEY" in data[:64]:
        return f"secret key, not shown\n  public key  {load_key(path).public.raw.hex()}"
    if data.startswith(b"-----BEGIN"):
        return f"public key\n  key         {load_authority(path).hex()}"
    if data.startswith(b"{"):  # longer than any certificate's name
        return _describe_roster(data, path, now)
    return _describe_certificate(load_certificate(path), now)


def _describe_certificate(certificate: Certificate, now: int) -> str:
    left = certificate.expires_at - now
    state = f"in {left // SECONDS_A_DAY} days" if left > 0 else "EXPIRED: enroll the device again"
    return (
        f"certificate of {certificate.name}\n  key         {certificate.key.hex()}\n"
        f"  expires     {when(certificate.expires_at)} ({state})"
    )


def _describe_roster(data: bytes, path: Path, now: int) -> str:
    try:
        roster = json.loads(data)
        authority = str(roster["authority"])
        certificates = [
            Certificate.from_bytes(b64decode(device["certificate"], validate=True))
            for device in roster["devices"]
        ]
        for certificate in certificates:
            check_certificate(certificate, bytes.fromhex(authority), 0, path)
        first = min(certificates, key=lambda certificate: certificate.expires_at)
    except (ValueError, TypeError, KeyError, PeerProtocolError, RecursionError) as error:
        msg = (
            f"{path} must be a key, a certificate or a roster of this command, found none of these"
        )
        raise ConfigurationError(msg) from error
    expired = sum(certificate.expires_at <= now for certificate in certificates)
    return (
        f"roster of {len(certificates)} devices, {expired} expired\n  root        {authority}\n"
        f"  next to go  {first.name}, {when(first.expires_at)}"
    )


def when(seconds: int) -> str:
    """Return a Unix time as text, UTC."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):  # a certificate may name any time
        return f"second {seconds}"


def _seconds(days: int) -> int:
    if not 1 <= days <= MOST_DAYS:
        msg = f"--days must be in 1..{MOST_DAYS}, got {days}"
        raise ConfigurationError(msg)
    return days * SECONDS_A_DAY


def _read(path: Path, *, secret: bool = False) -> bytes:
    """Read a plain file; a secret one only if its owner alone can."""
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
