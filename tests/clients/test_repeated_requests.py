"""A reply that got lost: who asks the same again gets the same bytes, and nothing else."""

import pickle
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from hypothesis import given
from hypothesis import strategies as st

from clients import DevicePolicy
from clients.journal import AnsweredJournal
from clients.memory import ProtocolMemory
from clients.requests import request_digest
from fedcore.codec import Clip
from fedcore.crypto import KeyPair, ReplayedEntropy
from fedcore.engine import to_record
from fedcore.errors import FedcoreError, PeerProtocolError
from fedcore.pipeline import RECORD, VECTOR, NoSecAgg, RunPlan, SeedHelper
from fedcore.secagg import decode, encode
from fedcore.secagg.fields import write_u32
from fedcore.secagg.messages import Reveal, Survivors
from tests.clients.coordinator import (
    CLIENTS,
    MODEL,
    SIGNED,
    UNSIGNED,
    Coordinator,
    new_context,
    payload,
    stages_of,
    training_app,
)
from tests.clients.test_secagg_mod import noting, refused, through_bytes

HELPER = KeyPair.generate(ReplayedEntropy(b"helper"), "helper-key").public.hex()
CLEAR, HELPED = RunPlan(secagg=NoSecAgg()), RunPlan(secagg=SeedHelper(HELPER))
EVERYTHING = DevicePolicy(require_masks=False, helper_key=HELPER)
NAMES = {UNSIGNED: "unsigned", SIGNED: "signed", CLEAR: "clear", HELPED: "helped"}
STEPS = [
    *((run, stage) for run in (UNSIGNED, SIGNED) for stage in stages_of(run)),
    (CLEAR, "upload"),
    (HELPED, "upload"),
]
AT_EACH_STEP = pytest.mark.parametrize(
    ("run", "stage"), STEPS, ids=[f"{NAMES[run]}-{stage}" for run, stage in STEPS]
)
IN_ONE_STEP = (CLEAR, HELPED)


def request_of(coordinator, stage, /, **changes):
    if coordinator.run == HELPED:
        changes = {"message": write_u32(0)} | changes
    return coordinator.message(stage, **changes)


def due(run, stage, **options):
    """A coordinator whose next request is the one of `stage`, and that request."""
    coordinator = Coordinator(training_app(EVERYTHING, **options), run)
    if run not in IN_ONE_STEP:
        coordinator.advance(stage)
    return coordinator, request_of(coordinator, stage)


def pickled(context):
    """The Context as Ray hands it from one process to the next."""
    return pickle.loads(pickle.dumps(context))


def on_the_wire(reply):
    return recorddict_to_proto(reply.content).SerializeToString(deterministic=True)


@pytest.mark.parametrize("between", [deepcopy, through_bytes, pickled])
@AT_EACH_STEP
def test_the_same_request_gets_the_same_bytes_and_is_trained_for_once(run, stage, between):
    calls = []
    coordinator, _ = due(run, stage, train=noting(calls), seed=None)
    trained = len(calls)
    answer = coordinator.ask(0, request_of(coordinator, stage))
    assert len(calls) - trained == (stage == "upload")
    trained = len(calls)
    for _ in range(3):
        coordinator.contexts[0] = between(coordinator.contexts[0])
        again = request_of(coordinator, stage)
        reply = coordinator.ask(0, again)
        assert on_the_wire(reply) == on_the_wire(answer)
        assert reply.metadata.reply_to_message_id == again.metadata.message_id
    assert len(calls) == trained


