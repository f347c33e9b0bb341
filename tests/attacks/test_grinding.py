"""A coordinator that wants its own devices around a victim.

It cannot seat them: an index is the rank of a certified key, and everybody around the
victim checks that. What is left is to draw the neighbour graph again until it likes it.

The graph follows from the digest of the plan, and the coordinator chooses what is in it:
the run's name alone gives it as many graphs as it has time to hash. The parameters bound
the chance of one graph [BBGLR20, sections 3.1 and 4]; 2^g graphs cost g bits of it. Here
the chance is made large enough to be measured, and the real graphs are drawn.

[BBGLR20] https://eprint.iacr.org/2020/704
"""

from dataclasses import replace
from functools import lru_cache
from math import log, log2, sqrt

import numpy as np
import pytest
from scipy.stats import hypergeom

from clients import DevicePolicy
from fedcore.crypto import KeyPair, ReplayedEntropy, transcript_hash
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import PeerProtocolError
from fedcore.pipeline import Bonawitz, bind_round
from fedcore.secagg import Plan, Threat, choose_degree, join, roster_digest, sparse_degree
from fedcore.secagg.graph import _position, neighbourhood
from fedcore.secagg.identity import Credential
from fedcore.secagg.messages import Advertisement, Invitation, Roster
from fedcore.secagg.plan import MOST_CLIENTS
from tests.attacks.rounds import bound_round, exact
from tests.fedcore.secagg.rehearsal import (
    AUTHORITY,
    NOW,
    Rehearsal,
    enroll,
    identity_of,
    keys_of,
    seated,
)

CLIENTS, GRAPHS = 200, 8000
SECRECY_BITS = 8
"""The threat's bits; half of its chance is for secrecy, half for a graph that falls apart."""


@lru_cache
def colluding_on_rings():
    """For each graph, which seats of the ring colluders have: [GRAPHS, CLIENTS]."""
    colluders = int(0.1 * CLIENTS)  # the first of them: seats do not depend on who it is
    rings = np.empty((GRAPHS, CLIENTS), bool)
    for number in range(GRAPHS):
        context = transcript_hash("test/v1/ground", number.to_bytes(4))
        rings[number] = np.argsort([_position(context, c) for c in range(CLIENTS)]) < colluders
    return rings


