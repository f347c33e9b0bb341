"""The files of a deployment's parties, a folder for each, ready to be copied.

    offline/        root.key root.pub root.crt ca.key ca.crt    never leaves its owner
    coordinator/    ca.crt server.crt server.key root.pub admitted/NAME.pub
    NAME/           ca.crt root.pub node.auth device.key device.crt

Every secret file has mode 0600, and no file is ever overwritten: run again with more
devices, or with a folder of a party taken away, only what is missing is made. A device
that can, makes its identity itself (`enroll key`) and gets `device.crt` for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from experiments import certificates, enrollment
from fedcore.crypto import Entropy
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import ConfigurationError
from fedcore.keyfiles import PUBLIC_MODE, SECRET_MODE, create, load_identity, read_file

AUTHORITY: Final = "root.pub"
ADMITTED: Final = "admitted"
NODE_KEY: Final = "node.auth"
IDENTITY: Final = "device.crt"
IDENTITY_KEY: Final = "device.key"
RESERVED: Final = frozenset({"offline", "coordinator"})


@dataclass(frozen=True, slots=True)
class CoordinatorKeys:
    """The coordinator's folder.

    Attributes:
        folder: Where it is; absolute.
    """

    folder: Path

    def check(self) -> None:
        """Read what the SuperLink needs, so that mistakes show before it starts.

        Raises:
            ConfigurationError: A file is missing or malformed, or others may read the key.
        """
        _check_tls(self.folder)
        certificates.load_tls_certificate(self.folder / certificates.SERVER)
        read_file(self.folder / certificates.SERVER_KEY, secret=True)

    @property
    def admitted(self) -> dict[str, Path]:
        """Public keys of the SuperNodes to admit, by name."""
        return {path.stem: path for path in sorted((self.folder / ADMITTED).glob("*.pub"))}


@dataclass(frozen=True, slots=True)
class DeviceKeys:
    """A device's folder.

    Attributes:
        folder: Where it is; absolute.
    """

    folder: Path

    def check(self) -> None:
        """Read what the SuperNode needs, so that mistakes show before it starts.

        Raises:
            ConfigurationError: A file is missing or malformed, or others may read a key.
        """
        _check_tls(self.folder)
        read_file(self.folder / NODE_KEY, secret=True)
        load_identity(self.folder / IDENTITY, self.folder / IDENTITY_KEY)

    def settings(self) -> dict[str, str]:
        """Return what the node's configuration says of these files."""
        return {
            "identity": str(self.folder / IDENTITY),
            "identity-key": str(self.folder / IDENTITY_KEY),
            "authority": str(self.folder / AUTHORITY),
        }


def create_parties(
    out: Path,
    hosts: Sequence[str],
    names: Sequence[str],
    *,
    days: int,
    now: int,
    entropy: Entropy,
) -> list[Path]:
    """Create what is missing of all parties' files; return the folders.

    Args:
        out: Where the folders go.
        hosts: Names and addresses under which devices reach the coordinator.
        names: Of the devices.
        days: How long everything is valid.
        now: Unix time in seconds.
        entropy: Makes the identities.

    Raises:
        ConfigurationError: A name or host is malformed, or a file cannot be written.
    """
    if taken := RESERVED.intersection(names):
        msg = f"a device must not be called {min(taken)}: that folder is another party's"
        raise ConfigurationError(msg)
    offline, coordinator = out / "offline", out / "coordinator"
    if not (offline / "root.key").exists():
        enrollment.create_root(offline, days=days, now=now, entropy=entropy)
    if not (offline / certificates.CA_KEY).exists():
        certificates.create_ca(offline, days=days, now=now)
    if not coordinator.exists():
        certificates.create_server(offline, coordinator, hosts, days=days, now=now)
        create(_shared(offline, coordinator))
    root = enrollment.load_root(offline / "root.key", now)
    new = [name for name in names if not (out / name).exists()]
    for name in new:
        identity = SigningKey.generate(entropy)
        certificate = root.enroll(name, identity.public.raw, days=days, now=now)
        secret, public = certificates.new_node_key()
        create(
            {
                **_shared(offline, out / name),
                out / name / NODE_KEY: (secret, SECRET_MODE),
                out / name / IDENTITY_KEY: (identity.to_pem(), SECRET_MODE),
                out / name / IDENTITY: (certificate.to_bytes(), PUBLIC_MODE),
                coordinator / ADMITTED / f"{name}.pub": (public, PUBLIC_MODE),
            }
        )
    return [offline, coordinator, *(out / name for name in new)]


def _shared(offline: Path, folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Return what everybody gets: whom to trust."""
    return {
        folder / name: (read_file(offline / name), PUBLIC_MODE)
        for name in (certificates.CA, AUTHORITY)
    }


def _check_tls(folder: Path) -> None:
    if not folder.is_dir():
        msg = f"{folder} must be a folder of the command certs, found none: create or copy it"
        raise ConfigurationError(msg)
    certificates.load_tls_certificate(folder / certificates.CA)
