"""The key under which a device seals what it keeps: `state-key` of its node configuration.

`deploy node` makes one for each device. Without the key, files are written in the clear.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from fedcore.errors import ConfigurationError
from fedcore.keyfiles import read_file
from fedcore.sealed import Seal


def seal_of(node_config: Mapping[str, object]) -> Seal | None:
    """Return the device's key for its files; None if its configuration names none.

    Raises:
        ConfigurationError: The file is missing, is no key, or others may read it.
    """
    path = node_config.get("state-key")
    if path is None:
        return None
    if not isinstance(path, str):
        msg = f"state-key must be the path of a file, found {type(path).__name__}"
        raise ConfigurationError(msg)
    return _load(path)


@lru_cache(maxsize=4)
def _load(path: str) -> Seal:
    return Seal(read_file(Path(path), secret=True))
