"""What a device does that trains first and is asked for its update later."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from clients import DevicePolicy
from fedcore.engine import to_record
from fedcore.engine.flower_private import Identity
from fedcore.errors import PeerProtocolError
from fedcore.pipeline import (
    RECORD,
    Buffer,
    NoSecAgg,
    PerLayerClip,
    RunPlan,
    SeedHelper,
    Uniform,
    model_digest,
)
from fedcore.pipeline.clipping import Layer
from fedcore.pipeline.decline import DECLINED
from fedcore.pipeline.envelope import CHECK_IN
from fedcore.secagg.fields import write_u32
from tests.clients.coordinator import (
    CLIENTS,
    MODEL,
    Coordinator,
    new_context,
    trained,
    training_app,
)

OTHER = {"w": MODEL["w"] + np.float32(1)}
NOW, OLD, FOREIGN = model_digest(MODEL), model_digest(OTHER), "ff" * 32
RUN = RunPlan(weighting=Uniform())
KEY = "ab" * 32
LENIENT = DevicePolicy(minimum_same_model=1)


@pytest.fixture(autouse=True)
def identity():
    with Identity(1, 1, 1).assumed():
        yield


def buffer(*staleness, versions=(NOW, OLD)):
    return Buffer(versions=versions, staleness=staleness or (0,) * CLIENTS)


def coordinator(*staleness, run=RUN, policy=None, versions=(NOW, OLD), app=None, **changes):
    """A buffer with these seats; nobody has trained yet."""
    seats = buffer(*staleness, versions=versions)
    return Coordinator(
        app or training_app(policy), run, {"buffer": seats, "model_digest": versions[0], **changes}
    )


def check_in(one, client, model=MODEL):
    """Let a device train."""
    content = RecordDict({"arrays": to_record(model), "config": ConfigRecord({"lr": 0.1})})
    fields = {"plan": b"", "message": b"", "content": content}
    return one.ask(client, one.message(CHECK_IN, client, **fields))


def play(one, models=None):
    """Let everybody train, and play the buffer to its end; return its sum, decoded."""
    for client in range(CLIENTS):
        check_in(one, client, (models or {}).get(client, MODEL))
    for stage in one.stages:
        one.play(stage)
    total = one.state.total
    return one.bound.sent.decode(total[: one.bound.update_dim])


def delta_of(client, model=MODEL):
    return (trained(client) - model["w"]).reshape(-1)


def test_a_device_that_checks_in_says_that_it_has_trained_and_nothing_else():
    reply = check_in(coordinator(), 0)
    assert dict(reply.content) == {RECORD: ConfigRecord({CHECK_IN: True})}


def test_the_sum_has_every_update_in_the_weight_of_its_age():
    policy = DevicePolicy(minimum_same_model=2)
    run = replace(RUN, dropout=0.0)
    one = coordinator(0, 1, 1, 0, run=run, policy=policy)
    found = play(one, {1: OTHER, 2: OTHER})
    old = 2**-0.5
    expected = delta_of(0) + delta_of(3) + old * (delta_of(1, OTHER) + delta_of(2, OTHER))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_device_trains_when_it_checks_in_and_not_again():
    visits = []

    def count(message, context):
        from tests.clients.coordinator import train  # noqa: PLC0415 - the function wrapped

        visits.append(context.node_id)
        return train(message, context)

    one = coordinator(app=training_app(LENIENT, train=count))
    play(one)
    assert sorted(visits) == [1000 + client for client in range(CLIENTS)]


def test_an_update_from_a_model_that_the_buffer_does_not_admit_is_not_sent():
    one = coordinator(policy=LENIENT, versions=(NOW, FOREIGN))
    for client in range(CLIENTS):
        check_in(one, client, OTHER if client == 2 else MODEL)
    one.advance("upload")
    with pytest.raises(PeerProtocolError, match="none of the 2 versions that the buffer admits"):
        one.ask(2, one.message("upload", 2))


def test_a_lie_about_who_has_which_model_is_noticed_by_the_device_that_has_another():
    """The plan says that four devices share a model; one of them alone has it."""
    one = coordinator(0, 0, 0, 0)
    for client in range(CLIENTS):
        check_in(one, client, MODEL if client == 0 else OTHER)
    one.advance("upload")
    one.ask(0, one.message("upload", 0))
    for client in (1, 2, 3):
        with pytest.raises(PeerProtocolError, match=f"seat {client} must name the model"):
            one.ask(client, one.message("upload", client))


@pytest.mark.parametrize(
    ("staleness", "dropout", "minimum", "found"),
    [
        ((0, 0, 0, 1), 0.0, 2, 1),
        ((0, 0, 1, 1), 0.25, 2, 1),
        ((0, 0, 1, 1), 0.0, 3, 2),
        ((0, 0, 0, 0), 0.25, 4, 3),
    ],
)
def test_a_device_demands_company_with_its_own_model_whoever_drops_out(
    staleness, dropout, minimum, found
):
    policy = DevicePolicy(minimum_same_model=minimum)
    one = coordinator(*staleness, run=replace(RUN, dropout=dropout), policy=policy)
    check_in(one, 0)
    with pytest.raises(PeerProtocolError, match=f"at least {minimum} members .* found {found}"):
        one.ask(0, one.message("advertise", 0))


def test_in_the_clear_there_is_nothing_to_hide_behind_and_nothing_is_demanded():
    open_policy = DevicePolicy(require_masks=False)
    one = coordinator(0, 0, 0, 1, run=replace(RUN, secagg=NoSecAgg()), policy=open_policy)
    check_in(one, 3, OTHER)
    reply = one.ask(3, one.message("upload", 3, content=RecordDict()))
    assert reply.has_content()


def test_with_a_helper_the_seat_is_the_index_that_the_device_is_invited_to():
    run = replace(RUN, secagg=SeedHelper(public_key=KEY), dropout=0.0)
    policy = DevicePolicy(helper_key=KEY)
    one = coordinator(0, 0, 1, 1, run=run, policy=policy)
    check_in(one, 2, OTHER)
    for seat in (0, 1):
        with pytest.raises(PeerProtocolError, match=f"seat {seat} must name the model"):
            one.ask(2, one.message("upload", 2, plan=one.plan.to_bytes(), message=write_u32(seat)))
        one = coordinator(0, 0, 1, 1, run=run, policy=policy)
        check_in(one, 2, OTHER)


@pytest.mark.parametrize("secagg", [NoSecAgg(), RUN.secagg], ids=["clear", "masks"])
def test_a_device_without_an_update_is_in_no_buffer(secagg):
    policy = DevicePolicy(require_masks=False)
    one = coordinator(run=replace(RUN, secagg=secagg), policy=policy)
    first = "upload" if isinstance(secagg, NoSecAgg) else "advertise"
    with pytest.raises(PeerProtocolError, match="has no update to give"):
        one.ask(0, one.message(first, 0, content=RecordDict()))
    assert not one.contexts[0].state  # and is free for the next


@pytest.mark.parametrize("changes", [{"attempt": 2}, {"round_number": 2}])
def test_an_update_leaves_its_device_once(changes):
    clear = replace(RUN, secagg=NoSecAgg())
    policy = DevicePolicy(require_masks=False)
    first = coordinator(run=clear, policy=policy)
    check_in(first, 0)
    message = first.message("upload", 0, content=RecordDict())
    sent = first.ask(0, message)
    assert sent.content == first.ask(0, message).content  # it got lost: the same bytes again
    later = coordinator(run=clear, app=first.app, **changes)
    later.contexts = first.contexts
    again = later.message("upload", 0, content=RecordDict())
    with pytest.raises(PeerProtocolError, match="gives each only once"):
        later.ask(0, again)
    check_in(later, 0)
    assert later.ask(0, again).has_content()


def test_an_update_is_gone_before_the_answer_that_holds_it_leaves():
    one = coordinator(policy=LENIENT)
    play(one)
    for context in one.contexts:
        assert not any("trained" in name for name in context.state)


def test_a_plan_that_names_other_layers_than_those_trained_is_refused():
    run = replace(RUN, clip=PerLayerClip(), secagg=NoSecAgg())
    policy = DevicePolicy(require_masks=False)
    for layers, fits in (((Layer("w", 12),), True), ((Layer("v", 12),), False)):
        one = coordinator(run=run, policy=policy, layers=layers)
        check_in(one, 0)
        message = one.message("upload", 0, content=RecordDict())
        if fits:
            assert one.ask(0, message).has_content()
        else:
            with pytest.raises(PeerProtocolError, match="must name the layers"):
                one.ask(0, message)


def test_a_device_that_is_unfit_declines_before_it_trains():
    one = coordinator(app=training_app(LENIENT, guard=lambda context: "low_battery"))
    reply = check_in(one, 0)
    assert reply.content[RECORD][DECLINED] == "low_battery"
    assert not one.contexts[0].state


def test_metrics_and_clips_ride_in_the_sum_as_in_a_round():
    one = coordinator(policy=LENIENT)
    mean = play(one)
    assert mean.shape == (12,)
    sums = one.bound.tally.decode(one.state.total[one.bound.update_dim :])
    assert sums[0] == CLIENTS  # each counts once, however old
    assert sums[2] / (1 << 16) == pytest.approx(sum(range(CLIENTS)))  # their losses


def test_what_is_kept_is_replaced_when_a_device_trains_again():
    context = new_context(0)
    one = coordinator(policy=LENIENT)
    one.contexts[0] = context
    check_in(one, 0)
    size = len(context.state)
    check_in(one, 0, OTHER)
    assert len(context.state) == size
