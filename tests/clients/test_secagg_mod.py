import struct
from copy import deepcopy
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto

from clients import DevicePolicy
from clients.secagg_mod import _system_entropy
from clients.words import DeviceFailedError
from fedcore.codec import Clip
from fedcore.crypto import SystemEntropy
from fedcore.engine import to_record
from fedcore.errors import (
    FedcoreError,
    LocalProtocolError,
    PeerProtocolError,
    RoundAbortedError,
)
from fedcore.pipeline import (
    RECORD,
    AdaptiveClip,
    Layer,
    NoSecAgg,
    PerLayerClip,
    RoundPlan,
    RunPlan,
)
from fedcore.pipeline.envelope import STAGES
from fedcore.privacy import CentralGaussian
from fedcore.secagg import Plan, decode, encode
from fedcore.secagg.messages import (
    Delivery,
    Endorsements,
    Invitation,
    MaskedInput,
    Roster,
    Survivors,
)
from tests.clients.coordinator import (
    CLIENTS,
    MODEL,
    SIGNED,
    UNSIGNED,
    Coordinator,
    new_context,
    payload,
    stages_of,
    train,
    trained,
    training_app,
)
from tests.fedcore.pipeline.rounds import private_plan
from tests.fedcore.secagg.rehearsal import SECRET_LOOKING

