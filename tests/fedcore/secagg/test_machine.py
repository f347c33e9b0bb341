import copy
from itertools import product

import numpy as np
import pytest

from fedcore.crypto import ReplayedEntropy
from fedcore.errors import (
    LocalProtocolError,
    PeerProtocolError,
    ProtocolError,
    StateReusedError,
)
from fedcore.secagg import (
    CLIENT_TRANSITIONS,
    AwaitingDelivery,
    AwaitingEndorsements,
    AwaitingRoster,
    AwaitingSurvivors,
    Finished,
    OneShot,
    expected_request,
    join,
    step,
)
from fedcore.secagg.messages import Delivery, Endorsements, Invitation, Roster, Survivors
from tests.fedcore.secagg.rehearsal import (
    NOW,
    Rehearsal,
    complete_plan,
    identity_of,
    refusal,
    signed_plan,
    stages_of,
)

ENTROPY = ReplayedEntropy(b"machine")
PLANS = {"unsigned": complete_plan(5), "signed": signed_plan(5)}
VECTOR = complete_plan(5).ring.zeros(6)
ME = 2


def life_of(client, plan):
    """One state of each type, and the request that it waits for, from a real round."""
    rehearsal, states, requests = Rehearsal(plan), {}, {}
    for _ in stages_of(plan):
        state, request = rehearsal.states.get(client), rehearsal.requests[client]
        states[type(state)], requests[type(request)] = state, request
        rehearsal.listen().hear()
    states[Finished] = rehearsal.states[client]
    del states[type(None)]
    return states, requests


LIVES = {kind: life_of(ME, plan) for kind, plan in PLANS.items()}
STATES = {(kind, name): state for kind, life in LIVES.items() for name, state in life[0].items()}
REQUESTS = {(kind, name): x for kind, life in LIVES.items() for name, x in life[1].items()}
LEGAL = [
    (kind, state, request)
    for kind, state in STATES
    for request in CLIENT_TRANSITIONS[state]
    if (kind, request) in REQUESTS
]
ILLEGAL = [
    (kind, state, other, request)
    for (kind, state), (other, request) in product(STATES, REQUESTS)
    if request not in CLIENT_TRANSITIONS[state]
]


def proceed(state, request, **changes):
    """One step of the client whose life it is; a step overwrites its input."""
    terms = {"entropy": ENTROPY, "vector": VECTOR.copy(), "identity": identity_of(ME), "now": NOW}
    return step(state, request, **(terms | changes))


def test_the_table_speaks_of_every_state_and_every_request_but_the_invitation():
    assert set(CLIENT_TRANSITIONS) == {state for _, state in STATES}
    requests = {request for row in CLIENT_TRANSITIONS.values() for request in row}
    assert requests == {request for _, request in REQUESTS} - {Invitation}
    assert len(LEGAL) == 3 + 4
    assert len(ILLEGAL) == (4 + 5) * (4 + 5) - (3 * 4 + 1)


@pytest.mark.parametrize(("kind", "state", "request_type"), LEGAL)
def test_a_message_in_the_table_leads_where_the_table_says(kind, state, request_type):
    successor, reply = proceed(STATES[kind, state], REQUESTS[kind, request_type])
    possible = CLIENT_TRANSITIONS[state][request_type]
    assert type(successor) is possible[0 if kind == "unsigned" else -1]
    assert reply is not None


@pytest.mark.parametrize(("kind", "state", "other", "request_type"), ILLEGAL)
def test_a_message_outside_the_table_is_refused(kind, state, other, request_type):
    with refusal(
        PeerProtocolError, match=f"{request_type.__name__} arrived in state {state.__name__}"
    ):
        proceed(STATES[kind, state], REQUESTS[other, request_type])


def test_a_round_without_identities_has_no_endorsements():
    assert AwaitingEndorsements not in LIVES["unsigned"][0]
    assert Endorsements not in LIVES["unsigned"][1]


@pytest.mark.parametrize(("kind", "state"), STATES)
def test_a_state_knows_the_one_request_it_waits_for(kind, state):
    allowed = list(CLIENT_TRANSITIONS[state])
    assert expected_request(STATES[kind, state]) is (allowed[0] if allowed else None)


@pytest.mark.parametrize("request_type", [Roster, Survivors])
def test_a_signed_step_without_the_identity_is_refused(request_type):
    state = next(s for _, s, r in LEGAL if r is request_type)
    with refusal(ProtocolError, "identity|enroll it first"):
        proceed(STATES["signed", state], REQUESTS["signed", request_type], identity=None)


