import copy
from dataclasses import fields, replace

import numpy as np
import pytest

from fedcore.errors import ConfigurationError, PeerProtocolError, RoundAbortedError
from fedcore.secagg import Plan, invite
from fedcore.secagg.messages import Delivery, EncryptedShares, Reveal, Roster, Survivors
from fedcore.secagg.server import AwaitingReveals
from tests.fedcore.secagg.rehearsal import (
    AUTHORITY,
    STAGES,
    Rehearsal,
    at_stage,
    complete_plan,
    keys_of,
    refusal,
    seated,
    whole_round,
)

by_stage = pytest.mark.parametrize("stage", STAGES)
PLAN = complete_plan(6, minimum_survivors=4, threshold=3)
SIGNED = seated(replace(PLAN, authority=AUTHORITY))
SPARSE = Plan(12, 6, 4, 5, 16, 6)


def heard(stage, **absent):
    """A round whose clients have answered; the server has not heard them."""
    return at_stage(stage, SIGNED if stage == "endorse" else PLAN, **absent).listen()


def known_to(server):
    """All that a state holds, at this moment and comparable."""
    held = ((field.name, getattr(server, field.name)) for field in fields(server))
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else copy.copy(value)
        for name, value in held
        if not isinstance(value, AwaitingReveals)
    }


def receive(rehearsal, client, message):
    return rehearsal.receive(client, message)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "upload"])
def test_an_answer_changes_nothing_but_a_new_state(stage):  # for uploads see test_running_sum
    rehearsal = heard(stage)
    before, known = rehearsal.server, known_to(rehearsal.server)
    once = receive(rehearsal, 1, rehearsal.replies[1])
    again = receive(rehearsal, 1, rehearsal.replies[1])
    assert once is not before
    assert known_to(before) == known != known_to(once)
    assert known_to(once) == known_to(again)


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
    ("stage", "since"),
    [("share", "advertise"), ("upload", "share"), ("endorse", "upload"), ("reveal", "upload")],
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


def test_endorsements_below_the_threshold_abort_the_round():
    rehearsal = at_stage("endorse", SIGNED).listen({0, 1, 2, 3})
    with refusal(RoundAbortedError, "at endorsing: needed 3 clients, found 2"):
        rehearsal.hear()


@pytest.mark.parametrize(
    ("plan", "keys"),
    [
        (PLAN, keys_of(SIGNED)),
        (SIGNED, ()),
        (SIGNED, keys_of(SIGNED)[1:]),
        (replace(SIGNED, clients=7, neighbours=6, threshold=4), keys_of(SIGNED)),
        (replace(SIGNED, roster=bytes(32)), keys_of(SIGNED)),
    ],
    ids=["unsigned", "none", "others", "too few", "not named"],
)
def test_only_those_whom_the_plan_names_are_invited(plan, keys):
    with refusal(ConfigurationError, "identity keys that the plan names"):
        invite(plan, keys)


def test_each_client_gets_the_endorsements_of_its_neighbours_and_of_nobody_else():
    plan = seated(replace(SPARSE, authority=AUTHORITY))
    rehearsal = at_stage("endorse", plan, c0="upload").listen({1})
    sent = {client: reply.signature for client, reply in rehearsal.replies.items()}
    rehearsal.hear()
    assert rehearsal.requests.keys() == set(range(2, 12))
    for client, request in rehearsal.requests.items():
        assert request.signatures == {
            peer: sent[peer] for peer in plan.neighbours_of(client) & sent.keys()
        }


def test_a_survivor_that_did_not_endorse_may_still_reveal():
    rehearsal = at_stage("endorse", SIGNED).listen({3}).hear()
    assert 3 not in rehearsal.requests
    seeds = dict.fromkeys((0, 1, 2, 4, 5), b"s" * 36)
    assert rehearsal.receive(3, Reveal(seeds, {})).reveals.keys() == {3}


def test_unmasking_needs_the_threshold_of_shares_of_every_secret():
    enough = at_stage("reveal", PLAN, c0="upload").listen({4, 5})
    with refusal(RoundAbortedError, "at unmasking: needed 3 clients, found 2"):
        enough.hear()  # three reveals are only two about one of the three
    assert at_stage("reveal", PLAN, c0="upload").listen({5}).hear().outcome is not None


def test_the_server_knows_when_it_has_heard_enough():
    rehearsal = heard("reveal")
    states = [rehearsal.server]
    for client, reply in rehearsal.replies.items():
        states.append(states[-1].on_reveal(client, reply))
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
        receive(rehearsal, 1, EncryptedShares(wrong, b"c" * 32))


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


MALFORMED = {"too short": bytes(35), "too long": bytes(37), "no field element": b"\xff" * 36}


@pytest.mark.parametrize("secret", ["self_mask_shares", "mask_key_shares"])
@pytest.mark.parametrize("how", MALFORMED)
def test_a_malformed_share_loses_only_that_reveal(secret, how):
    rehearsal = heard("reveal", c3="upload")
    reveal = rehearsal.replies.pop(0)
    shares = dict(getattr(reveal, secret))
    shares[max(shares)] = MALFORMED[how]
    with refusal(PeerProtocolError, "a share must"):
        receive(rehearsal, 0, replace(reveal, **{secret: shares}))
    rehearsal.hear()
    assert rehearsal.outcome.survivors == {0, 1, 2, 4, 5}
    expected = sum(rehearsal.vectors[c].astype(int) for c in (0, 1, 2, 4, 5)) % 2**16
    assert rehearsal.outcome.total.tolist() == expected.tolist()


def _taken_keys(first):
    """Advertisements of client 1 with a key that is used already or by nobody else."""
    own = first[1]
    return {
        "the mask key of another": replace(own, mask_key=first[0].mask_key),
        "the share key of another": replace(own, share_key=first[0].share_key),
        "the mask key of another as share key": replace(own, share_key=first[0].mask_key),
        "one key twice": replace(own, share_key=own.mask_key),
        "all of another": first[0],
    }


@pytest.mark.parametrize("what", _taken_keys(heard("advertise").replies))
def test_a_client_with_a_key_that_is_taken_loses_only_its_own_place(what):
    rehearsal = heard("advertise")
    rehearsal.server = receive(rehearsal, 0, rehearsal.replies.pop(0))
    wrong = _taken_keys(heard("advertise").replies)[what]
    del rehearsal.replies[1]
    with refusal(PeerProtocolError, "every key of client 1 must be its own, found one that is"):
        receive(rehearsal, 1, wrong)
    rehearsal.hear().advance()
    assert rehearsal.outcome.survivors == {0, 2, 3, 4, 5}


@pytest.mark.parametrize("field", ["mask_key", "share_key"])
@pytest.mark.parametrize(
    "point", [bytes(32), b"\1" + bytes(31), bytes(31)], ids=["zero", "order four", "short"]
)
def test_a_client_with_a_key_of_low_order_loses_only_its_own_place(field, point):
    rehearsal = heard("advertise")
    wrong = replace(rehearsal.replies.pop(1), **{field: point})
    with refusal(PeerProtocolError, "point of large order; drop that peer"):
        receive(rehearsal, 1, wrong)
    rehearsal.hear().advance()
    assert rehearsal.outcome.survivors == {0, 2, 3, 4, 5}