OPEN = DevicePolicy(require_masks=False)
LAYERS = (Layer("w", 12),)
"""Of `MODEL`."""
BOTH = pytest.mark.parametrize("run", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
LATER = [(run, stage) for run in (UNSIGNED, SIGNED) for stage in stages_of(run)[1:]]
AT_EACH_LATER_STAGE = pytest.mark.parametrize(
    ("run", "stage"),
    LATER,
    ids=[f"{'signed' if run == SIGNED else 'unsigned'}-{stage}" for run, stage in LATER],
)


def refused(coordinator, message, match=None, error=PeerProtocolError, client=0):
    """The device raises, which Flower turns into an error reply; it says no secret."""
    with pytest.raises(error, match=match) as caught:
        coordinator.ask(client, message)
    link = caught.value
    while link is not None:
        assert not SECRET_LOOKING.search(f"{link!s} {link!r} {link.args!r}")
        assert "\n" not in str(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def noting(calls):
    """A train function that notes the message it was called with."""

    def noted(message, context):
        calls.append(message)
        return train(message, context)

    return noted


@BOTH
def test_an_honest_round_gives_the_weighted_mean(run):
    mean = Coordinator(training_app(), run).finish()
    weights = np.arange(100, 100 + CLIENTS)
    expected = sum(w * (trained(n) - MODEL["w"]) for n, w in enumerate(weights)) / weights.sum()
    np.testing.assert_allclose(mean.delta, expected.ravel(), atol=1e-5)
    assert mean.weight == weights.sum()
    assert mean.metrics["loss"] == pytest.approx(
        np.average(range(CLIENTS), weights=weights), abs=1e-4
    )


def test_the_train_function_gets_the_message_it_would_get_without_the_mod():
    calls = []
    Coordinator(training_app(train=noting(calls))).advance("reveal")
    assert len(calls) == CLIENTS
    assert list(calls[0].content) == ["arrays", "config"]
    assert calls[0].content["config"]["lr"] == 0.1
    np.testing.assert_array_equal(calls[0].content["arrays"]["w"].numpy(), MODEL["w"])
    assert calls[0].metadata.message_type == "train"


def test_messages_of_other_kinds_pass_untouched():
    app = training_app()
    plain = Message(RecordDict({"arrays": to_record(MODEL)}), 1000, "train")
    reply = app(plain, new_context(1))
    np.testing.assert_array_equal(reply.content["arrays"]["w"].numpy(), trained(1))
    assert reply.content["metrics"]["num-examples"] == 101


@pytest.mark.parametrize(
    ("policy", "run", "changes", "rule"),
    [
        (DevicePolicy(), RunPlan(secagg=NoSecAgg()), {}, "masked uploads, found secagg=none"),
        (DevicePolicy(minimum_cohort=5), RunPlan(), {}, "at least 5 invited clients, found 4"),
        (DevicePolicy(), RunPlan(secagg=NoSecAgg()), {"clients": 1}, "at least 2 invited"),
        (
            DevicePolicy(minimum_noise_multiplier=0.5),
            RunPlan(),
            {},
            "a noise multiplier of at least 0.5, found 0.0",
        ),
        (
            DevicePolicy(minimum_noise_multiplier=0.5),
            private_plan(0.4),
            {},
            "a noise multiplier of at least 0.5, found 0.4",
        ),
        (
            DevicePolicy(largest_clip=2.0),
            RunPlan(clip=Clip(2.5)),
            {},
            "a clip of at most 2.0, found 2.5",
        ),
        (
            DevicePolicy(largest_clip=2.0),
            RunPlan(clip=AdaptiveClip(initial=1.0)),
            {"clip_norm": 2.01},
            "a clip of at most 2.0, found 2.01",
        ),
        (
            DevicePolicy(largest_clip=2.0),
            RunPlan(clip=PerLayerClip(3.0)),
            {"layers": LAYERS},
            "a clip of at most 2.0, found 3",
        ),
        (
            DevicePolicy(minimum_noise_multiplier=0.5),
            private_plan(privacy=CentralGaussian(noise_multiplier=9.0, delta=1e-5)),
            {},
            r"a noise multiplier of at least 0.5, found 0.0 on the devices \(privacy=central",
        ),
    ],
)
def test_a_plan_below_the_devices_policy_is_refused_by_rule(policy, run, changes, rule):
    calls = []
    coordinator = Coordinator(training_app(policy, train=noting(calls)), run, changes)
    stage = "advertise" if coordinator.bound.secagg else "upload"
    refused(coordinator, coordinator.message(stage), f"policy demands {rule}")
    assert calls == []
    assert list(coordinator.contexts[0].state) == []


@pytest.mark.parametrize(
    ("policy", "run"),
    [
        (DevicePolicy(minimum_cohort=4), RunPlan()),
        (DevicePolicy(minimum_noise_multiplier=0.5), private_plan(0.5)),
        (DevicePolicy(largest_clip=2.0), RunPlan(clip=Clip(2.0))),
        (DevicePolicy(minimum_cohort=1, require_masks=False), RunPlan()),
    ],
)
def test_a_plan_that_meets_the_policy_is_answered(policy, run):
    Coordinator(training_app(policy), run).finish()


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 4},
        {"minimum_survivors": 2},
        {"dim": 11},
        {"ring_bits": 31},
        {"context": bytes(32)},
        {"clients": 3, "neighbours": 2, "threshold": 2, "minimum_survivors": 2},
    ],
)
def test_masks_that_do_not_follow_from_the_plan_are_refused(change):
    coordinator = Coordinator(training_app(), RunPlan(dropout=0.2), {"clients": 6})
    honest = coordinator.bound.secagg
    changed = replace(honest, **change)
    assert changed != honest
    message = coordinator.message("advertise", message=encode(Invitation(0, changed), changed))
    refused(coordinator, message, "must be those that follow from the round's plan")


def test_a_lowered_threshold_is_refused_even_by_one():
    coordinator = Coordinator(training_app(), RunPlan(), {"clients": 20})
    honest = coordinator.bound.secagg
    lowered = replace(honest, threshold=honest.threshold - 1)
    message = coordinator.message("advertise", message=encode(Invitation(0, lowered), lowered))
    refused(coordinator, message, "must be those that follow")