@pytest.mark.parametrize("run", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_a_round_in_which_everything_is_asked_twice_is_the_same_round(run):
    class Twice(Coordinator):
        def ask(self, client, message):
            one, two = super().ask(client, deepcopy(message)), super().ask(client, message)
            assert on_the_wire(one) == on_the_wire(two)
            return two

    calls = []
    run = replace(run, clip=Clip(0.5), error_feedback=True)
    twice = Twice(training_app(train=noting(calls)), run)
    once = Coordinator(training_app(), run)
    assert twice.finish().delta.tobytes() == once.finish().delta.tobytes()
    assert len(calls) == CLIENTS
    for one, two in zip(once.contexts, twice.contexts, strict=True):
        assert one.state == two.state


@AT_EACH_STEP
def test_a_repetition_changes_nothing_on_the_device(run, stage, tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    run = run if run in IN_ONE_STEP else replace(run, error_feedback=True)
    coordinator, request = due(
        run, stage, journal=lambda context: journal if context.node_id == 1000 else None
    )
    coordinator.ask(0, request)
    state, noted = deepcopy(coordinator.contexts[0].state), journal.path.stat()
    coordinator.ask(0, request_of(coordinator, stage))
    assert coordinator.contexts[0].state == state
    after = journal.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (noted.st_ino, noted.st_mtime_ns)


@AT_EACH_STEP
def test_a_device_that_lost_its_memory_refuses_what_its_journal_has(run, stage, tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    coordinator, request = due(
        run, stage, journal=lambda context: journal if context.node_id == 1000 else None
    )
    coordinator.ask(0, request)
    coordinator.contexts[0] = new_context(0)
    refused(coordinator, request_of(coordinator, stage), "answers later ones only|in no round")


CHANGES = {
    "label": {"label": "another"},
    "round": {"round_number": 2},
    "stage": {"stage": "endorse"},
    "weight": {"weight_key": "another"},
    "message": {"message": b"fC\x01\x63"},
}


@pytest.mark.parametrize("change", list(CHANGES))
@AT_EACH_STEP
def test_a_request_that_differs_in_any_field_is_refused(run, stage, change):
    coordinator, request = due(run, stage)
    if CHANGES[change].get("stage") == stage:
        change = "label"
    coordinator.ask(0, request)
    refused(coordinator, request_of(coordinator, stage, **CHANGES[change]), error=FedcoreError)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"arrays": to_record({"w": np.nextafter(MODEL["w"], 9)})}),
        RecordDict({"arrays": to_record(MODEL), "config": ConfigRecord({"lr": 0.2})}),
        RecordDict({"arrays": to_record(MODEL)}),
        RecordDict(),
    ],
    ids=["model", "configuration", "no configuration", "nothing"],
)
@pytest.mark.parametrize("run", NAMES, ids=NAMES.values())
def test_a_request_with_another_model_or_configuration_is_refused(run, content):
    calls = []
    coordinator, request = due(run, "upload", train=noting(calls))
    coordinator.ask(0, request)
    trained = len(calls)
    refused(coordinator, request_of(coordinator, "upload", content=content), error=FedcoreError)
    assert len(calls) == trained


def test_another_list_of_survivors_gets_neither_a_new_answer_nor_the_old_one():
    coordinator = Coordinator(training_app(), RunPlan(dropout=0.2), {"clients": 6})
    coordinator.contexts = [new_context(client) for client in range(6)]
    coordinator.advance("reveal")
    coordinator.ask(0, coordinator.message("reveal"))
    fewer = encode(Survivors(frozenset(range(5))), coordinator.bound.secagg)
    refused(coordinator, coordinator.message("reveal", message=fewer), "was finished")


