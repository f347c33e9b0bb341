"""What a device's owner says on the command line is what the apps of the device read."""

import argparse
from dataclasses import fields

import pytest

from clients.deployed import policy_of
from clients.limits import Limits, key_of, limits_of
from clients.policy import DevicePolicy
from clients.priority import Priority, priority_of
from experiments.node_options import (
    BOARD,
    DEMANDS,
    LIMITS,
    PROFILE,
    add_node_options,
    arguments,
    configured,
)
from fedcore.errors import ConfigurationError

EVERYTHING = [
    *("--poll", "0.5", "--poll-idle", "60", "--keep-warm", "5", "--minimum-cohort", "5"),
    *("--minimum-noise", "0.5", "--largest-clip", "2", "--helper-key", "ab" * 32),
    *("--teacher", "/models/teacher", "--teacher-key", "/models/root.pub", "--rehearse", "7"),
    *("--opt-out", "/tmp/stop", "--hours", "22:00-06:00", "--charging", "--least-battery", "40"),
    *("--most-celsius", "70", "--most-load", "0.5", "--least-memory", "600"),
    *("--minimum-same-model", "3", "--least-trainers", "4", "--no-parts", "--profile", "none"),
    *("--link-kbps", "2000", "--count-examples"),
    *("--metered", "/run/metered", "--no-reasons", "--nice", "19", "--oom-score", "500"),
]


def parsed(*given):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_node_options(parser)
    return parser.parse_args(given)


def test_every_limit_of_a_device_has_an_option():
    keys = {option.key for option in LIMITS}
    assert keys == {key_of(field.name) for field in fields(Limits)} | {"nice", "oom-score"}


def test_the_apps_read_what_was_asked_for():
    settings = configured(parsed(*EVERYTHING))
    assert limits_of(settings) == Limits(
        opt_out="/tmp/stop", hours="22:00-06:00", charging=True, least_battery_percent=40.0,
        most_celsius=70.0, most_load=0.5, least_memory_mib=600.0, metered="/run/metered",
        reasons=False,
    )  # fmt: skip
    assert priority_of(settings) == Priority(nice=19, oom_score=500)
    assert settings["minimum-cohort"] == 5
    assert settings["minimum-noise-multiplier"] == 0.5
    assert settings["largest-clip"] == 2.0
    assert settings["helper-key"] == "ab" * 32
    assert settings["teacher-path"] == "/models/teacher"
    assert settings["rehearsal-seed"] == 7
    assert settings["profile"] == "none"
    assert settings["profile-link-kbps"] == 2000.0
    assert settings["profile-examples"] is True
    policy = policy_of(settings)
    assert (policy.minimum_same_model, policy.least_trainers, policy.allow_parts) == (3, 4, False)
    assert policy_of({}) == DevicePolicy()


def test_nothing_is_set_unless_it_is_asked_for():
    assert configured(parsed()) == {}
    assert arguments(parsed()) == []


def test_the_options_can_be_written_down_and_read_again():
    again = arguments(parsed(*EVERYTHING))
    assert vars(parsed(*again)) == vars(parsed(*EVERYTHING))


def test_no_two_options_have_one_name():
    names = [option.name for option in (*BOARD, *DEMANDS, *LIMITS, *PROFILE)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "given",
    [
        ("--poll", "0"), ("--nice", "20"), ("--nice", "-1"), ("--minimum-cohort", "1"),
        ("--least-battery", "101"), ("--most-load", "0"), ("--largest-clip", "inf"),
        ("--helper-key", "abc"), ("--oom-score", "1.5"), ("--minimum-noise", "nan"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_value_out_of_range_is_refused(given):
    with pytest.raises(argparse.ArgumentError, match="must be"):
        parsed(*given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--hours", "22-6"), "guard-hours must be like"),
        (("--teacher", "/models/teacher"), "belong together"),
    ],
)
def test_what_the_apps_would_refuse_is_refused_before_anything_starts(given, said):
    with pytest.raises(ConfigurationError, match=said):
        configured(parsed(*given))
