"""A device that does not want to take part says so, and nothing else."""

from copy import deepcopy

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients import DevicePolicy
from clients.guard import guard_with
from clients.journal import AnsweredJournal
from clients.sensors import KernelSensors, Readings
from fedcore.engine import to_record
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.pipeline import RECORD
from fedcore.pipeline.decline import DECLINE_CODE, DECLINED
from fedcore.pipeline.envelope import IDENTIFY
from tests.clients.coordinator import (
    MODEL,
    SIGNED,
    UNSIGNED,
    Coordinator,
    new_context,
    train,
    trained,
    training_app,
)


class Mood:
    """A guard whose answer a test changes."""

    def __init__(self):
        self.reason = None

    def __call__(self, context):
        return self.reason


def declines(reply, reason):
    """The reply is one record with one entry: the reason."""
    assert dict(reply.content) == {RECORD: ConfigRecord({DECLINED: reason})}


@pytest.fixture
def mood():
    return Mood()


@pytest.mark.parametrize("run", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_at_the_first_message_nothing_is_begun(mood, run):
    round_ = Coordinator(training_app(guard=mood), run)
    mood.reason = "too_warm"
    before = deepcopy(round_.contexts[0].state)
    declines(round_.ask(0, round_.message("advertise")), "too_warm")
    assert round_.contexts[0].state == before
    mood.reason = None
    assert "message" in round_.ask(0, round_.message("advertise")).content[RECORD]


def test_an_unfit_device_does_not_even_say_who_it_is(mood):
    round_ = Coordinator(training_app(guard=mood), SIGNED)
    question = round_.message("advertise", stage=IDENTIFY, plan=b"", message=b"")
    mood.reason = "opted_out"
    declines(round_.ask(0, question), "opted_out")
    mood.reason = None
    assert "message" in round_.ask(0, question).content[RECORD]


def test_what_the_policy_refuses_learns_no_reason(mood):
    round_ = Coordinator(training_app(DevicePolicy(minimum_cohort=5), guard=mood))
    mood.reason = "busy"
    with pytest.raises(PeerProtocolError, match="policy demands"):
        round_.ask(0, round_.message("advertise"))


@pytest.mark.parametrize("run", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_a_device_that_became_unfit_does_not_train_and_is_out_of_the_round(mood, run):
    calls = []

    def noted(message, context):
        calls.append(message)
        return train(message, context)

    app = training_app(guard=mood, train=noted)
    round_ = Coordinator(app, run).advance("upload")
    mood.reason = "low_battery"
    declines(round_.ask(0, round_.message("upload")), "low_battery")
    assert not calls
    mood.reason = None
    declines(round_.ask(0, round_.message("upload")), "low_battery")  # the same request again
    other = round_.message("upload", label="another")
    with pytest.raises(PeerProtocolError, match="in no round"):
        round_.ask(0, other)
    assert not calls


def test_a_device_that_declined_stays_out_after_it_was_restored_from_a_copy(mood, tmp_path):
    def journal(context):
        return AnsweredJournal(tmp_path / str(context.node_config["partition-id"]))

    round_ = Coordinator(training_app(guard=mood, journal=journal)).advance("upload")
    copy = deepcopy(round_.contexts[0])
    mood.reason = "busy"
    declines(round_.ask(0, round_.message("upload")), "busy")
    mood.reason, round_.contexts[0] = None, copy
    with pytest.raises(PeerProtocolError, match="answered"):
        round_.ask(0, round_.message("upload"))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_outside_of_secure_rounds_the_device_declines_with_an_error(mood, kind):
    app = training_app(guard=mood)

    @app.evaluate()
    def evaluate_message(message: Message, context: object) -> Message:
        return Message(RecordDict(), reply_to=message)

    mood.reason = "metered"
    reply = app(Message(RecordDict({"arrays": to_record(MODEL)}), 1000, kind), new_context(1))
    assert (reply.error.code, reply.error.reason) == (DECLINE_CODE, "metered")
    mood.reason = None
    reply = app(Message(RecordDict({"arrays": to_record(MODEL)}), 1000, kind), new_context(1))
    assert reply.has_content()


def test_questions_about_its_name_are_answered_by_an_unfit_device(mood):
    app = training_app(guard=mood)

    @app.query()
    def query_message(message: Message, context: object) -> Message:
        return Message(RecordDict(), reply_to=message)

    mood.reason = "busy"
    assert app(Message(RecordDict(), 1000, "query"), new_context(1)).has_content()


def test_the_kernels_files_decide_through_the_nodes_configuration(tmp_path):
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    app = training_app(guard=guard_with(lambda limits: KernelSensors(tmp_path)))
    plain = RecordDict({"arrays": to_record(MODEL)})
    node = new_context(1, **{"guard-most-celsius": 50})
    for text, reason in (("49000", None), ("51000", "too_warm"), ("", "unknown_temperature")):
        (zone / "temp").write_text(text)
        reply = app(Message(plain, 1000, "train"), node)
        assert (reply.error.reason if reply.has_error() else None) == reason
    (zone / "temp").write_text("20000")
    reply = app(Message(plain, 1000, "train"), node)
    assert (reply.content["arrays"]["w"].numpy() == trained(1)).all()


def test_a_node_with_a_limit_that_is_none_says_so_instead_of_working():
    app = training_app(guard=guard_with(lambda limits: Always()))
    plain = Message(RecordDict({"arrays": to_record(MODEL)}), 1000, "train")
    with pytest.raises(ConfigurationError, match="guard-charging"):
        app(plain, new_context(1, **{"guard-chargin": True}))


class Always:
    """Sensors of a device on which all is well."""

    def read(self):
        return Readings()