def test_a_threshold_of_one_is_refused_even_if_no_plan_can_have_it():
    coordinator = Coordinator(training_app(), RunPlan(), {"clients": 20})
    honest = coordinator.bound.secagg
    data = encode(Invitation(0, honest), honest)
    word = struct.pack("<III", 20, 19, honest.threshold)
    assert data.count(word) == 1
    message = coordinator.message(
        "advertise", message=data.replace(word, struct.pack("<III", 20, 19, 1))
    )
    refused(coordinator, message, "threshold must be more than half")


@pytest.mark.parametrize(
    "damage",
    [
        {"plan": b"{}"},
        {"plan": b"\xff\xfe"},
        {"message": b""},
        {"message": b"fC\x01\x01"},
        {"message": b"garbage"},
    ],
)
def test_a_damaged_invitation_is_refused(damage):
    coordinator = Coordinator(training_app())
    refused(coordinator, coordinator.message("advertise", **damage))


def test_a_plan_that_cannot_work_is_the_coordinators_fault():
    plan = RoundPlan(
        run=RunPlan(dropout=0.6), run_id="1", round_number=1, attempt=1, clients=10, dim=12,
        model_digest="",
    )  # fmt: skip
    coordinator = Coordinator(training_app(DevicePolicy(most_dropout=0.6)))
    message = coordinator.message("advertise", plan=plan.to_bytes())
    refused(coordinator, message, "the coordinator's plan cannot work")


@pytest.mark.parametrize(
    "arrays",
    [
        {"w": MODEL["w"] + 1e-7},
        {"w": np.nextafter(MODEL["w"], 9)},
        {"v": MODEL["w"]},
        {"w": MODEL["w"].astype(np.float64)},
        {"w": MODEL["w"].reshape(4, 3)},
    ],
)
def test_a_model_that_is_not_the_plans_is_not_trained(arrays):
    calls = []
    coordinator = Coordinator(training_app(train=noting(calls))).advance("upload")
    content = RecordDict({"arrays": to_record(arrays)})
    message = coordinator.message("upload", content=content)
    refused(coordinator, message, "the model must be the one")
    assert calls == []


@pytest.mark.parametrize(
    "layers",
    [(Layer("v", 12),), (Layer("w", 6), Layer("v", 6)), (Layer("w", 11), Layer("w", 1))],
)
def test_layers_that_are_not_the_models_are_refused_before_training(layers):
    calls = []
    run = RunPlan(clip=PerLayerClip(1.0))
    coordinator = Coordinator(training_app(train=noting(calls)), run, {"layers": layers})
    coordinator.advance("upload")
    refused(coordinator, coordinator.message("upload"), "name the layers of the model")
    assert calls == []


def test_layers_that_are_the_models_are_clipped_and_answered():
    Coordinator(training_app(), RunPlan(clip=PerLayerClip(1.0)), {"layers": LAYERS}).finish()


@pytest.mark.parametrize("count", [0, 2])
def test_a_request_without_exactly_one_model_is_refused(count):
    coordinator = Coordinator(training_app()).advance("upload")
    content = RecordDict({f"arrays{index}": to_record(MODEL) for index in range(count)})
    message = coordinator.message("upload", content=content)
    refused(coordinator, message, f"one ArrayRecord, found {count}", FedcoreError)


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ((1, 1), (1, 1), False),
        ((2, 1), (1, 1), False),
        ((2, 1), (1, 9), False),
        ((1, 2), (1, 1), False),
        ((1, 1), (1, 2), True),
        ((1, 2), (2, 1), True),
        ((1, 1), (7, 1), True),
    ],
)
@pytest.mark.parametrize("secagg", ["masked", "clear"])
def test_no_round_or_attempt_is_answered_twice_or_after_a_later_one(first, second, allowed, secagg):
    run = RunPlan() if secagg == "masked" else RunPlan(secagg=NoSecAgg())
    stage = "advertise" if secagg == "masked" else "upload"
    app = training_app(OPEN)
    contexts = [new_context(client) for client in range(CLIENTS)]

    def invite_to(number, attempt):
        changes = {"round_number": number, "attempt": attempt}
        return Coordinator(app, run, changes, contexts)

    one, two = invite_to(*first), invite_to(*second)
    answer = payload(one.ask(0, one.message(stage)))
    if allowed:
        two.ask(0, two.message(stage))
    elif first == second:
        assert payload(two.ask(0, two.message(stage))) == answer
        other = two.message(stage, label="another")
        refused(two, other, "must be later than what this device answered last")
    else:
        refused(two, two.message(stage), "must be later than what this device answered last")


