from dataclasses import replace

import numpy as np
import pytest

from fedcore.errors import PeerProtocolError, RoundAbortedError
from fedcore.secagg import Plan, invite
from fedcore.secagg.messages import Delivery, EncryptedShares, Reveal, Roster, Survivors
from tests.fedcore.secagg.rehearsal import (
    RECEIVE,
    STAGES,
    Rehearsal,
    at_stage,
    complete_plan,
    refusal,
    whole_round,
)

by_stage = pytest.mark.parametrize("stage", STAGES)
PLAN = complete_plan(6, minimum_survivors=4, threshold=3)
SPARSE = Plan(12, 6, 4, 5, 16, 6)


def heard(stage, **absent):
    """A round whose clients have answered; the server has not heard them."""
    return at_stage(stage, PLAN, **absent).listen()


def receive(rehearsal, client, message):
    return RECEIVE[type(rehearsal.server)](rehearsal.server, client, message)


@by_stage
def test_an_answer_changes_nothing_but_a_new_state(stage):
    rehearsal = heard(stage)
    before = rehearsal.server
    once = receive(rehearsal, 1, rehearsal.replies[1])
    again = receive(rehearsal, 1, rehearsal.replies[1])
    assert once is not before
    assert rehearsal.server is before
    assert repr(once) == repr(again)


@by_stage
def test_a_second_answer_is_refused(stage):
    rehearsal = heard(stage)
    rehearsal.server = receive(rehearsal, 1, rehearsal.replies[1])
    for message in (rehearsal.replies[1], rehearsal.replies[2]):
        with refusal(PeerProtocolError, "client 1 has already answered"):
            receive(rehearsal, 1, message)


@by_stage
@pytest.mark.parametrize("stranger", [-1, 6, 2**32])
def test_a_stranger_is_refused(stage, stranger):
    rehearsal = heard(stage)
    with refusal(PeerProtocolError, f"client {stranger} was not asked"):
        receive(rehearsal, stranger, rehearsal.replies[1])


@pytest.mark.parametrize(
    ("stage", "since"), [("share", "advertise"), ("upload", "share"), ("reveal", "upload")]
)
def test_a_client_that_missed_a_stage_cannot_come_back(stage, since):
    rehearsal = heard(stage, c3=since)
    assert 3 not in rehearsal.requests
    with refusal(PeerProtocolError, "client 3 was not asked"):
        receive(rehearsal, 3, rehearsal.replies[1])


@pytest.mark.parametrize(
    ("stage", "name"),
    [("advertise", "joining"), ("share", "sharing"), ("upload", "uploading")],
)
def test_a_stage_with_fewer_than_the_minimum_is_closed_by_aborting(stage, name):
    rehearsal = at_stage(stage, PLAN).listen({0, 1, 2})
    with refusal(RoundAbortedError, "needed 4 clients, found 3") as caught:
        rehearsal.hear()
    assert (caught.value.stage, caught.value.needed, caught.value.found) == (name, 4, 3)


def test_unmasking_needs_the_threshold_of_shares_of_every_secret():
    enough = at_stage("reveal", PLAN, c0="upload").listen({4, 5})
    with refusal(RoundAbortedError, "at unmasking: needed 3 clients, found 2"):
        enough.hear()  # three reveals are only two about one of the three
    assert at_stage("reveal", PLAN, c0="upload").listen({5}).hear().outcome is not None


def test_the_server_knows_when_it_has_heard_enough():
    rehearsal = heard("reveal")
    states = [rehearsal.server]
    for client, reply in rehearsal.replies.items():
        states.append(RECEIVE[type(states[-1])](states[-1], client, reply))
    assert [state.complete for state in states] == [False, False, False, False, True, True, True]
    totals = {tuple(state.close().total.tolist()) for state in states if state.complete}
    assert len(totals) == 1