@pytest.mark.parametrize("run", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_only_the_last_stage_is_repeated(run):
    stages = stages_of(run)
    for before, stage in pairwise(stages):
        coordinator, _ = due(run, before)
        earlier = request_of(coordinator, before)
        coordinator.play(before)
        coordinator.ask(0, request_of(coordinator, stage))
        refused(coordinator, earlier, error=FedcoreError)


@pytest.mark.parametrize("changes", [{"attempt": 2}, {"round_number": 2}, {"run_id": "2"}])
def test_what_a_later_attempt_asks_in_the_same_words_is_asked_anew(changes):
    """A list of survivors names neither its run nor its attempt."""
    first = Coordinator(training_app(seed=None)).advance("reveal")
    request = first.message("reveal")
    revealed = payload(first.ask(0, first.message("reveal")))
    second = Coordinator(first.app, RunPlan(), changes, first.contexts)
    for stage in ("advertise", "share", "upload"):
        second.play(stage)
    if "round_number" in changes:  # which is on the envelope
        request = second.message("reveal")
    again = payload(second.ask(0, request))
    assert again != revealed
    second.state.on_reveal(0, decode(again, Reveal, second.bound.secagg))


def test_a_newer_round_drops_the_answer_of_the_last():
    app, contexts = training_app(EVERYTHING), [new_context(client) for client in range(CLIENTS)]
    old = Coordinator(app, HELPED, {}, contexts)
    old.ask(0, request_of(old, "upload"))
    assert f"fedcore.answer/{RECORD}.{VECTOR}" in contexts[0].state
    new = Coordinator(app, RunPlan(), {"round_number": 2}, contexts)
    new.ask(0, new.message("advertise"))
    assert f"fedcore.answer/{RECORD}.{VECTOR}" not in contexts[0].state
    refused(old, request_of(old, "upload"), "must be later")


@pytest.mark.parametrize("run", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_the_vector_is_kept_until_the_next_stage_and_only_once(run):
    coordinator, request = due(run, "upload")
    answer = coordinator.ask(0, request)
    name = f"{RECORD}.{VECTOR}"
    kept = coordinator.contexts[0].state[f"fedcore.answer/{name}"][VECTOR].data
    assert kept is answer.content[name][VECTOR].data
    again = coordinator.ask(0, request_of(coordinator, "upload"))
    assert again.content[name][VECTOR].data is kept
    after = stages_of(run)[stages_of(run).index("upload") + 1]
    coordinator, _ = due(run, after)
    coordinator.ask(0, request_of(coordinator, after))
    assert f"fedcore.answer/{name}" not in coordinator.contexts[0].state


def test_who_changes_a_repeated_reply_does_not_change_the_next():
    coordinator, request = due(CLEAR, "upload")
    answer = coordinator.ask(0, request)
    expected = on_the_wire(answer)
    for reply in (answer, coordinator.ask(0, request_of(coordinator, "upload"))):
        reply.content[RECORD]["metrics"].append("more")
        del reply.content[f"{RECORD}.{VECTOR}"][VECTOR]
    assert on_the_wire(coordinator.ask(0, request_of(coordinator, "upload"))) == expected


@AT_EACH_STEP
def test_an_invitation_below_a_policy_that_became_stricter_is_not_repeated(run, stage):
    coordinator, request = due(run, stage)
    coordinator.ask(0, request)
    coordinator.app = training_app(replace(EVERYTHING, minimum_cohort=CLIENTS + 1))
    again = request_of(coordinator, stage)
    if again.content[RECORD]["plan"]:
        refused(coordinator, again, "policy demands at least 5 invited clients")
    else:  # the plan was accepted when the round began
        assert payload(coordinator.ask(0, again))


def test_an_answer_is_bound_to_the_attempt_that_was_begun():
    context = new_context(0)
    coordinator = Coordinator(training_app(), contexts=[context])
    memory = ProtocolMemory(context)
    memory.begin(coordinator.plan)
    memory.keep_answer(b"request", RecordDict({RECORD: ConfigRecord({"message": b"reply"})}))
    assert memory.answer_to(b"request") == RecordDict({RECORD: ConfigRecord({"message": b"reply"})})
    assert memory.answer_to(b"another") is None
    for name, value in {"run": "2", "round": 2, "attempt": 2}.items():
        begun = context.state["fedcore.round"].copy()
        context.state["fedcore.round"][name] = value
        assert memory.answer_to(b"request") is None
        context.state["fedcore.round"] = begun


# What makes two requests the same


def asked(*, kind="train", **records):
    return lambda: Message(RecordDict(records), 1000, kind)


def weights(values=(1.0, 2.0), dtype=np.float32, name="w"):
    return to_record({name: np.array(values, dtype)})


DIFFERENT = [
    asked(),
    asked(kind="evaluate"),
    asked(a=ConfigRecord()),
    asked(b=ConfigRecord()),
    asked(a=MetricRecord()),
    asked(a=ArrayRecord()),
    asked(a=ConfigRecord({"x": 1})),
    asked(a=ConfigRecord({"x": 1.0})),
    asked(a=ConfigRecord({"x": True})),
    asked(a=ConfigRecord({"x": "1"})),
    asked(a=ConfigRecord({"x": b"1"})),
    asked(a=ConfigRecord({"x": [1]})),
    asked(a=ConfigRecord({"x": [1, 1]})),
    asked(a=ConfigRecord({"x": 1, "y": 1})),
    asked(a=ConfigRecord({"y": 1})),
    asked(a=ConfigRecord({"x": 1}), b=ConfigRecord()),
    asked(a=ConfigRecord(), b=ConfigRecord({"x": 1})),
    asked(a=ConfigRecord({"x": "\ud800"})),
    asked(a=weights()),
    asked(a=weights((1.0, 2.5))),
    asked(a=weights(dtype=np.float64)),
    asked(a=weights(name="v")),
    asked(a=weights(((1.0, 2.0),))),
    asked(a=ArrayRecord({"w": Array("float32", (2,), "other", weights()["w"].data)})),
    asked(a=to_record({"v": np.ones(2), "w": np.ones(2)})),
    asked(a=to_record({"w": np.ones(2), "v": np.ones(2)})),
]


def test_requests_that_differ_have_different_digests():
    assert len({request_digest(make()) for make in DIFFERENT}) == len(DIFFERENT)


def test_the_order_of_records_and_what_the_transport_writes_do_not_matter():
    one = Message(
        RecordDict({"a": ConfigRecord({"x": 1, "y": 2}), "b": MetricRecord()}), 1000, "train", ttl=9
    )
    two = Message(
        RecordDict({"b": MetricRecord(), "a": ConfigRecord({"y": 2, "x": 1})}), 7, "train"
    )
    assert request_digest(one) == request_digest(two)


scalars = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(), st.binary()
)
entries = st.dictionaries(st.text(max_size=3), scalars, max_size=3)


@given(one=entries, two=entries)
def test_digests_are_the_same_exactly_if_the_entries_are(one, two):
    def typed(values):
        return {name: (type(value), repr(value)) for name, value in values.items()}

    first, second = (asked(a=ConfigRecord(values))() for values in (one, two))
    same = request_digest(first) == request_digest(second)
    assert same == (typed(one) == typed(two))


def test_a_record_that_somebody_else_left_is_no_answer():
    coordinator, request = due(UNSIGNED, "advertise")
    coordinator.ask(0, request)
    coordinator.contexts[0].state["fedcore.answer"] = ConfigRecord({"request": "text"})
    refused(coordinator, request_of(coordinator, "advertise"), "request", PeerProtocolError)
