"""The one way in which this package refuses a value."""

from __future__ import annotations

from fedcore.errors import ConfigurationError


def check(*rules: tuple[bool, str]) -> None:
    """Raise the message of the first rule that does not hold.

    Raises:
        ConfigurationError: A rule does not hold.
    """
    for holds, message in rules:
        if not holds:
            raise ConfigurationError(message)