@pytest.mark.parametrize("change", ["one missing", "one too many", "to itself", "none"])
def test_boxes_for_the_wrong_peers_are_refused(change):
    rehearsal = heard("share", c5="advertise")
    boxes = dict(rehearsal.replies[1].boxes)
    box = boxes[0]
    wrong = {
        "one missing": {peer: box for peer in boxes if peer != 4},
        "one too many": boxes | {5: box},
        "to itself": {peer: box for peer in boxes if peer != 4} | {1: box},
        "none": {},
    }[change]
    with refusal(PeerProtocolError, "client 1 must send one box to each peer"):
        receive(rehearsal, 1, EncryptedShares(wrong))


def _wrong_reveals():
    seeds, keys = dict.fromkeys((0, 2, 4), b"s" * 36), {3: b"k" * 36}
    return {
        "a seed missing": Reveal({p: seeds[p] for p in (0, 2)}, keys),
        "a key missing": Reveal(seeds, {}),
        "its own seed": Reveal(seeds | {1: b"s" * 36}, keys),
        "the seed of one that dropped out": Reveal(seeds | keys, {}),
        "the key of a survivor": Reveal({p: seeds[p] for p in (0, 2)}, keys | {4: b"k" * 36}),
        "both secrets of a survivor": Reveal(seeds, keys | {4: b"k" * 36}),
        "both secrets of one that dropped out": Reveal(seeds | keys, keys),
        "a share of one that never shared": Reveal(seeds, keys | {5: b"k" * 36}),
        "nothing": Reveal({}, {}),
    }


@pytest.mark.parametrize("what", _wrong_reveals())
def test_a_reveal_that_is_not_one_secret_of_each_peer_is_refused(what):
    rehearsal = heard("reveal", c3="upload", c5="share")
    with refusal(PeerProtocolError, "client 1 must reveal one secret of each of its 4 peers"):
        receive(rehearsal, 1, _wrong_reveals()[what])


def test_a_reveal_from_one_that_dropped_out_is_refused():
    rehearsal = heard("reveal", c3="upload")
    with refusal(PeerProtocolError, "client 3 was not asked"):
        receive(rehearsal, 3, rehearsal.replies[1])


def test_everybody_is_invited_to_the_same_plan():
    _, invitations = invite(PLAN)
    assert [invitation.client for invitation in invitations.values()] == list(range(6))
    assert {invitation.plan for invitation in invitations.values()} == {PLAN}


def test_requests_name_neighbours_that_answered_and_nobody_else():
    rehearsal = Rehearsal(SPARSE).listen({0}).hear()
    for client, request in rehearsal.requests.items():
        assert isinstance(request, Roster)
        assert request.keys.keys() == SPARSE.neighbours_of(client) - {0}
    rehearsal.listen({1}).hear()
    for client, request in rehearsal.requests.items():
        assert isinstance(request, Delivery)
        assert request.boxes.keys() == SPARSE.neighbours_of(client) - {0, 1}
    rehearsal.listen({2}).hear()
    survivors = Survivors(frozenset(range(3, 12)))
    assert rehearsal.requests == dict.fromkeys(range(3, 12), survivors)


def test_a_box_reaches_the_peer_it_was_made_for():
    rehearsal = heard("share")
    sent = {client: reply.boxes for client, reply in rehearsal.replies.items()}
    rehearsal.hear()
    for recipient, delivery in rehearsal.requests.items():
        for sender, box in delivery.boxes.items():
            assert box == sent[sender][recipient]


def test_the_sum_is_reduced_and_of_the_ring():
    plan = complete_plan(5, ring_bits=12)
    full = {client: np.full(6, 0xFFF, np.uint16) for client in range(5)}
    total = whole_round(plan, vectors=full).outcome.total
    assert total.dtype == plan.ring.dtype
    assert total.tolist() == [5 * 0xFFF % 0x1000] * 6


@pytest.mark.parametrize("secret", ["self_mask_shares", "mask_key_shares"])
def test_malformed_shares_abort_the_attempt_not_the_training(secret):
    rehearsal = heard("reveal", c3="upload")
    reveal = rehearsal.replies[0]
    shares = dict.fromkeys(getattr(reveal, secret), b"\xff" * 36)
    rehearsal.replies[0] = replace(reveal, **{secret: shares})
    with refusal(RoundAbortedError, "at unmasking"):
        rehearsal.hear()
