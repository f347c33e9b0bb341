from dataclasses import replace

import numpy as np
import pytest

from fedcore.errors import FedcoreError, LocalProtocolError
from fedcore.secagg import (
    AwaitingDelivery,
    AwaitingEndorsements,
    AwaitingRoster,
    AwaitingSurvivors,
    Finished,
    dump_state,
    expected_request,
    load_state,
)
from tests.fedcore.secagg.rehearsal import identity_of, mutations, numbers, refusal
from tests.fedcore.secagg.test_machine import REQUESTS, STATES, VECTOR, proceed

by_state = pytest.mark.parametrize("state", STATES, ids=lambda key: f"{key[0]} {key[1].__name__}")
ACTIVE = [key for key in STATES if key[1] is not Finished]
WITH_PEERS = [key for key in ACTIVE if key[1] is not AwaitingRoster]


@by_state
def test_a_state_survives_its_bytes(state):
    stored = dump_state(STATES[state])
    assert load_state(stored) == STATES[state]
    assert dump_state(load_state(stored)) == stored


@pytest.mark.parametrize(("kind", "state"), ACTIVE)
def test_a_restarted_client_answers_as_if_it_had_not_stopped(kind, state):
    request = REQUESTS[kind, expected_request(STATES[kind, state])]
    expected = proceed(STATES[kind, state], request)
    restarted = proceed(load_state(dump_state(STATES[kind, state])), request)
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


@pytest.mark.parametrize(("position", "value"), [(0, 0), (0, 1), (0, 3), (1, 0), (1, 6), (1, 255)])
def test_another_version_or_kind_is_refused(position, value):
    stored = bytearray(dump_state(STATES["unsigned", AwaitingRoster]))
    stored[position] = value
    with refusal(LocalProtocolError, "damaged or of another version"):
        load_state(bytes(stored))


@pytest.mark.parametrize("state", [AwaitingRoster, AwaitingDelivery, AwaitingEndorsements])
def test_a_state_without_the_identity_key_of_a_peer_is_refused(state):
    """Else anybody could sign for that peer."""
    stored = STATES["signed", state]
    keys = dict(stored.identity_keys)
    del keys[min(keys)]
    with refusal(LocalProtocolError, "damaged or of another version"):
        load_state(dump_state(replace(stored, identity_keys=keys)))


def test_a_stored_state_of_an_unsigned_round_has_no_identity_keys():
    stored = replace(STATES["unsigned", AwaitingRoster], identity_keys={1: b"k" * 32})
    with refusal(LocalProtocolError, "damaged or of another version"):
        load_state(dump_state(stored))


@pytest.mark.parametrize("key", ACTIVE)
def test_a_client_outside_its_plan_is_refused(key):
    stored = dump_state(STATES[key])
    with refusal(LocalProtocolError):
        load_state(stored[:2] + numbers(5) + stored[6:])


def renamed(state, name, peers):
    """`state`, whose map `name` is about `peers` instead, in their order."""
    return replace(state, **{name: dict(zip(peers, getattr(state, name).values(), strict=True))})


@pytest.mark.parametrize(("kind", "state"), WITH_PEERS)
@pytest.mark.parametrize("stranger", [2, 5], ids=["itself", "nobody"])
def test_secrets_of_different_peers_or_of_strangers_are_refused(kind, state, stranger):
    good = STATES[kind, state]
    pairs = ("pair_keys", "mask_keys")
    names = pairs if state is AwaitingDelivery else ("self_mask_shares", "mask_key_shares")
    strange = (0, 1, 3, stranger)
    for name in names:
        with refusal(LocalProtocolError):
            load_state(dump_state(renamed(good, name, strange)))
    moved = renamed(renamed(good, names[0], strange), names[1], strange)
    if good.identity_keys:
        moved = renamed(moved, "identity_keys", strange)
    with refusal(LocalProtocolError):
        load_state(dump_state(moved))


@pytest.mark.parametrize("state", [AwaitingDelivery, AwaitingSurvivors, AwaitingEndorsements])
def test_a_signed_state_without_the_identity_key_of_each_peer_is_refused(state):
    good = STATES["signed", state]
    wrong = renamed(good, "identity_keys", (0, 1, 2, 3))
    few = replace(good, identity_keys={0: good.identity_keys[0]})
    for damaged in (wrong, few, replace(good, identity_keys={})):
        with refusal(LocalProtocolError, "damaged"):
            load_state(dump_state(damaged))


@pytest.mark.parametrize("state", [AwaitingDelivery, AwaitingSurvivors])
def test_an_unsigned_state_with_identity_keys_is_refused(state):
    keys = STATES["signed", state].identity_keys
    with refusal(LocalProtocolError, "damaged"):
        load_state(dump_state(replace(STATES["unsigned", state], identity_keys=keys)))


def test_a_stored_state_does_not_hold_the_identity():
    for state in STATES.values():
        stored = dump_state(state)
        assert identity_of(2).key.seed not in stored
        assert identity_of(2).certificate.key not in stored


def test_known_answer():
    state = STATES["signed", AwaitingEndorsements]
    maps = (state.self_mask_shares, state.mask_key_shares, state.identity_keys)
    assert dump_state(state) == b"".join(
        [
            b"\x02\x05",
            numbers(2),
            state.plan.to_bytes(),
            numbers(5, 0, 1, 2, 3, 4),
            *(
                part
                for entries in maps
                for part in (
                    numbers(4),
                    *(numbers(peer) + entries[peer] for peer in (0, 1, 3, 4)),
                )
            ),
        ]
    )


@by_state
def test_any_bytes_are_a_state_that_works_or_a_local_error(state):
    rng = np.random.default_rng(list(STATES).index(state))
    for data in mutations(dump_state(STATES[state]), 1200, rng, keep=2):
        try:
            loaded = load_state(data)
        except LocalProtocolError:
            continue
        assert dump_state(loaded) == data
        for request in REQUESTS.values():
            if not isinstance(loaded, Finished) and loaded.plan.dim == VECTOR.size:
                try:
                    proceed(loaded, request)
                except FedcoreError:
                    continue
