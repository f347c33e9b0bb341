"""What a device knows of its own state, as the kernel tells it in small files.

    external power   /sys/class/power_supply/*/{type,online,status}   [PSY]
    battery          /sys/class/power_supply/*/capacity, in percent
    temperature      /sys/class/thermal/thermal_zone*/temp, in m°C    [THERMAL]
    load             /proc/loadavg, first number                      [PROC]
    free memory      /proc/meminfo, MemAvailable                      [PROC]
    metered link     a file of the owner's that says `yes` or `no`
    opted out        a file of the user's that exists

A reading is None if it could not be made; what that means is decided elsewhere
(`clients.guard`). Where the kernel lists power supplies but has neither a battery nor an
adapter among them, the device runs on mains: so do boards and servers. Batteries of mice
and headsets (`scope` is Device) are nobody's concern here.

[PSY]     https://docs.kernel.org/power/power_supply_class.html
[THERMAL] https://docs.kernel.org/driver-api/thermal/sysfs-api.html
[PROC]    https://man7.org/linux/man-pages/man5/proc.5.html
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Final, Protocol

_FULL: Final = 100.0
_CHARGED_BY: Final = frozenset(("Charging", "Full"))
_STORES: Final = frozenset(("Battery", "UPS"))
_ONLINE: Final = {"0": False, "1": True, "2": True}
"""Of an adapter: off, fixed voltage, programmable voltage."""
_WORDS: Final = {"yes": True, "no": False}


@dataclass(frozen=True, slots=True)
class Readings:
    """A device's state at one moment; None for what could not be read.

    Attributes:
        opted_out: Whether the user's file exists.
        minute: Of the local day, 0..1439.
        external_power: Whether an adapter feeds the device.
        battery_percent: Of the emptiest battery; 100 for a device without one.
        celsius: Of the warmest zone.
        load: Runnable processes a core, averaged over a minute.
        memory_mib: That processes can still get without swapping.
        metered: Whether the link costs by volume.
    """

    opted_out: bool | None = False
    minute: int = 0
    external_power: bool | None = None
    battery_percent: float | None = None
    celsius: float | None = None
    load: float | None = None
    memory_mib: int | None = None
    metered: bool | None = None


class Sensors(Protocol):
    """Reads a device's state."""

    def read(self) -> Readings:
        """Return the state now."""
        ...


@dataclass(frozen=True, slots=True)
class KernelSensors:
    """The sensors of a Linux device.

    Attributes:
        root: Where `/proc` and `/sys` are.
        opt_out: Exists while the user wants no training; None for no such file.
        metered: Says `yes` or `no`; None for no such file.
        cores: That share the load.
        now: Tells the local time.
    """

    root: Path = Path("/")
    opt_out: Path | None = None
    metered: Path | None = None
    cores: int = os.cpu_count() or 1
    now: Callable[[], datetime] = datetime.now

    def read(self) -> Readings:
        """Return the state now."""
        now = self.now()
        external, battery = _power(self.root / "sys/class/power_supply")
        return Readings(
            opted_out=False if self.opt_out is None else _exists(self.opt_out),
            minute=60 * now.hour + now.minute,
            external_power=external,
            battery_percent=battery,
            celsius=_warmest(self.root / "sys/class/thermal"),
            load=_load(self.root / "proc/loadavg", self.cores),
            memory_mib=_available(self.root / "proc/meminfo"),
            metered=None if self.metered is None else _WORDS.get(_text(self.metered).lower()),
        )


def _power(folder: Path) -> tuple[bool | None, float | None]:
    """Return whether the device is fed from outside, and the charge of its emptiest battery."""
    supplies = _entries(folder)
    if supplies is None:
        return None, None
    online, batteries = list[bool | None](), list[Path]()
    for supply in supplies:
        if _text(supply / "scope") == "Device":
            continue
        kind = _text(supply / "type")
        if kind not in _STORES:
            online.append(_ONLINE.get(_text(supply / "online")) if kind else None)
        elif _text(supply / "present") != "0":
            batteries.append(supply)
    return _fed(online, [_text(battery / "status") for battery in batteries]), _charge(batteries)


def _fed(online: list[bool | None], batteries: list[str]) -> bool | None:
    """Return whether the device is fed from outside; a battery that empties has the last word."""
    if "Discharging" in batteries:
        return False
    if any(online) or any(status in _CHARGED_BY for status in batteries):
        return True
    if None in online:
        return None
    if online:
        return False
    return None if batteries else True


def _charge(batteries: list[Path]) -> float | None:
    """Return the charge in percent of the emptiest battery; None if any cannot be read."""
    charges = [_number(battery / "capacity") for battery in batteries]
    known = [charge for charge in charges if charge is not None and 0 <= charge <= _FULL]
    return min(known, default=_FULL) if len(known) == len(charges) else None


def _warmest(folder: Path) -> float | None:
    """Return the highest temperature; zones that are switched off answer with an error."""
    zones = _entries(folder) or ()
    found = [_number(zone / "temp") for zone in zones if zone.name.startswith("thermal_zone")]
    return max((value / 1000 for value in found if value is not None), default=None)


def _load(path: Path, cores: int) -> float | None:
    first, *_ = _text(path).split() or [""]
    load = _parse(first)
    return None if load is None or load < 0 else load / cores


def _available(path: Path) -> int | None:
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            kibibytes = _parse(value.removesuffix("kB").strip())
            return None if kibibytes is None or kibibytes < 0 else int(kibibytes) // 1024
    return None


def _exists(path: Path) -> bool | None:
    """Tell whether a file, or a link to one, is there; None if that cannot be known."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return True


def _entries(folder: Path) -> list[Path] | None:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return None


def _text(path: Path) -> str:
    """Return what a file says, without white space around it; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _number(path: Path) -> float | None:
    return _parse(_text(path))


def _parse(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None
