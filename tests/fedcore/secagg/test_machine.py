from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from fedcore.crypto import ReplayedEntropy
from fedcore.errors import LocalProtocolError, PeerProtocolError, StateReusedError
from fedcore.secagg import (
    CLIENT_TRANSITIONS,
    AwaitingDelivery,
    AwaitingRoster,
    AwaitingSurvivors,
    Finished,
    OneShot,
    expected_request,
    join,
    step,
)
from fedcore.secagg.messages import Delivery, Invitation, Roster, Survivors
from tests.fedcore.secagg.rehearsal import Rehearsal, complete_plan, refusal

ENTROPY = ReplayedEntropy(b"machine")
PLAN = complete_plan(5)
VECTOR = PLAN.ring.zeros(PLAN.dim)


def life_of(client):
    """One state of each type, and the request that it waits for, from a real round."""
    rehearsal, states, requests = Rehearsal(PLAN), {}, {}
    for _ in range(4):
        state, request = rehearsal.states.get(client), rehearsal.requests[client]
        states[type(state)], requests[type(request)] = state, request
        rehearsal.listen().hear()
    states[Finished] = rehearsal.states[client]
    del states[type(None)]
    return states, requests


STATES, REQUESTS = life_of(2)
LEGAL = [(state, request) for state, row in CLIENT_TRANSITIONS.items() for request in row]
ILLEGAL = [pair for pair in product(STATES, REQUESTS) if pair not in LEGAL]


def test_the_table_speaks_of_every_state_and_every_request_but_the_invitation():
    assert set(CLIENT_TRANSITIONS) == set(STATES)
    assert {request for _, request in LEGAL} == set(REQUESTS) - {Invitation}
    assert len(LEGAL) + len(ILLEGAL) == 16


@pytest.mark.parametrize(("state", "request_type"), LEGAL)
def test_a_message_in_the_table_leads_where_the_table_says(state, request_type):
    successor, reply = step(STATES[state], REQUESTS[request_type], entropy=ENTROPY, vector=VECTOR)
    assert type(successor) is CLIENT_TRANSITIONS[state][request_type]
    assert reply is not None


@pytest.mark.parametrize(("state", "request_type"), ILLEGAL)
def test_a_message_outside_the_table_is_refused(state, request_type):
    with refusal(
        PeerProtocolError, match=f"{request_type.__name__} arrived in state {state.__name__}"
    ):
        step(STATES[state], REQUESTS[request_type], entropy=ENTROPY, vector=VECTOR)


@pytest.mark.parametrize("state", STATES)
def test_a_state_knows_the_one_request_it_waits_for(state):
    allowed = list(CLIENT_TRANSITIONS[state])
    assert expected_request(STATES[state]) is (allowed[0] if allowed else None)


def test_a_new_client_waits_for_the_roster():
    state, _ = join(Invitation(1, PLAN), ENTROPY)
    assert expected_request(state) is Roster


def test_a_state_is_taken_once():
    cell = OneShot(STATES[AwaitingSurvivors])
    assert cell.take() is STATES[AwaitingSurvivors]
    for _ in range(2):
        with refusal(StateReusedError, "already used"):
            cell.take()


def test_a_state_stays_used_when_its_step_failed():
    cell = OneShot(STATES[AwaitingSurvivors])
    with refusal(PeerProtocolError):
        step(cell.take(), Survivors(frozenset({0, 1})), entropy=ENTROPY)
    with refusal(StateReusedError):
        cell.take()


def test_a_step_leaves_the_state_it_started_from_unchanged():
    for state, request in LEGAL:
        before = replace(STATES[state]) if state is not Finished else STATES[state]
        step(STATES[state], REQUESTS[request], entropy=ENTROPY, vector=VECTOR)
        assert STATES[state] == before


def test_each_state_forgets_what_it_no_longer_needs():
    kept = {name: set(name.__slots__) for name in STATES}
    assert "share_secret" not in kept[AwaitingDelivery]
    assert not {"mask_secret", "self_mask_seed", "pair_keys"} & kept[AwaitingSurvivors]
    assert kept[Finished] == set()


def test_a_delivery_without_an_input_is_our_own_mistake():
    with refusal(LocalProtocolError, "vector"):
        step(STATES[AwaitingDelivery], REQUESTS[Delivery], entropy=ENTROPY)


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
        step(STATES[AwaitingDelivery], REQUESTS[Delivery], entropy=ENTROPY, vector=vector)


def test_the_input_is_left_as_it_was():
    vector = np.arange(6, dtype=np.uint16)
    _, reply = step(STATES[AwaitingDelivery], REQUESTS[Delivery], entropy=ENTROPY, vector=vector)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5]
    assert not np.shares_memory(reply.vector, vector)


def test_the_secrets_of_a_client_are_all_different():
    roster, delivery = STATES[AwaitingRoster], STATES[AwaitingDelivery]
    secrets = [roster.mask_secret, roster.share_secret, delivery.self_mask_seed]
    secrets += delivery.pair_keys.values()
    assert len(set(secrets)) == len(secrets) == 7
    assert {len(secret) for secret in secrets} == {32}
