"""Who may take part: the files of a root that enrolls devices.

    root.key    0600  the root's secret key       stays with whoever enrolls, offline
    root.pub          its public key              pinned on every device
    root.crt          the root's own certificate  until when it enrolls
    NAME.key    0600  a device's secret key       stays on the device
    NAME.crt          its certificate             on the device; the root may publish it
    roster.json       all certificates            for whoever wants to know who is enrolled

How they are read and written, and which are refused, stands in `fedcore.keyfiles`.

The time comes in as an argument: Unix time in seconds.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedcore.crypto import Entropy
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.keyfiles import (
    PUBLIC_MODE,
    SECRET_MODE,
    create,
    load_authority,
    load_certificate,
    load_key,
    read_file,
)
from fedcore.secagg import Certificate

MOST_DAYS: Final = 3650
SECONDS_A_DAY: Final = 86_400
_ROOT: Final = "root"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""As in a certificate."""
_ROSTER_FORMAT: Final = 1


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
    data = read_file(path)
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
