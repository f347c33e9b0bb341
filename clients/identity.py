"""Where a device's identity comes from: two files that its owner put there.

A node is configured with `identity`, the path of its certificate, and `identity-key`,
the path of the secret key to it (readable by its owner only). The coordinator sees
neither the paths nor the key.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from flwr.app import Context

from fedcore.errors import ConfigurationError
from fedcore.keyfiles import load_identity
from fedcore.secagg import Identity

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
    return _load(certificate, key)


@lru_cache(maxsize=4)
def _load(certificate: str, key: str) -> Identity:
    return load_identity(Path(certificate), Path(key))
