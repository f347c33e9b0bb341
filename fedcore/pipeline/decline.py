"""A device's answer that it does not take part now: one of a few words, and nothing else.

    limit that is set        it is passed           its sensor cannot be read
    -----------------------  ---------------------  -------------------------
    opt-out file             opted_out              unknown_opt_out
    hours of the day         outside_hours
    external power           not_charging           unknown_power
    battery                  low_battery            unknown_battery
    temperature              too_warm               unknown_temperature
    load                     busy                   unknown_load
    free memory              low_memory             unknown_memory
    unmetered link           metered                unknown_link

A device that keeps its reasons to itself says `unfit` in place of all of them. The words
are a closed list on both sides: a device cannot write text into a coordinator's report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias, get_args

Reason: TypeAlias = Literal[
    "opted_out",
    "outside_hours",
    "not_charging",
    "low_battery",
    "too_warm",
    "busy",
    "low_memory",
    "metered",
    "unknown_opt_out",
    "unknown_power",
    "unknown_battery",
    "unknown_temperature",
    "unknown_load",
    "unknown_memory",
    "unknown_link",
    "unfit",
]
DECLINED: Final = "declined"
"""Entry of a device's reply: why it does not take part."""
DECLINE_CODE: Final = 1400
"""Of the error by which a device declines what is no part of a secure round. Flower's own
codes are below 100."""
OTHER: Final = "other"
"""What a word that is not in the list is counted as."""
_REASONS: Final[frozenset[object]] = frozenset(get_args(Reason))


def reason_in(fields: Mapping[str, object]) -> str | None:
    """Return why a reply declines, to be counted; None if it does not.

    Args:
        fields: Of the reply's record.
    """
    return counted_as(fields[DECLINED]) if DECLINED in fields else None


def counted_as(word: object) -> str:
    """Return a reason as it is counted, whatever a device wrote."""
    return str(word) if isinstance(word, str) and word in _REASONS else OTHER


def add_reasons(some: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Return how many devices declined for each reason, here and there."""
    return dict(Counter(some) + Counter(more))