def test_another_run_counts_its_rounds_anew():
    app, contexts = training_app(), [new_context(client) for client in range(CLIENTS)]
    for run_id in ("1", "2"):
        coordinator = Coordinator(app, RunPlan(), {"run_id": run_id}, contexts)
        coordinator.ask(0, coordinator.message("advertise"))


def test_a_new_round_ends_the_old_one():
    app, contexts = training_app(), [new_context(client) for client in range(CLIENTS)]
    old = Coordinator(app, contexts=contexts).advance("reveal")
    new = Coordinator(app, RunPlan(), {"round_number": 2}, contexts)
    new.ask(0, new.message("advertise"))
    refused(old, old.message("reveal"))


@pytest.mark.parametrize(
    ("run", "reached", "asked"),
    [(run, *pair) for run in (UNSIGNED, SIGNED) for pair in permutations(stages_of(run)[1:], 2)],
)
def test_only_the_next_message_is_answered(run, reached, asked):
    coordinator = Coordinator(training_app(), run).advance(asked)
    early_or_late = coordinator.message(asked)
    other = Coordinator(training_app(), run).advance(reached)
    if stages_of(run).index(reached) == stages_of(run).index(asked) + 1:
        # The last one again: another label makes it another request.
        early_or_late = coordinator.message(asked, label="another")
    refused(other, early_or_late, error=FedcoreError)
    assert "fedcore.protocol" not in other.contexts[0].state


@pytest.mark.parametrize(
    ("run", "due", "claimed"),
    [(run, due, claimed) for run, due in LATER for claimed in STAGES if claimed != due],
)
def test_a_request_under_the_name_of_another_stage_is_refused_and_trains_nothing(run, due, claimed):
    """Else the survivors, say, could be asked for once as `endorse` and once as `reveal`."""
    calls = []
    coordinator = Coordinator(training_app(train=noting(calls)), run).advance(due)
    trained_so_far = len(calls)
    message = coordinator.message(due, content=coordinator.content)
    message.content[RECORD]["stage"] = claimed
    refused(coordinator, message, f"{claimed} request arrived where {due} is due")
    assert len(calls) == trained_so_far
    assert "fedcore.protocol" not in coordinator.contexts[0].state


@BOTH
def test_a_second_last_message_is_refused_unless_it_is_the_first_again(run):
    coordinator = Coordinator(training_app(), run).advance("reveal")
    revealed = payload(coordinator.ask(0, coordinator.message("reveal")))
    assert payload(coordinator.ask(0, coordinator.message("reveal"))) == revealed
    another = coordinator.message("reveal", label="another")
    refused(coordinator, another, "after this device's round was finished")
    refused(coordinator, another, "in no round")
    refused(coordinator, coordinator.message("reveal"), "in no round")


def test_another_survivors_message_is_refused_too():
    coordinator = Coordinator(training_app(), RunPlan(dropout=0.2), {"clients": 6})
    coordinator.contexts = [new_context(client) for client in range(6)]
    coordinator.advance("reveal")
    coordinator.ask(0, coordinator.message("reveal"))
    fewer = encode(Survivors(frozenset(range(5))), coordinator.bound.secagg)
    refused(coordinator, coordinator.message("reveal", message=fewer), "was finished")


