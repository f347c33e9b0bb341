"""The kernel's files are parsed for real, from a tree that stands for /proc and /sys."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from clients.sensors import KernelSensors, Readings

LAPTOP = {
    "sys/class/power_supply/AC/type": "Mains\n",
    "sys/class/power_supply/AC/online": "1\n",
    "sys/class/power_supply/BAT0/type": "Battery\n",
    "sys/class/power_supply/BAT0/present": "1\n",
    "sys/class/power_supply/BAT0/status": "Charging\n",
    "sys/class/power_supply/BAT0/capacity": "71\n",
    "sys/class/thermal/thermal_zone0/temp": "27800\n",
    "sys/class/thermal/thermal_zone1/temp": "61500\n",
    "sys/class/thermal/cooling_device0/type": "Processor\n",
    "proc/loadavg": "1.50 0.90 0.70 2/511 4711\n",
    "proc/meminfo": "MemTotal:        8000000 kB\nMemAvailable:    2097152 kB\nSwapFree: 0 kB\n",
}
BATTERY = "sys/class/power_supply/BAT0"
AC = "sys/class/power_supply/AC"


def tree(root: Path, files: dict[str, str | None]) -> KernelSensors:
    """The sensors of a device whose kernel shows these files; None is a file that is not there."""
    for name, text in files.items():
        if text is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return KernelSensors(root, cores=4, now=lambda: datetime(2026, 3, 1, 22, 15, tzinfo=UTC))


def test_a_laptop_that_charges_is_read(tmp_path):
    assert tree(tmp_path, LAPTOP).read() == Readings(
        opted_out=False, minute=22 * 60 + 15, external_power=True, battery_percent=71.0,
        celsius=61.5, load=0.375, memory_mib=2048, metered=None,
    )  # fmt: skip


def test_a_device_that_shows_nothing_is_known_by_nothing(tmp_path):
    assert tree(tmp_path, {}).read() == Readings(minute=22 * 60 + 15)


def test_a_board_without_battery_and_adapter_runs_on_mains(tmp_path):
    (tmp_path / "sys/class/power_supply").mkdir(parents=True)
    read = tree(tmp_path, {}).read()
    assert (read.external_power, read.battery_percent) == (True, 100.0)


@pytest.mark.parametrize(
    ("changes", "fed"),
    [
        ({f"{AC}/online": "0\n", f"{BATTERY}/status": "Discharging\n"}, False),
        ({f"{BATTERY}/status": "Discharging\n"}, False),  # a weak adapter does not keep up
        ({f"{BATTERY}/status": "Full\n"}, True),
        ({f"{BATTERY}/status": "Not charging\n"}, True),  # full enough, and the adapter feeds it
        ({f"{BATTERY}/status": "Unknown\n"}, True),
        ({f"{AC}/online": "0\n", f"{BATTERY}/status": "Not charging\n"}, False),
        ({f"{AC}/online": "0\n", f"{BATTERY}/status": "Charging\n"}, True),  # by another way
        ({f"{AC}/online": None, f"{BATTERY}/status": "Unknown\n"}, None),
        ({f"{AC}/online": "yes\n", f"{BATTERY}/status": None}, None),
        ({f"{AC}/type": None, f"{BATTERY}/status": None}, None),
        ({f"{AC}/type": None, f"{AC}/online": None, f"{BATTERY}/status": "Unknown\n"}, None),
        ({f"{AC}/type": "USB\n"}, True),
    ],
)
def test_power_comes_from_outside_unless_a_battery_empties(tmp_path, changes, fed):
    assert tree(tmp_path, LAPTOP | changes).read().external_power is fed


@pytest.mark.parametrize(
    ("changes", "percent"),
    [
        ({f"{BATTERY}/capacity": "0\n"}, 0.0),
        ({f"{BATTERY}/capacity": "101\n"}, None),
        ({f"{BATTERY}/capacity": "nan\n"}, None),
        ({f"{BATTERY}/capacity": ""}, None),
        ({f"{BATTERY}/capacity": None}, None),
        ({f"{BATTERY}/present": "0\n", f"{BATTERY}/capacity": None}, 100.0),
        ({f"{BATTERY}/present": None}, 71.0),
    ],
)
def test_a_charge_that_makes_no_sense_is_not_known(tmp_path, changes, percent):
    assert tree(tmp_path, LAPTOP | changes).read().battery_percent == percent


def test_the_emptiest_battery_counts_and_the_mouse_does_not(tmp_path):
    second, mouse = "sys/class/power_supply/BAT1", "sys/class/power_supply/hidpp_battery_0"
    more = {
        f"{second}/type": "Battery\n", f"{second}/status": "Unknown\n", f"{second}/capacity": "9\n",
        f"{mouse}/type": "Battery\n", f"{mouse}/scope": "Device\n",
        f"{mouse}/status": "Discharging\n", f"{mouse}/capacity": "3\n",
    }  # fmt: skip
    read = tree(tmp_path, LAPTOP | more).read()
    assert (read.external_power, read.battery_percent) == (True, 9.0)


def test_zones_that_are_switched_off_do_not_hide_the_others(tmp_path):
    off = {"sys/class/thermal/thermal_zone1/temp": "\n"}
    assert tree(tmp_path, LAPTOP | off).read().celsius == 27.8


@pytest.mark.parametrize("text", ["", "\n", "busy\n", "-1 0 0\n", "inf 0 0\n", "\xff\n"])
def test_a_load_that_makes_no_sense_is_not_known(tmp_path, text):
    assert tree(tmp_path, LAPTOP | {"proc/loadavg": text}).read().load is None


@pytest.mark.parametrize("text", ["", "MemFree: 1 kB\n", "MemAvailable: kB\n", "MemAvailable:\n"])
def test_memory_that_is_not_stated_is_not_known(tmp_path, text):
    assert tree(tmp_path, LAPTOP | {"proc/meminfo": text}).read().memory_mib is None


@pytest.mark.parametrize(
    ("text", "metered"),
    [("yes\n", True), ("NO", False), ("", None), ("perhaps\n", None), (None, None)],
)
def test_the_link_is_what_the_owners_file_says(tmp_path, text, metered):
    path = tmp_path / "metered"
    if text is not None:
        path.write_text(text)
    assert KernelSensors(tmp_path, metered=path).read().metered is metered


def test_the_users_file_opts_out_by_being_there(tmp_path):
    path = tmp_path / "no-training"
    assert KernelSensors(tmp_path, opt_out=path).read().opted_out is False
    path.symlink_to("nowhere")
    assert KernelSensors(tmp_path, opt_out=path).read().opted_out is True
    path.unlink()
    path.mkdir()
    assert KernelSensors(tmp_path, opt_out=path).read().opted_out is True


def test_a_path_through_a_file_says_nothing_about_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    assert KernelSensors(tmp_path, opt_out=tmp_path / "file" / "no").read().opted_out is None


def test_this_machine_has_a_load_and_memory():
    read = KernelSensors().read()
    assert read.load is not None
    assert read.load >= 0
    assert read.memory_mib is not None
    assert read.memory_mib > 0
