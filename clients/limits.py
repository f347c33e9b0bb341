"""The limits within which a device works for a federation, as its node configuration says.

    flower-supernode --node-config 'guard-charging=true guard-hours="22:00-06:00"' ...

Each field below is the key of the same name, with `guard-` before it and dashes in it. A
key that is no field, and one that is misspelt, is refused: a limit that its owner believes
in must not be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isfinite
from typing import Final

from fedcore.errors import ConfigurationError

PREFIX: Final = "guard-"
DAY: Final = 24 * 60
_MISSPELT: Final = 0.8
"""Similarity from which a key is taken for a misspelt one of ours."""
_HOURS: Final = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Limits:
    """What has to hold while a device works; None or false asks nothing.

    Attributes:
        opt_out: Path of a file; while it exists, the user wants no training.
        hours: Local time of the day, "HH:MM-HH:MM", the end not included; an end that is
            not after the start is on the next day.
        charging: Whether the device must be fed from outside, and its battery not emptying.
        least_battery_percent: Least charge of every battery, 0..100.
        most_celsius: Highest temperature of the warmest zone.
        most_load: Most runnable processes a core, averaged over the last minute.
        least_memory_mib: Least memory that can be had without swapping.
        metered: Path of a file that says `yes` or `no`; the device works while it says `no`.
        reasons: Whether the coordinator is told which limit it was; otherwise `unfit`.
    """

    opt_out: str | None = None
    hours: str | None = None
    charging: bool = False
    least_battery_percent: float | None = None
    most_celsius: float | None = None
    most_load: float | None = None
    least_memory_mib: float | None = None
    metered: str | None = None
    reasons: bool = True

    def __post_init__(self) -> None:
        """Check ranges."""
        battery = self.least_battery_percent
        for ok, name, rule in (
            (battery is None or 0 <= battery <= 100, "least_battery_percent", "in [0, 100]"),
            (_positive(self.most_load), "most_load", "above 0"),
            (_positive(self.least_memory_mib), "least_memory_mib", "above 0"),
            (
                self.most_celsius is None or isfinite(self.most_celsius),
                "most_celsius",
                "a finite number",
            ),
            (
                self.hours is None or _HOURS.fullmatch(self.hours) is not None,
                "hours",
                'like "22:00-06:00"',
            ),
            (self.opt_out != "", "opt_out", "the path of a file"),
            (self.metered != "", "metered", "the path of a file"),
        ):
            if not ok:
                msg = f"{key_of(name)} must be {rule}, got {getattr(self, name)!r}"
                raise ConfigurationError(msg)

    def in_hours(self, minute: int) -> bool:
        """Tell whether a minute of the local day, 0..1439, is within `hours`."""
        match = None if self.hours is None else _HOURS.fullmatch(self.hours)
        if match is None:
            return True
        start_hour, start_minute, end_hour, end_minute = map(int, match.groups())
        start, end = 60 * start_hour + start_minute, 60 * end_hour + end_minute
        return (minute - start) % DAY < ((end - start) % DAY or DAY)


def limits_of(config: Mapping[str, object]) -> Limits:
    """Return the limits that a node configuration sets.

    Raises:
        ConfigurationError: A key is unknown or misspelt, or a value of the wrong type or
            out of range.
    """
    known = {key_of(field.name): field for field in fields(Limits)}
    values: dict[str, object] = {}
    for key, value in config.items():
        if key in known:
            field = known[key]
            values[field.name] = _typed(key, value, str(field.type))
        elif key.startswith(PREFIX) or get_close_matches(key, known, n=1, cutoff=_MISSPELT):
            near = get_close_matches(key, known, n=1, cutoff=0)[0]
            msg = f"the node configuration has no {key!r}: is it {near!r}? known: {sorted(known)}"
            raise ConfigurationError(msg)
    return Limits(**values)  # type: ignore[arg-type] # each of its field's type


def key_of(name: str) -> str:
    """Return the key of the node configuration that sets the field `name`."""
    return PREFIX + name.replace("_", "-")


def _typed(key: str, value: object, annotation: str) -> object:
    """Return `value` if it is of the field's type; a number may come as either kind."""
    if annotation.startswith("bool"):
        right, wanted = isinstance(value, bool), "true or false"
    elif annotation.startswith("float"):
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        wanted = "a number"
    else:
        right, wanted = isinstance(value, str), "a string"
    if not right:
        msg = f"{key} must be {wanted}, got {value!r:.40} ({type(value).__name__})"
        raise ConfigurationError(msg)
    return value


def _positive(value: float | None) -> bool:
    return value is None or (value > 0 and isfinite(value))
