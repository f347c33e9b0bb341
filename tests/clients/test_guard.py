"""Limits, as a node's configuration sets them, and the decision on what was read."""

import argparse
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from clients.guard import decide, guard_of, guard_with
from clients.limits import Limits, key_of, limits_of
from clients.priority import Priority, priority_of
from clients.sensors import Readings
from experiments.node_options import add_node_options, configured
from fedcore.errors import ConfigurationError

EVERY = Limits(
    opt_out="no", hours="22:00-06:00", charging=True, least_battery_percent=30, most_celsius=60,
    most_load=0.5, least_memory_mib=512, metered="metered",
)  # fmt: skip
FIT = Readings(
    opted_out=False, minute=22 * 60, external_power=True, battery_percent=30, celsius=60.0,
    load=0.5, memory_mib=512, metered=False,
)  # fmt: skip
PASSED = [
    ({"opted_out": True}, "opted_out"),
    ({"minute": 6 * 60}, "outside_hours"),
    ({"external_power": False}, "not_charging"),
    ({"battery_percent": 29.0}, "low_battery"),
    ({"celsius": 60.1}, "too_warm"),
    ({"load": 0.51}, "busy"),
    ({"memory_mib": 511}, "low_memory"),
    ({"metered": True}, "metered"),
]
UNREADABLE = [
    ({"opted_out": None}, "unknown_opt_out"),
    ({"external_power": None}, "unknown_power"),
    ({"battery_percent": None}, "unknown_battery"),
    ({"celsius": None}, "unknown_temperature"),
    ({"load": None}, "unknown_load"),
    ({"memory_mib": None}, "unknown_memory"),
    ({"metered": None}, "unknown_link"),
]
UNKNOWN = {"not_charging", *(reason for _, reason in UNREADABLE)}
WORST = Readings(True, 12 * 60, False, 0.0, 99.0, 9.0, 0, True)
BLIND = Readings(opted_out=None)
SAMPLES = {
    "opt_out": "/run/no", "hours": "08:00-09:30", "charging": True, "least_battery_percent": 40,
    "most_celsius": 55.5, "most_load": 2, "least_memory_mib": 300, "metered": "m", "reasons": False,
}  # fmt: skip


def context(**config):
    return Context(1, 1000, {"partition-id": 0, **config}, RecordDict(), {})


def test_at_its_limits_a_device_still_works():
    assert decide(EVERY, FIT) is None


@pytest.mark.parametrize(("change", "reason"), PASSED + UNREADABLE)
def test_what_is_beyond_a_limit_or_unknown_is_the_reason(change, reason):
    assert decide(EVERY, replace(FIT, **change)) == reason


@pytest.mark.parametrize("readings", [WORST, BLIND])
def test_a_limit_that_is_not_set_asks_nothing(readings):
    assert decide(Limits(), readings) is None


@pytest.mark.parametrize(("change", "reason"), PASSED + UNREADABLE)
def test_a_device_may_keep_its_reason_to_itself(change, reason):
    assert decide(replace(EVERY, reasons=False), replace(FIT, **change)) == "unfit" != reason


def test_the_users_word_is_the_first_reason():
    assert decide(EVERY, WORST) == "opted_out"


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_hours_begin_when_they_say_and_may_pass_midnight(start, end, minute):
    hours = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    inside = start <= minute < end if start < end else minute >= start or minute < end
    assert Limits(hours=hours).in_hours(minute) is inside


@pytest.mark.parametrize("field", fields(Limits), ids=lambda field: field.name)
def test_every_limit_is_set_by_its_key(field):
    value = SAMPLES[field.name]
    assert limits_of({key_of(field.name): value}) == Limits(**{field.name: value})


def test_other_keys_of_a_node_are_not_ours():
    config = {
        "partition-id": 3, "num-partitions": 9, "data-path": "x.npz", "identity": "a",
        "identity-key": "b", "journal": "c", "feedback": "d", "teacher-path": "e",
        "teacher-key": "f",
    }  # fmt: skip
    assert limits_of(config) == Limits()


@pytest.mark.parametrize(
    "key", ["guard-charge", "guard-", "gaurd-charging", "guard_charging", "guard-most-celcius"]
)
def test_a_key_that_is_misspelt_is_refused(key):
    with pytest.raises(ConfigurationError, match="is it 'guard-") as caught:
        limits_of({key: True})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guard-charging", "true"),
        ("guard-charging", 1),
        ("guard-least-battery-percent", True),
        ("guard-least-battery-percent", "30"),
        ("guard-least-battery-percent", 101),
        ("guard-least-battery-percent", -1),
        ("guard-most-celsius", float("nan")),
        ("guard-most-load", 0),
        ("guard-least-memory-mib", -5),
        ("guard-hours", "22-6"),
        ("guard-hours", "24:00-06:00"),
        ("guard-hours", "22:00-06:00\n"),
        ("guard-opt-out", ""),
        ("guard-metered", False),
    ],
)
def test_a_bad_value_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigurationError, match=f"^{key} must be ") as caught:
        limits_of({key: value})
    assert "\n" not in str(caught.value)


def test_without_limits_no_sensor_is_read():
    def no_sensors(limits):
        raise AssertionError(limits)

    assert guard_with(no_sensors)(context(**{"guard-reasons": False})) is None


def test_a_node_reads_the_files_that_its_configuration_names(tmp_path):
    node = context(**{"guard-opt-out": str(tmp_path / "no"), "guard-metered": str(tmp_path / "m")})
    (tmp_path / "m").write_text("no")
    assert guard_of(node) is None
    (tmp_path / "m").write_text("yes")
    assert guard_of(node) == "metered"
    (tmp_path / "no").touch()
    assert guard_of(node) == "opted_out"


def test_the_page_about_devices_names_every_key_and_its_example_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    parser = argparse.ArgumentParser()
    add_node_options(parser)
    for field in fields(Limits):
        assert f"| `{key_of(field.name)}` |" in page
    (command,) = re.findall(r"experiments\.deploy node (.*?)```", page, re.DOTALL)
    options = parser.parse_known_args(shlex.split(command.replace("\\\n", " ")))[0]
    config = configured(options)
    assert limits_of(config) != Limits()
    assert priority_of(config) == Priority(nice=19, oom_score=500)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "devices.md", "exec"), {})
    assert capsys.readouterr().out.strip() in {"works now", "outside_hours", "busy", *UNKNOWN}