def test_an_unsigned_step_needs_no_identity():
    for kind, state, request in LEGAL:
        if kind == "unsigned":
            proceed(STATES[kind, state], REQUESTS[kind, request], identity=None)


def test_a_new_client_waits_for_the_roster():
    state, _ = join(Invitation(1, complete_plan(5)), ENTROPY)
    assert expected_request(state) is Roster


def test_a_state_is_taken_once():
    cell = OneShot(STATES["signed", AwaitingSurvivors])
    assert cell.take() is STATES["signed", AwaitingSurvivors]
    for _ in range(2):
        with refusal(StateReusedError, "already used"):
            cell.take()


def test_a_state_stays_used_when_its_step_failed():
    cell = OneShot(STATES["signed", AwaitingSurvivors])
    with refusal(PeerProtocolError):
        proceed(cell.take(), Survivors(frozenset({0, 1})))
    with refusal(StateReusedError):
        cell.take()


@pytest.mark.parametrize(("kind", "state", "request_type"), LEGAL)
def test_a_step_leaves_the_state_it_started_from_unchanged(kind, state, request_type):
    before = copy.deepcopy(STATES[kind, state])
    proceed(STATES[kind, state], REQUESTS[kind, request_type])
    assert STATES[kind, state] == before


def test_each_state_forgets_what_it_no_longer_needs():
    kept = {name: set(name.__slots__) for name in CLIENT_TRANSITIONS}
    assert "share_secret" not in kept[AwaitingDelivery]
    for name in (AwaitingSurvivors, AwaitingEndorsements):
        assert not {"mask_secret", "self_mask_seed", "pair_keys"} & kept[name]
    assert kept[Finished] == set()


def test_a_client_keeps_the_identity_keys_of_the_peers_that_it_shares_with():
    peers = {peer: identity_of(peer).certificate.key for peer in (0, 1, 3, 4)}
    for name in (AwaitingDelivery, AwaitingSurvivors, AwaitingEndorsements):
        assert STATES["signed", name].identity_keys == peers
    for name in (AwaitingDelivery, AwaitingSurvivors):
        assert STATES["unsigned", name].identity_keys == {}
    some = {peer: STATES["signed", AwaitingDelivery].pair_keys[peer] for peer in (0, 1, 3)}
    boxes = {peer: REQUESTS["signed", Delivery].boxes[peer] for peer in some}
    state, _ = proceed(STATES["signed", AwaitingDelivery], Delivery(boxes))
    assert state.identity_keys.keys() == state.self_mask_shares.keys() == some.keys()


def test_a_delivery_without_an_input_is_our_own_mistake():
    with refusal(LocalProtocolError, "vector"):
        proceed(STATES["signed", AwaitingDelivery], REQUESTS["signed", Delivery], vector=None)


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(5, np.uint16),
        np.zeros(7, np.uint16),
        np.zeros((1, 6), np.uint16),
        np.zeros(6, np.uint32),
        np.zeros(6, np.int16),
        np.zeros(6, np.float64),
    ],
    ids=lambda vector: f"{vector.shape} {vector.dtype}",
)
def test_an_input_outside_the_domain_is_our_own_mistake(vector):
    with refusal(LocalProtocolError, r"must have shape \(6,\) and dtype uint16, found"):
        proceed(STATES["signed", AwaitingDelivery], REQUESTS["signed", Delivery], vector=vector)


def test_a_step_gives_the_input_up_and_masks_it_where_it_lies():
    vector = np.arange(6, dtype=np.uint16)
    _, reply = proceed(
        STATES["signed", AwaitingDelivery], REQUESTS["signed", Delivery], vector=vector
    )
    assert reply.vector is vector
    assert vector.tolist() != [0, 1, 2, 3, 4, 5]


def test_a_delivery_leaves_the_input_as_it_was_unless_told_otherwise():
    vector = np.arange(6, dtype=np.uint16)
    state, request = STATES["signed", AwaitingDelivery], REQUESTS["signed", Delivery]
    _, kept = state.on_delivery(request, vector)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5]
    assert not np.shares_memory(kept.vector, vector)
    _, given_up = state.on_delivery(request, vector, out=vector)
    assert given_up.vector.tolist() == kept.vector.tolist()


def test_the_secrets_of_a_client_are_all_different():
    roster, delivery = STATES["signed", AwaitingRoster], STATES["signed", AwaitingDelivery]
    secrets = [roster.mask_secret, roster.share_secret, delivery.self_mask_seed]
    secrets += delivery.pair_keys.values()
    assert len(set(secrets)) == len(secrets) == 7
    assert {len(secret) for secret in secrets} == {32}
