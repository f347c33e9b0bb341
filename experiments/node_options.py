"""What a device's owner says on the command line of `deploy node`, and how apps are told.

Each option but those of the board itself is a key of the node's configuration, which apps
read and no coordinator sees: what the owner demands of a round (`clients.policy`), when
the device works (`clients.limits`), how far it stands back (`clients.priority`), and the
second parties that it trusts. One table says both; nothing is set unless it is asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final

from experiments.processes import WARM_SECONDS, Setting
from fedcore.errors import ConfigurationError
from fedcore.sealed import KEY_BYTES

REHEARSAL: Final = "rehearsal-seed"
MOST_DEVICES: Final = 65_520
Take = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a node.

    Attributes:
        name: As on the command line, without dashes before it.
        key: Of the node's configuration; empty for the board's own.
        take: Reads its value; None for a switch.
        unit: What the value is, in the help.
        help: One line.
        default: None if nothing is set without it.
    """

    name: str
    key: str
    take: Take | None
    unit: str
    help: str
    default: Setting | None = None

    @property
    def attribute(self) -> str:
        """Where argparse puts it."""
        return self.name.replace("-", "_")


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return what takes a whole number of a range."""

    def take(text: str) -> int:
        if not text.isdecimal() or not least <= int(text[:20]) <= most:
            msg = f"must be in {least}..{most}, got {text:.20}"
            raise argparse.ArgumentTypeError(msg)
        return int(text)

    return take


def number(least: float, most: float = float("inf"), *, open_below: bool = False) -> Take:
    """Return what takes a finite number of a range.

    Args:
        least: The range's begin.
        most: Its end.
        open_below: Whether `least` itself is outside.
    """

    def take(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (least <= value <= most and isfinite(value)) or (open_below and value == least):
            low = f"above {least:g}" if open_below else f"at least {least:g}"
            high = f" and at most {most:g}" if most < float("inf") else ""
            msg = f"must be {low}{high}, got {text:.20}"
            raise argparse.ArgumentTypeError(msg)
        return value

    return take


def one_of(*words: str) -> Callable[[str], str]:
    """Return what takes one of some words."""

    def take(text: str) -> str:
        if text not in words:
            msg = f"must be {' or '.join(words)}, got {text:.20}"
            raise argparse.ArgumentTypeError(msg)
        return text

    return take


def path(text: str) -> str:
    """Take the path of a file, which need not exist yet."""
    return str(Path(text).expanduser().resolve())


def key_in_hex(text: str) -> str:
    """Take 32 bytes as hexadecimal digits."""
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raw = b""
    if len(raw) != KEY_BYTES:
        msg = f"must be 64 hexadecimal digits, got {len(text)} letters"
        raise argparse.ArgumentTypeError(msg)
    return raw.hex()


_positive = number(0.0, open_below=True)

BOARD: Final = (
    Option(
        "poll", "", number(0.01, 3600.0), "SECONDS",
        "between two questions for work while a round goes on (default: %(default)s)", 0.2,
    ),
    Option(
        "poll-idle", "", number(0.01, 3600.0), "SECONDS",
        "at most, when it has been quiet for five times as long (default: %(default)s)", 3.0,
    ),
    Option(
        "keep-warm", "", number(0.0, 86_400.0), "SECONDS",
        "how long an app stays loaded after its last message (default: %(default)s)", WARM_SECONDS,
    ),
)  # fmt: skip
"""How the board itself runs."""

DEMANDS: Final = (
    Option(
        "minimum-cohort", "minimum-cohort", whole(2, MOST_DEVICES), "N",
        "refuse rounds of fewer devices (default: 2)",
    ),
    Option(
        "minimum-noise", "minimum-noise-multiplier", _positive, "X",
        "refuse rounds whose devices add less noise than this multiplier",
    ),
    Option("largest-clip", "largest-clip", _positive, "X", "refuse a larger bound on the norm"),
    Option(
        "minimum-same-model", "minimum-same-model", whole(1, MOST_DEVICES), "N",
        "refuse buffers in which fewer trained from the same model (default: 2)",
    ),
    Option(
        "least-trainers", "least-trainers", whole(1, MOST_DEVICES), "N",
        "refuse rounds that show a weight's sum over fewer devices (default: 2)",
    ),
    Option("no-parts", "allow-parts", None, "", "refuse rounds in which some train only a part"),
    Option(
        "helper-key", "helper-key", key_in_hex, "HEX",
        "the seed helper to trust, as `helper key` printed it; without it, none",
    ),
    Option(
        "teacher", "teacher-path", path, "DIR",
        "its own copy of the signed release that training is drawn towards",
    ),
    Option("teacher-key", "teacher-key", path, "FILE", "the key that signed it"),
    Option(
        "rehearse", REHEARSAL, whole(0, (1 << 62) - 1), "SEED",
        "draw masks and noise from a number: a trial with public data, protecting nobody",
    ),
)  # fmt: skip
"""What its owner demands of every round, and whom it trusts."""

LIMITS: Final = (
    Option("opt-out", "guard-opt-out", path, "FILE", "do not work while this file exists"),
    Option("hours", "guard-hours", str, "HH:MM-HH:MM", "work in these hours of the local day"),
    Option("charging", "guard-charging", None, "", "work only while it is charged"),
    Option(
        "least-battery", "guard-least-battery-percent", number(0.0, 100.0), "PERCENT",
        "do not work while a battery holds less",
    ),
    Option(
        "most-celsius", "guard-most-celsius", number(-100.0, 200.0), "C",
        "do not work while its warmest zone is warmer",
    ),
    Option(
        "most-load", "guard-most-load", _positive, "X",
        "do not work while more processes a core are runnable, over a minute",
    ),
    Option(
        "least-memory", "guard-least-memory-mib", _positive, "MIB",
        "do not work while less memory can be had",
    ),
    Option("metered", "guard-metered", path, "FILE", "work only while this file says `no`"),
    Option("no-reasons", "guard-reasons", None, "", "decline without telling which limit it was"),
    Option("nice", "nice", whole(0, 19), "N", "niceness of what trains, at least"),
    Option("oom-score", "oom-score", whole(0, 1000), "N", "have the kernel end it first, at least"),
)  # fmt: skip
"""When it works, and how far it stands back."""

PROFILE: Final = (
    Option(
        "profile", "profile", one_of("hardware", "none"), "WHAT",
        "told to runs with classes of devices, in powers of two: hardware (the default) or none",
    ),
    Option(
        "link-kbps", "profile-link-kbps", _positive, "KBPS",
        "speed of the slower way of its link, told with the hardware",
    ),
    Option("count-examples", "profile-examples", None, "", "tell how many examples it has, too"),
)  # fmt: skip
"""What it tells of itself."""

_SWITCHES: Final[Mapping[str, bool]] = {"no-reasons": False, "no-parts": False}
"""What a switch sets, where that is not true."""


def add_node_options(leaf: argparse.ArgumentParser) -> None:
    """Add all options of the tables."""
    for title, options in (
        ("how it runs", BOARD),
        ("what it demands of every round", DEMANDS),
        ("when it works, see docs/devices.md", LIMITS),
        ("what it tells of itself, see docs/fleet.md", PROFILE),
    ):
        group = leaf.add_argument_group(title)
        for option in options:
            flag = f"--{option.name}"
            if option.take is None:
                group.add_argument(flag, action="store_true", help=option.help)
            else:
                group.add_argument(
                    flag,
                    type=option.take,
                    metavar=option.unit,
                    default=option.default,
                    help=option.help,
                )


def configured(options: argparse.Namespace) -> dict[str, Setting]:
    """Return the keys of the node's configuration that the options set.

    Raises:
        ConfigurationError: The apps would refuse one.
    """
    settings = {
        option.key: value for option, value in _given((*DEMANDS, *LIMITS, *PROFILE), options)
    }
    check_configuration(settings)
    return settings


def check_configuration(settings: Mapping[str, Setting]) -> None:
    """Read a node's configuration as apps do, so that mistakes show before anything starts.

    Raises:
        ConfigurationError: A value is out of range, or does not fit another.
    """
    from clients.limits import limits_of  # noqa: PLC0415 - imports Flower
    from clients.priority import priority_of  # noqa: PLC0415 - imports Flower

    limits_of(settings)
    priority_of(settings)
    if ("teacher-path" in settings) != ("teacher-key" in settings):
        msg = "--teacher and --teacher-key belong together: a release is worth its signature"
        raise ConfigurationError(msg)


def arguments(options: argparse.Namespace) -> list[str]:
    """Return the command line that gives the same options."""
    given: list[str] = []
    for option, value in _given((*BOARD, *DEMANDS, *LIMITS, *PROFILE), options):
        if value != option.default:
            given.append(f"--{option.name}")
            given += [] if option.take is None else [str(value)]
    return given


def _given(
    table: tuple[Option, ...], options: argparse.Namespace
) -> Iterator[tuple[Option, Setting]]:
    """Yield the options that were set, and what they set."""
    for option in table:
        value = getattr(options, option.attribute)
        if option.take is None and value:
            yield option, _SWITCHES.get(option.name, True)
        elif option.take is not None and value is not None:
            yield option, value
