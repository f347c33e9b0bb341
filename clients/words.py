"""What a device says when it fails: Flower sends an exception's text to the coordinator.

A text that fedcore wrote names rules and numbers, and tells an operator what to do. It may
also name a file of this device, and a path tells who lives here and what else is on the
disk: paths are taken out. Any other exception may quote an example, a key or a weight, so
only its class is told. The whole of it is in the device's own log.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedcore.errors import ConfigurationError, FedcoreError

HIDDEN: Final = "(a path of the device)"
_MORE: Final = r"[^\s'\",:;()]"
_PATH: Final = rf"(?<![\w.])~?/{_MORE}+"


class DeviceFailedError(FedcoreError):
    """Something failed on a device in words that stay there."""


@contextmanager
def kept_here(what: str, settings: Mapping[str, object]) -> Iterator[None]:
    """Keep the words of an exception on this device, where they may tell of it or its data.

    Args:
        what: That runs inside the block, as the coordinator reads it.
        settings: The node's configuration: the paths in it are taken out of all texts.

    Raises:
        FedcoreError: As it was raised inside, without paths.
        DeviceFailedError: Anything else was raised inside.
    """
    try:
        yield
    except FedcoreError as error:
        said = without_paths(str(error), settings)
        if said == str(error):
            raise
        raise ConfigurationError(said) from error
    except Exception as error:
        msg = f"{what} failed with {type(error).__name__}: see the device's log"
        raise DeviceFailedError(msg) from error


def without_paths(text: str, settings: Mapping[str, object]) -> str:
    """Return a text without the paths of this device.

    Example:
        >>> without_paths("/a b/state/.kept is full", {"journal": "/a b/state/kept"})
        '(a path of the device) is full'
        >>> without_paths("no room in /var/lib/x, 3 and/or 4", {})
        'no room in (a path of the device), 3 and/or 4'
    """
    named = [Path(value) for value in settings.values() if isinstance(value, str) and "/" in value]
    known = {str(path) for one in named for path in (one, one.parent) if len(path.parts) > 1}
    longest_first = sorted(known, key=len, reverse=True)
    paths = "|".join([*(re.escape(path) + f"{_MORE}*" for path in longest_first), _PATH])
    return re.sub(paths, HIDDEN, text)