@AT_EACH_LATER_STAGE
def test_before_it_is_invited_a_device_answers_nothing(run, stage):
    coordinator = Coordinator(training_app(), run).advance(stage)
    coordinator.contexts[0] = new_context(0)
    refused(coordinator, coordinator.message(stage), "in no round: invite it first")


def test_a_protocol_message_in_a_round_without_masks_is_refused():
    app, contexts = training_app(OPEN), [new_context(client) for client in range(CLIENTS)]
    clear = Coordinator(app, RunPlan(secagg=NoSecAgg()), {}, contexts)
    clear.ask(0, clear.message("upload"))
    masked = Coordinator(training_app()).advance("share")
    refused(clear, masked.message("share"), "in no round")


@AT_EACH_LATER_STAGE
def test_the_state_is_gone_after_a_message_that_breaks_the_protocol(run, stage):
    coordinator = Coordinator(training_app(), run).advance(stage)
    assert "fedcore.protocol" in coordinator.contexts[0].state
    refused(coordinator, coordinator.message(stage, message=b"fC\x01\x63"), error=FedcoreError)
    assert "fedcore.protocol" not in coordinator.contexts[0].state
    refused(coordinator, coordinator.message(stage), "in no round")


def test_the_state_is_gone_when_training_fails():
    def broken(message, context):
        msg = "out of memory"
        raise MemoryError(msg)

    coordinator = Coordinator(training_app(train=broken)).advance("upload")
    with pytest.raises(DeviceFailedError, match="failed with MemoryError") as failed:
        coordinator.ask(0, coordinator.message("upload"))
    assert "out of memory" not in str(failed.value)  # it might have been an example
    assert "fedcore.protocol" not in coordinator.contexts[0].state


def test_the_state_is_gone_while_the_train_function_runs():
    seen = []

    def looking(message, context):
        seen.append(set(context.state))
        return train(message, context)

    Coordinator(training_app(train=looking)).advance("reveal")
    assert seen == [{"fedcore.round"}] * CLIENTS


def through_bytes(context):
    """The Context as a SuperNode hands it from one process to the next."""
    message = context_to_proto(context)
    return context_from_proto(type(message).FromString(message.SerializeToString()))


@pytest.mark.parametrize("between", [through_bytes, deepcopy])
@pytest.mark.parametrize("feedback", [False, True])
@BOTH
def test_a_device_may_be_restarted_between_any_two_messages(run, between, feedback):
    run = replace(run, clip=Clip(0.5), error_feedback=feedback)
    kept = Coordinator(training_app(), run).finish()
    restarted = Coordinator(training_app(), run, between=between).finish()
    assert restarted.delta.tobytes() == kept.delta.tobytes()
    assert restarted.metrics == kept.metrics


def test_the_operating_systems_entropy_is_the_default():
    assert isinstance(_system_entropy(new_context(0)), SystemEntropy)
    app = training_app(seed=None)
    keys = set()
    for _ in range(3):
        coordinator = Coordinator(app)
        keys.add(payload(coordinator.ask(0, coordinator.message("advertise"))))
    assert len(keys) == 3


def test_a_replayed_simulation_repeats_its_bytes_but_not_from_attempt_to_attempt():
    def advertised(**changes):
        coordinator = Coordinator(training_app(), RunPlan(), changes)
        return payload(coordinator.ask(0, coordinator.message("advertise")))

    keys = [advertised(), advertised(attempt=2), advertised(round_number=2)]
    assert len(set(keys)) == 3
    assert advertised() == keys[0]


@BOTH
def test_a_device_left_out_of_the_survivors_reveals_nothing(run):
    coordinator = Coordinator(training_app(), replace(run, dropout=0.2), {"clients": 6})
    coordinator.contexts = [new_context(client) for client in range(6)]
    asked = coordinator.stages[3]
    coordinator.advance(asked)
    without = encode(Survivors(frozenset(range(1, 6))), coordinator.bound.secagg)
    refused(coordinator, coordinator.message(asked, message=without), "not among the survivors")


