"""A device in a round with a seed helper: one message in, one message out."""

import pytest

from clients import DevicePolicy
from clients.journal import Answer, AnsweredJournal
from fedcore.crypto import KeyPair, ReplayedEntropy
from fedcore.pipeline import BOX, RECORD, Bonawitz, RunPlan, SeedHelper, decode_sum
from fedcore.pipeline.envelope import STAGES
from fedcore.ring import unpack
from fedcore.secagg.fields import write_u32
from fedcore.secagg.seed_helper import SeedBox, collect, open_round
from tests.clients.coordinator import (
    AUTHORITY,
    CLIENTS,
    Coordinator,
    new_context,
    payload,
    training_app,
)
from tests.clients.test_secagg_mod import noting, refused

HELPER = KeyPair.generate(ReplayedEntropy(b"helper"), "helper-key")
OTHER = KeyPair.generate(ReplayedEntropy(b"other"), "helper-key")
PINNED = DevicePolicy(helper_key=HELPER.public.hex())
RUN = RunPlan(secagg=SeedHelper(HELPER.public.hex()))


def upload_of(coordinator, client=0, **changes):
    return coordinator.message("upload", client, **({"message": write_u32(client)} | changes))


def sum_of(run, policy=PINNED, authority=None):
    """The mean that coordinator and helper get from one upload of every client."""
    coordinator = Coordinator(training_app(policy), run)
    plan = coordinator.bound.helper
    helper, adding, names = open_round(plan, HELPER, authority), collect(plan), []
    for client in range(CLIENTS):
        reply = coordinator.ask(client, upload_of(coordinator, client))
        helper = helper.on_box(SeedBox.from_bytes(reply.content[RECORD][BOX]), 0)
        adding = adding.on_input(client, unpack(payload(reply), plan.dim, plan.ring))
        names.append(tuple(reply.content[RECORD]["metrics"]))
    unmasking, request = adding.close()
    outcome = unmasking.on_mask_sum(helper.close(request.survivors).mask_sum())
    return decode_sum(coordinator.bound, outcome.total, len(outcome.survivors), names)


def test_one_upload_each_gives_the_mean_of_a_round_without_helper_bit_for_bit():
    with_helper = sum_of(RUN)
    masked = Coordinator(training_app(), RunPlan(secagg=Bonawitz())).finish()
    assert with_helper.delta.tobytes() == masked.delta.tobytes()
    assert with_helper.metrics == masked.metrics


def test_enrolled_devices_vouch_for_their_boxes():
    policy = DevicePolicy(helper_key=HELPER.public.hex(), authority=AUTHORITY)
    run = RunPlan(secagg=SeedHelper(HELPER.public.hex(), AUTHORITY))
    signed = sum_of(run, policy, bytes.fromhex(AUTHORITY))
    assert signed.delta.tobytes() == sum_of(RUN).delta.tobytes()


@pytest.mark.parametrize(
    ("policy", "run"),
    [
        (DevicePolicy(), RUN),
        (DevicePolicy(helper_key=OTHER.public.hex()), RUN),
        (PINNED, RunPlan(secagg=SeedHelper(OTHER.public.hex()))),
        (PINNED, RunPlan(secagg=SeedHelper())),
    ],
    ids=["pins none", "pins another", "another is named", "none is named"],
)
def test_a_device_trains_for_no_helper_but_the_one_that_it_pins(policy, run):
    calls = []
    coordinator = Coordinator(training_app(policy, train=noting(calls)), run)
    refused(coordinator, upload_of(coordinator), "the seed helper that it pins")
    assert calls == []
    assert list(coordinator.contexts[0].state) == []


def test_a_device_that_pins_a_helper_still_answers_rounds_without_one():
    Coordinator(training_app(PINNED)).finish()


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (b"", "4 more bytes"),
        (b"\x00\x00\x00", "4 more bytes"),
        (write_u32(0) + b"\x00", "ends after 4"),
        (write_u32(CLIENTS), "our index must be in 0..3, found 4"),
    ],
)
def test_an_invitation_of_another_form_is_refused(message, named):
    coordinator = Coordinator(training_app(PINNED), RUN)
    refused(coordinator, upload_of(coordinator, message=message), named)


@pytest.mark.parametrize("label", [stage for stage in STAGES if stage != "upload"])
def test_an_invitation_under_the_name_of_another_stage_is_refused(label):
    calls = []
    coordinator = Coordinator(training_app(PINNED, train=noting(calls)), RUN)
    refused(coordinator, upload_of(coordinator, stage=label), "arrived where upload is due")
    assert calls == []


def test_a_round_is_answered_once_even_by_a_device_that_forgot_it(tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    coordinator = Coordinator(training_app(PINNED, journal=lambda context: journal), RUN)
    answer = coordinator.ask(0, upload_of(coordinator))
    assert journal.last("1") == Answer(1, 1, STAGES.index("upload"))
    again = coordinator.ask(0, upload_of(coordinator))
    assert (payload(again), again.content[RECORD]) == (payload(answer), answer.content[RECORD])
    other = upload_of(coordinator, message=write_u32(1))
    refused(coordinator, other, "must be later than what this device answered")
    coordinator.contexts[0] = new_context(0)
    refused(coordinator, upload_of(coordinator), "answers later ones only")


def test_two_attempts_are_masked_under_different_seeds():
    replies = []
    for attempt in (1, 2):
        coordinator = Coordinator(training_app(PINNED), RUN, {"attempt": attempt})
        replies.append(coordinator.ask(0, upload_of(coordinator)))
    one, two = (reply.content[RECORD][BOX] for reply in replies)
    assert one != two
    assert payload(replies[0]) != payload(replies[1])
    assert SeedBox.from_bytes(one).client == SeedBox.from_bytes(two).client == 0


def test_nothing_is_left_of_the_round_on_the_device_but_what_it_sent():
    coordinator = Coordinator(training_app(PINNED), RUN)
    reply = coordinator.ask(0, upload_of(coordinator))
    state = coordinator.contexts[0].state
    sent = {f"fedcore.answer/{name}" for name in reply.content}
    assert set(state) == {"fedcore.round", "visits", "fedcore.answer", *sent}
    assert set(state["fedcore.answer"]) == {"request"}
    assert all(state[f"fedcore.answer/{name}"] == reply.content[name] for name in reply.content)


def test_without_retries_nothing_at_all_is_left_of_the_round():
    coordinator = Coordinator(training_app(PINNED, keep_answer=False), RUN)
    coordinator.ask(0, upload_of(coordinator))
    assert set(coordinator.contexts[0].state) == {"fedcore.round", "visits"}
    refused(coordinator, upload_of(coordinator), "must be later than what this device answered")