def most_colluding_neighbours(degree):
    """For each graph, the most that any honest client has: [GRAPHS]."""
    rings = colluding_on_rings()
    around = sum(
        np.roll(rings, shift, axis=1).astype(int)
        for distance in range(1, degree // 2 + 1)
        for shift in (-distance, distance)
    )
    return np.where(rings, 0, around).max(axis=1)


def failing(threat):
    """The most colluding neighbours in each graph against `threat`, and how many are enough."""
    degree = sparse_degree(CLIENTS, threat)
    enough = degree.threshold
    if threat.malicious:  # two contradictory requests: each colluder answers both
        enough = 2 * degree.threshold - degree.neighbours
    most = most_colluding_neighbours(degree.neighbours)
    return most, enough


def test_the_counts_are_those_of_the_graph_that_clients_compute():
    degree = sparse_degree(CLIENTS, Threat(security_bits=SECRECY_BITS)).neighbours
    for number, most in enumerate(most_colluding_neighbours(degree)[:3]):
        context = transcript_hash("test/v1/ground", number.to_bytes(4))
        hoods = [neighbourhood(c, CLIENTS, degree, context) for c in range(20, CLIENTS)]
        assert max(len([c for c in hood if c < 20]) for hood in hoods) == most


@pytest.mark.parametrize("malicious", [False, True])
def test_a_graph_gives_a_client_up_no_more_often_than_the_parameters_say(malicious):
    most, enough = failing(Threat(security_bits=SECRECY_BITS, malicious=malicious))
    frequency = (most >= enough).mean()
    bound = 2.0 ** -(SECRECY_BITS + 1)
    assert frequency <= bound + 4 * sqrt(bound / GRAPHS)


@pytest.mark.parametrize("malicious", [False, True])
def test_a_threshold_a_little_lower_would_not_do(malicious):
    most, enough = failing(Threat(security_bits=SECRECY_BITS, malicious=malicious))
    assert (most >= enough - 3).mean() > 2.0 ** -(SECRECY_BITS + 1)


def test_a_coordinator_that_may_draw_often_needs_the_bits_of_its_draws_on_top():
    """Of 2^8 graphs the worst is often bad for 2^-8, and hardly ever for 2^-(8 + 8)."""
    found, draws = {}, 1 << SECRECY_BITS
    for bits in (2, SECRECY_BITS, 2 * SECRECY_BITS, 40):
        most, enough = failing(Threat(security_bits=bits, malicious=False))
        blocks = (most >= enough)[: GRAPHS // draws * draws].reshape(-1, draws)
        found[bits] = blocks.any(axis=1).mean()
    assert found[2] > 0.9
    assert found[2] > found[SECRECY_BITS] > 0
    bound = 2.0 ** -(SECRECY_BITS + 1)
    assert found[2 * SECRECY_BITS] <= bound + 4 * sqrt(bound * draws / GRAPHS)
    assert found[40] == 0


def graphs_of(*plans):
    """The graphs that follow from these plans, as the neighbours of client 0."""
    return {bind_round(plan).secagg.neighbours_of(0) for plan in plans}


def test_the_name_of_a_run_draws_another_graph():
    """So the coordinator does grind if it wants to: nothing but the margin is against it."""
    plan = bound_round(exact(secagg=Bonawitz(security_bits=10)), CLIENTS, 12).plan
    assert len(graphs_of(*(replace(plan, run_id=f"run {number}") for number in range(5)))) == 5


def test_another_cohort_draws_another_graph():
    """Whom it invites is the coordinator's choice too, and costs it no more than a name."""
    secagg = Bonawitz(security_bits=10, authority=AUTHORITY.hex())
    plan = bound_round(exact(secagg=secagg), CLIENTS, 12).plan
    rosters = (roster_digest([bytes(31) + bytes([number])]).hex() for number in range(5))
    assert len(graphs_of(*(replace(plan, roster=roster) for roster in rosters))) == 5


@pytest.mark.parametrize(
    ("clients", "authority", "bits"),
    [(128, AUTHORITY, 40), (129, AUTHORITY, 80), (1000, AUTHORITY, 80), (1000, None, 40)],
)
def test_enrolled_devices_get_the_bits_of_2_to_the_40_draws_on_top(clients, authority, bits):
    secagg = Bonawitz(authority=None if authority is None else authority.hex())
    bound = bound_round(exact(secagg=secagg), clients, 12)
    degree = choose_degree(clients, Threat(security_bits=bits))
    assert (bound.secagg.neighbours, bound.secagg.threshold) == (
        degree.neighbours,
        degree.threshold,
    )
    DevicePolicy().check(bound.plan)


@pytest.mark.parametrize("clients", [129, 200, 500, 1000, 10_000, MOST_CLIENTS])
def test_an_island_takes_more_colluders_in_its_gaps_than_one_of_2_to_the_40_rings_has(clients):
    """Whoever sits at the edge of a cut asks for t neighbours, and has k/2 on its own side.

    So t - k/2 colluders sit in each of its two gaps, 2t - k in k seats: a union over all
    pairs of gaps.
    """
    degree = choose_degree(clients, Threat(security_bits=80))
    colluders, needed = int(0.1 * clients), 2 * degree.threshold - degree.neighbours
    one_pair = hypergeom.logsf(needed - 1, clients, colluders, degree.neighbours) / log(2)
    some_pair = one_pair + 2 * log2(clients) - 1
    assert some_pair <= log2(clients) - 82
    assert 40 + some_pair <= -25


# Seats: what a coordinator would have to change to put a colluder beside the victim.

SEATED = seated(Plan(12, 6, 4, 6, 16, 6, authority=AUTHORITY))
VICTIM = 3
KEYS = keys_of(SEATED)
SPY = SigningKey.generate(ReplayedEntropy(b"a colluding device"))


def invited(keys, index=VICTIM, **changes):
    """The victim's answer to an invitation with this list."""
    invitation = Invitation(index, replace(SEATED, **changes), keys)
    return join(invitation, ReplayedEntropy(b""), identity=identity_of(VICTIM), now=NOW)


def swapped(keys, one, other):
    """The list with two keys in each other's place."""
    order = list(range(len(keys)))
    order[one], order[other] = other, one
    return tuple(keys[place] for place in order)


def hash_of_any(keys):
    """A hash over a list in any order: what a coordinator would put into its plan."""
    return transcript_hash("fedcore/v1/roster", *keys)


def test_a_device_joins_at_the_rank_of_its_key():
    state, _ = invited(KEYS)
    assert state.identity_keys == {c: KEYS[c] for c in SEATED.neighbours_of(VICTIM)}


@pytest.mark.parametrize("index", [0, 2, 4, 11])
def test_another_index_is_refused(index):
    with pytest.raises(PeerProtocolError, match=f"index {index} must be the place of this"):
        invited(KEYS, index)


@pytest.mark.parametrize(
    "keys",
    [swapped(KEYS, 5, 9), swapped(KEYS, 10, 11), KEYS[:VICTIM] + KEYS[:VICTIM:-1] + KEYS[VICTIM:4]],
    ids=["two others", "neighbours in the list", "the victim last"],
)
def test_a_list_in_another_order_is_refused(keys):
    index = keys.index(KEYS[VICTIM])
    with pytest.raises(PeerProtocolError, match="must increase strictly"):
        invited(keys, index, roster=hash_of_any(keys))


@pytest.mark.parametrize("twice", [5, VICTIM])
def test_a_device_cannot_have_two_indices(twice):
    keys = tuple(sorted((*KEYS[:8], *KEYS[9:], KEYS[twice])))
    with pytest.raises(PeerProtocolError, match="must increase strictly"):
        invited(keys, keys.index(KEYS[VICTIM]), roster=hash_of_any(keys))


def test_a_list_that_is_not_the_plans_is_refused():
    with pytest.raises(PeerProtocolError, match="must be the one that the plan names"):
        invited(KEYS, roster=roster_digest(keys_of(seated(replace(SEATED, clients=13)))[1:]))
    with pytest.raises(PeerProtocolError, match="must be the one that the plan names"):
        invited(KEYS, roster=bytes(32))


@pytest.mark.parametrize("count", [0, 11, 13])
def test_a_list_of_another_length_is_refused(count):
    """Else strangers behind its end would count as survivors."""
    keys = keys_of(replace(SEATED, clients=count)) if count else ()
    with pytest.raises(PeerProtocolError, match=f"must have 12 identity keys, found {count}"):
        invited(keys, roster=roster_digest(keys))


def test_a_list_without_the_victim_is_refused():
    keys = tuple(key for key in keys_of(replace(SEATED, clients=13)) if key != KEYS[VICTIM])
    with pytest.raises(PeerProtocolError, match=f"index {VICTIM} must be the place of this"):
        invited(keys, roster=roster_digest(keys))


@pytest.mark.parametrize("listed", [True, False])
def test_a_colluder_at_a_neighbours_index_is_refused(listed):
    """Certified, and signed for that very index: but the list has another key there."""
    rehearsal = Rehearsal(SEATED).advance("share")
    roster = dict(rehearsal.requests[VICTIM].keys)
    place = min(roster)
    distant = min(set(range(12)) - SEATED.neighbours_of(VICTIM) - {VICTIM})
    spy = identity_of(distant) if listed else enroll(SPY)
    mask, share = (KeyPair.generate(ReplayedEntropy(name), "key").public for name in (b"m", b"s"))
    terms = {"digest": SEATED.digest(), "client": place, "mask_key": mask, "share_key": share}
    roster[place] = Advertisement(mask, share, Credential.sign(spy, **terms))
    with pytest.raises(PeerProtocolError, match=f"client {place} must be the device whose key"):
        rehearsal.answer(VICTIM, Roster(roster))


def test_a_coordinator_that_lists_another_device_draws_the_whole_ring_again():
    """Replacing one stranger far away moves the victim's neighbours like any other draw."""
    changed = 0
    for number in range(20):
        key = SigningKey.generate(ReplayedEntropy(b"%d" % number)).public.raw
        keys = sorted((*KEYS[:11], key))
        plan = replace(SEATED, roster=roster_digest(keys))
        place = keys.index(KEYS[VICTIM])
        around = {keys[peer] for peer in plan.neighbours_of(place)}
        changed += around != {KEYS[peer] for peer in SEATED.neighbours_of(VICTIM)}
    assert changed >= 18