@BOTH
def test_too_few_survivors_are_not_unmasked(run):
    coordinator = Coordinator(training_app(), replace(run, dropout=0.2), {"clients": 6})
    coordinator.contexts = [new_context(client) for client in range(6)]
    asked = coordinator.stages[3]
    coordinator.advance(asked)
    few = encode(Survivors(frozenset(range(4))), coordinator.bound.secagg)
    refused(coordinator, coordinator.message(asked, message=few), "needed 5", RoundAbortedError)


def test_clients_that_were_told_different_plans_share_no_key():
    """The plan's digest is in every key: boxes of another plan do not open."""
    one = Coordinator(training_app(), RunPlan()).advance("upload")
    two = Coordinator(training_app(), RunPlan(seed=1)).advance("upload")
    refused(one, one.message("upload", message=two.message("upload").content[RECORD]["message"]))


def test_a_residual_of_another_model_is_our_own_mistake():
    app, contexts = training_app(OPEN), [new_context(client) for client in range(CLIENTS)]
    run = RunPlan(secagg=NoSecAgg(), error_feedback=True)
    first = Coordinator(app, run, {}, contexts)
    first.ask(0, first.message("upload"))
    contexts[0].state["fedcore.feedback"] = to_record({"whole": np.zeros(5, np.float32)})
    second = Coordinator(app, run, {"round_number": 2}, contexts)
    refused(second, second.message("upload"), "residual has shape", LocalProtocolError)


@pytest.mark.parametrize(
    ("field", "value"),
    [("stage", "unmask"), ("plan", "text"), ("message", 3), ("round", b"1"), ("counted", "1")],
)
def test_an_envelope_of_another_form_is_refused(field, value):
    coordinator = Coordinator(training_app())
    message = coordinator.message("advertise")
    message.content[RECORD][field] = value
    refused(coordinator, message, field)


def test_a_record_without_entries_is_refused():
    message = Message(RecordDict({RECORD: ConfigRecord()}), 1000, "train")
    refused(Coordinator(training_app()), message, "must hold 'stage'")


@BOTH
def test_what_a_device_keeps_of_a_finished_round_is_no_secret(run):
    coordinator = Coordinator(training_app(), run)
    replies = {stage: coordinator.play(stage) for stage in coordinator.stages}
    state = coordinator.contexts[0].state
    answer = {"fedcore.answer", f"fedcore.answer/{RECORD}"}
    assert set(state) == {"fedcore.round", "fedcore.protocol", "visits", *answer}
    assert len(state["fedcore.protocol"]["state"]) == 2
    # A hash of what was asked, and what the coordinator has: the last reply.
    assert len(state["fedcore.answer"]["request"]) == 32
    assert list(state[f"fedcore.answer/{RECORD}"]) == ["message"]
    assert state[f"fedcore.answer/{RECORD}"]["message"] == payload(replies["reveal"][0])


@pytest.mark.parametrize(
    ("run", "last"),
    [
        (UNSIGNED, {"reveal": Survivors}),
        (SIGNED, {"endorse": Survivors, "reveal": Endorsements}),
    ],
    ids=["unsigned", "signed"],
)
def test_the_requests_of_the_stages_are_what_the_states_wait_for(run, last):
    coordinator = Coordinator(training_app(), run)
    kinds = {"share": Roster, "upload": Delivery, **last}
    assert coordinator.stages == ("advertise", *kinds)
    for before, (stage, kind) in zip(coordinator.stages, kinds.items(), strict=False):
        coordinator.play(before)
        assert isinstance(coordinator.requests[0], kind), stage
    upload = Coordinator(training_app()).advance("upload")
    masked = decode(
        payload(upload.ask(0, upload.message("upload"))), MaskedInput, upload.bound.secagg
    )
    assert masked.vector.shape == (upload.bound.dim,)
    assert isinstance(upload.bound.secagg, Plan)
