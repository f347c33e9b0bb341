"""Where a device's identity comes from: two files that its owner put there.

A node is configured with `identity`, the path of its certificate, and `identity-key`,
the path of the secret key to it (readable by its owner only). The coordinator sees
neither the paths nor the key.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from flwr.app import Context

from fedcore.crypto.signatures import SigningKey
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.secagg import Certificate, Identity

IdentitySource: TypeAlias = Callable[[Context], Identity | None]
"""Gives a node its identity; None if it is not enrolled."""


def identity_of(context: Context) -> Identity | None:
    """Return the identity that the node's configuration names; None if it names none.

    Raises:
        ConfigurationError: A file is missing, malformed, or readable by others.
    """
    certificate = context.node_config.get("identity")
    key = context.node_config.get("identity-key")
    if certificate is None and key is None:
        return None
    if not isinstance(certificate, str) or not isinstance(key, str):
        msg = "a node needs both identity and identity-key in its configuration, as paths"
        raise ConfigurationError(msg)
    return load_identity(Path(certificate), Path(key))


@lru_cache(maxsize=4)
def load_identity(certificate: Path, key: Path) -> Identity:
    """Return the identity that `certificate` and `key` hold.

    Raises:
        ConfigurationError: A file is missing, malformed, or the key is readable by others.
    """
    try:
        if stat.S_IMODE(key.stat().st_mode) & 0o077:
            msg = f"{key} must be readable by its owner only: chmod 600 {key}"
            raise ConfigurationError(msg)
        return Identity(
            Certificate.from_bytes(certificate.read_bytes()), SigningKey.from_pem(key.read_bytes())
        )
    except OSError as error:
        msg = f"{error.filename}: {error.strerror}; enroll the device, or correct its paths"
        raise ConfigurationError(msg) from error
    except PeerProtocolError as error:
        msg = f"{certificate} is no certificate: {error}"
        raise ConfigurationError(msg) from error
