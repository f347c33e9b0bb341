from dataclasses import replace

import numpy as np
import pytest

from fedcore.errors import FedcoreError, LocalProtocolError
from fedcore.secagg import (
    AwaitingDelivery,
    AwaitingRoster,
    AwaitingSurvivors,
    Finished,
    dump_state,
    expected_request,
    load_state,
    step,
)
from tests.fedcore.secagg.rehearsal import mutations, numbers, refusal
from tests.fedcore.secagg.test_machine import ENTROPY, REQUESTS, STATES, VECTOR

by_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


@by_state
def test_a_state_survives_its_bytes(state):
    stored = dump_state(STATES[state])
    assert load_state(stored) == STATES[state]
    assert dump_state(load_state(stored)) == stored


@pytest.mark.parametrize("state", [AwaitingRoster, AwaitingDelivery, AwaitingSurvivors])
def test_a_restarted_client_answers_as_if_it_had_not_stopped(state):
    request = REQUESTS[expected_request(STATES[state])]
    expected = step(STATES[state], request, entropy=ENTROPY, vector=VECTOR)
    restarted = step(load_state(dump_state(STATES[state])), request, entropy=ENTROPY, vector=VECTOR)
    assert restarted[0] == expected[0]
    assert repr(restarted[1]) == repr(expected[1])


@by_state
def test_every_prefix_and_every_extension_is_refused(state):
    stored = dump_state(STATES[state])
    for size in range(len(stored)):
        with refusal(LocalProtocolError, "join a new round"):
            load_state(stored[:size])
    with refusal(LocalProtocolError, "join a new round"):
        load_state(stored + b"\0")


@pytest.mark.parametrize(("position", "value"), [(0, 0), (0, 2), (1, 0), (1, 5), (1, 255)])
def test_another_version_or_kind_is_refused(position, value):
    stored = bytearray(dump_state(STATES[AwaitingRoster]))
    stored[position] = value
    with refusal(LocalProtocolError, "damaged or of another version"):
        load_state(bytes(stored))


def test_a_client_outside_its_plan_is_refused():
    stored = dump_state(STATES[AwaitingRoster])
    with refusal(LocalProtocolError):
        load_state(stored[:2] + numbers(5) + stored[6:])


@pytest.mark.parametrize("state", [AwaitingDelivery, AwaitingSurvivors])
def test_keys_that_belong_to_different_peers_are_refused(state):
    stored = dump_state(STATES[state])
    last = -36 if state is AwaitingDelivery else -40  # the second map's last entry
    for peer in (2, 4_000):  # the client itself, and nobody
        moved = stored[:last] + numbers(peer) + stored[last + 4 :]
        with refusal(LocalProtocolError):
            load_state(moved)


@pytest.mark.parametrize("stranger", [2, 5])
def test_secrets_of_somebody_else_than_the_neighbours_are_refused(stranger):
    state = STATES[AwaitingSurvivors]
    shares = {0: b"s" * 36, stranger: b"t" * 36}
    moved = replace(state, self_mask_shares=shares, mask_key_shares=shares)
    with refusal(LocalProtocolError):
        load_state(dump_state(moved))


@by_state
def test_any_bytes_are_a_state_that_works_or_a_local_error(state):
    rng = np.random.default_rng(list(STATES).index(state))
    for data in mutations(dump_state(STATES[state]), 1500, rng, keep=2):
        try:
            loaded = load_state(data)
        except LocalProtocolError:
            continue
        assert dump_state(loaded) == data
        for request in REQUESTS.values():
            if not isinstance(loaded, Finished) and loaded.plan.dim == VECTOR.size:
                try:
                    step(loaded, request, entropy=ENTROPY, vector=VECTOR)
                except FedcoreError:
                    continue
