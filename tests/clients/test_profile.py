"""A device tells of itself in powers of two, what was asked for and its owner allows."""

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from clients.client_app import build_client_app
from clients.profile import class_of, profile_of, told
from fedcore.errors import ConfigurationError
from fedcore.job import DeviceClass, Job, Mixed, Profile
from fedcore.job.devices import LARGEST, rounded_down, rounded_up
from fedcore.models import Mlp
from fedcore.pipeline import Uniform

EVERYTHING = ("memory_mib", "cores", "link_kbps", "examples")
REAL = Job(
    model=Mlp(hidden=(8,)),
    weighting=Uniform(),
    devices=Mixed(classes=(DeviceClass(name="small", width=0.5), DeviceClass(name="l", cores=2))),
)


def node(job=REAL, **config):
    return Context(1, 1000, {"partition-id": 1, **config}, RecordDict(), {"job": job.to_json()})


@given(value=st.floats(0, 1e15))
def test_what_is_rounded_down_is_a_power_of_two_and_at_most_twice_as_small(value):
    bucket = rounded_down(value)
    assert bucket == 0 if value < 1 else bucket & (bucket - 1) == 0
    assert bucket <= value < 2 * bucket or value < 1 or bucket == LARGEST


@given(value=st.integers(0, LARGEST))
def test_what_is_rounded_up_is_a_power_of_two_and_less_than_twice_as_large(value):
    bucket = rounded_up(value)
    assert value <= bucket
    assert bucket < 2 * value or value == 0
    assert bucket & (bucket - 1) == 0


@given(st.dictionaries(st.sampled_from(EVERYTHING), st.integers() | st.text() | st.booleans()))
def test_whatever_a_device_says_its_profile_has_powers_of_two_or_nothing(said):
    profile = Profile.of(said)
    values = (profile.memory_mib, profile.cores, profile.link_kbps, profile.examples)
    assert all(value == 0 or not value & (value - 1) for value in values)


def test_a_real_device_tells_its_hardware_but_not_how_many_examples_it_has():
    answer = told(node(**{"profile-link-kbps": 5000}), REAL, EVERYTHING, lambda: 77)
    assert answer.keys() == {"memory_mib", "cores", "link_kbps"}
    assert answer["link_kbps"] == 4096
    assert Profile.of(answer) == profile_of(node(**{"profile-link-kbps": 5000}), REAL)
    assert answer["memory_mib"] > 0 < answer["cores"]


def test_its_owner_may_let_it_tell_more_or_nothing():
    assert told(node(**{"profile-examples": True}), REAL, EVERYTHING, lambda: 77)["examples"] == 128
    assert told(node(profile="none"), REAL, EVERYTHING, lambda: 77) == {}
    with pytest.raises(ConfigurationError, match="profile must be none or hardware"):
        told(node(profile="some"), REAL, EVERYTHING, lambda: 77)


def test_nobody_is_told_what_was_not_asked_for():
    assert told(node(), REAL, ("cores",), lambda: 77).keys() == {"cores"}


def test_memory_that_cannot_be_read_is_none(tmp_path):
    assert profile_of(node(), REAL, tmp_path / "nothing").memory_mib == 0
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemTotal:     3000000 kB\n")
    assert profile_of(node(), REAL, tmp_path / "meminfo").memory_mib == 2048


def test_a_device_finds_its_class_by_itself_and_one_too_small_takes_no_part():
    assert class_of(node(), Job()) is None
    assert class_of(node(), REAL) in {0, 1}
    huge = Mixed(classes=(DeviceClass(name="huge", memory_mib=LARGEST),))
    with pytest.raises(ConfigurationError, match="too small for the run"):
        class_of(node(), Job(weighting=Uniform(), devices=huge))


@pytest.mark.parametrize("link", [-1, "fast"])
def test_a_speed_that_is_none_is_refused(link):
    with pytest.raises(ConfigurationError, match="profile-link-kbps must be a number"):
        profile_of(node(**{"profile-link-kbps": link}), REAL)


def asked(**record):
    message = Message(RecordDict({"profile": ConfigRecord(record)}), 1000, "query.profile")
    vars(message.metadata)["_message_id"] = "1"
    return dict(build_client_app()(message, node()).content.config_records["profile"])


def test_the_client_app_answers_what_it_is_asked_and_its_name_always():
    assert asked() == {"label": "1"}
    assert asked(wanted=["cores"]).keys() == {"label", "cores"}
    assert asked(wanted="cores") == {"label": "1"}
