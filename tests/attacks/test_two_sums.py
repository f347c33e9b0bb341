"""Attacks that want one sum too many, or a sum over too few.

The coordinator keeps every masked input. To read client 0 it needs either a sum that has
hardly anybody else in it, or two sums of one round: over all, and over all but client 0.
"""

import contextlib
from functools import lru_cache
from itertools import chain, combinations

import numpy as np
import pytest

from fedcore.crypto import KeyPair, Mask, add_masks, combine
from fedcore.errors import ConfigurationError, RoundAbortedError, StateReusedError
from fedcore.pipeline import RunPlan
from fedcore.secagg import OneShot, Plan, Threat, choose_degree, make_plan, run_round
from fedcore.secagg.graph import _seating
from fedcore.secagg.masks import pairwise_masks
from fedcore.secagg.messages import Endorsements, Survivors
from fedcore.secagg.parameters import COMPLETE_UP_TO
from fedcore.secagg.server import AwaitingReveals
from tests.attacks.rounds import bound_round, exact, reveal
from tests.fedcore.secagg.rehearsal import (
    NOW,
    Rehearsal,
    complete_plan,
    identity_of,
    refusal,
    signed_plan,
)

VICTIM = 0


def inputs_of(plan):
    """Inputs that no sum of others resembles."""
    rng = np.random.default_rng(2)
    return {
        client: rng.integers(0, 1 << plan.ring_bits, plan.dim).astype(plan.ring.dtype)
        for client in range(plan.clients)
    }


class Coordinator:
    """Plays a round up to the masked inputs, keeps them, and tries to finish what it likes."""

    def __init__(self, plan, absent=()):
        self.plan, self.inputs = plan, inputs_of(plan)
        vectors = {client: vector.copy() for client, vector in self.inputs.items()}
        self.round = Rehearsal(plan, vectors=vectors).advance("upload")
        self.adding = self.round.server
        self.round.listen(set(absent))
        self.masked = {client: reply.vector.copy() for client, reply in self.round.replies.items()}

    def finish(self, survivors, reveals):
        """The sum over `survivors`, as the real server computes it from `reveals`."""
        adding, ring = self.adding, self.plan.ring
        wide = np.sum([self.masked[c].astype(np.uint64) for c in survivors], axis=0)
        state = AwaitingReveals(
            self.plan, adding.keys, adding.commitments, survivors, ring.reduce(wide)
        )
        for client, message in reveals.items():
            state = state.on_reveal(client, message)
        return state.close().total

    def succeeds(self, survivors, reveals):
        try:
            total = self.finish(survivors, reveals)
        except RoundAbortedError:
            return False
        wanted = np.sum([self.inputs[c].astype(np.uint64) for c in survivors], axis=0)
        assert (total == self.plan.ring.reduce(wanted)).all()
        return True


def responders(clients, colluding):
    """Every way to split the honest clients over two requests; colluders answer both.

    The victim reveals for no set that it is not in, so it is always asked for the first.
    """
    honest = [client for client in range(1, clients) if client < clients - colluding]
    both = frozenset(range(clients - colluding, clients))
    for size in range(len(honest) + 1):
        yield frozenset({VICTIM, *honest[:size]}) | both, frozenset(honest[size:]) | both


def planned(clients, **changes):
    """The plan that the parameters give, and how many colluders they count on."""
    degree = choose_degree(clients, Threat())
    values = {"threshold": degree.threshold, "minimum_survivors": clients - clients // 10}
    return (clients, values | changes), int(Threat().corrupt * clients)


# Differencing: two sums of one round.


def test_a_client_that_answered_twice_would_give_the_victim_away():
    (clients, values), _ = planned(9, minimum_survivors=2)
    coordinator = Coordinator(complete_plan(clients, **values))
    everybody = frozenset(range(clients))
    sums = []
    for claim in (everybody, everybody - {VICTIM}):
        reveals = {c: coordinator.round.answer(c, Survivors(claim))[1] for c in claim}
        sums.append(coordinator.finish(claim, reveals))
    difference = coordinator.plan.ring.reduce(sums[0] - sums[1])
    assert (difference == coordinator.inputs[VICTIM]).all()


@pytest.mark.parametrize("clients", [5, 9, 20, 30])
def test_two_sums_that_differ_by_one_client_are_never_both_finished(clients):
    """Whoever answers which request: disjoint sets of honest clients, colluders answer both."""
    (clients, values), colluding = planned(clients, minimum_survivors=2)
    coordinator = Coordinator(complete_plan(clients, **values))
    everybody = frozenset(range(clients))
    answers = {
        claim: {c: coordinator.round.answer(c, Survivors(claim))[1] for c in claim}
        for claim in (everybody, everybody - {VICTIM})
    }
    outcomes = set()
    for one, other in responders(clients, colluding):
        first, second = (
            coordinator.succeeds(claim, {c: answers[claim][c] for c in asked})
            for claim, asked in zip(answers, (one, other), strict=True)
        )
        assert not (first and second)
        outcomes.add((first, second))
    assert {(True, False), (False, True)} <= outcomes


def test_two_sums_are_both_finished_only_by_more_colluders_than_planned_for():
    clients = 9
    coordinator = Coordinator(complete_plan(clients, threshold=5))
    everybody = frozenset(range(clients))
    answers = {
        claim: {c: coordinator.round.answer(c, Survivors(claim))[1] for c in claim}
        for claim in (everybody, everybody - {VICTIM})
    }

    def both(colluding):
        return any(
            coordinator.succeeds(everybody, {c: answers[everybody][c] for c in one})
            and coordinator.succeeds(
                everybody - {VICTIM}, {c: answers[everybody - {VICTIM}][c] for c in other}
            )
            for one, other in responders(clients, colluding)
        )

    broken = [both(colluding) for colluding in range(6)]
    # 2t > k + colluding holds for 0 and 1; each responder also lacks a share of its own secret.
    assert broken == [False, False, False, True, True, True]


@pytest.mark.parametrize("clients", [9, 20])
def test_with_endorsements_the_second_of_two_sums_stops_before_anything_is_revealed(clients):
    (clients, values), _ = planned(clients, minimum_survivors=2)
    coordinator = Coordinator(signed_plan(clients, **values))
    everybody = frozenset(range(clients))
    claims = (everybody, everybody - {VICTIM})
    endorsed = {
        claim: {c: coordinator.round.answer(c, Survivors(claim)) for c in claim} for claim in claims
    }
    finished = set()
    for split in responders(clients, 0):
        results = []
        for claim, asked in zip(claims, split, strict=True):
            reveals = {}
            for client in asked:
                state, _ = endorsed[claim][client]
                signatures = {c: endorsed[claim][c][1].signature for c in asked if c != client}
                try:
                    reveals[client] = state.on_endorsements(Endorsements(signatures))[1]
                except RoundAbortedError:
                    continue
            results.append((len(reveals), coordinator.succeeds(claim, reveals)))
        (revealed, first), (others, second) = results
        assert not (revealed and others)
        assert not (first and second)
        finished.add((first, second))
    assert {(True, False), (False, True), (False, False)} == finished


def test_a_client_that_was_asked_for_one_set_cannot_be_asked_for_the_other():
    coordinator = Coordinator(complete_plan(9))
    everybody = frozenset(range(9))
    cells = {c: OneShot(coordinator.round.states[c]) for c in everybody}
    reveals = {c: cells[c].take().on_survivors(Survivors(everybody))[1] for c in everybody}
    assert coordinator.succeeds(everybody, reveals)
    for cell in cells.values():
        with pytest.raises(StateReusedError):
            cell.take()


# Sums over one, over few, and over a part that is cut off.


@lru_cache
def asked_for_survivors(plan):
    return Coordinator(plan)


PLANS = {"plain": complete_plan, "signed": signed_plan}


@pytest.mark.parametrize("kind", PLANS)
def test_no_client_ever_reveals_for_fewer_than_the_minimum(kind):
    """All of the 848 sets of fewer than 7 out of 10, each told to all of its members."""
    plan = PLANS[kind](10, threshold=6, minimum_survivors=7)
    states = asked_for_survivors(plan).round.states
    few = chain.from_iterable(combinations(range(10), size) for size in range(1, 7))
    asked = 0
    for claim in map(frozenset, few):
        for client in claim:
            with pytest.raises(RoundAbortedError, match=f"needed 7 clients, found {len(claim)}"):
                _ask(states[client], claim)
            asked += 1
    assert asked == 10 * sum((1, 9, 36, 84, 126, 126))


def _ask(state, claim):
    if state.plan.authenticated:
        return state.endorse(Survivors(claim), identity_of(state.client))
    return state.on_survivors(Survivors(claim))


@pytest.mark.parametrize("stage", ["advertise", "share", "upload"])
@pytest.mark.parametrize("alive", [1, 2, 6])
def test_a_whole_round_that_loses_too_many_reveals_no_sum(stage, alive):
    bound = bound_round(exact(dropout=0.3), 10, 12)
    assert bound.minimum_survivors == bound.secagg.minimum_survivors == 7
    drops = dict.fromkeys(range(alive, 10), stage)
    with refusal(RoundAbortedError, f"needed 7 clients, found {alive}"):
        reveal(bound, np.ones((10, 12)), drops=drops)


def test_a_whole_round_that_loses_no_more_than_planned_reveals_its_sum():
    bound = bound_round(exact(dropout=0.3), 10, 12)
    mean = reveal(bound, np.ones((10, 12)), drops=dict.fromkeys((1, 4, 8), "upload"))
    assert mean.survivors == 7
    assert mean.delta == pytest.approx(np.ones(12), abs=1e-4)


@pytest.mark.parametrize("alive", [1, 2, 6])
def test_a_signed_round_that_loses_too_many_reveals_no_sum(alive):
    plan = signed_plan(10, threshold=6, minimum_survivors=7)
    identities = {client: identity_of(client) for client in range(10)}
    drops = dict.fromkeys(range(alive, 10), "upload")
    with refusal(RoundAbortedError, f"needed 7 clients, found {alive}"):
        run_round(inputs_of(plan), plan, drops, identities=identities, now=NOW)


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_a_cohort_whose_sum_may_be_over_one_is_never_planned(clients):
    with pytest.raises(ConfigurationError, match="fewer than 2 clients reveals its input"):
        bound_round(RunPlan(dropout=0.7), clients, 12)


@pytest.mark.parametrize(
    ("neighbours", "threshold", "island"), [(8, 5, 10), (8, 5, 3), (12, 8, 15)]
)
def test_a_part_of_a_sparse_graph_that_was_cut_off_is_not_unmasked(neighbours, threshold, island):
    """The coordinator declares two runs of k/2 seats dropped: what lies between stands alone."""
    plan = Plan(60, neighbours, threshold, 2, 16, 6)
    ring, half = _seating(plan.clients, plan.digest())[0], neighbours // 2
    dead = frozenset(ring[:half] + ring[half + island : 2 * half + island])
    alive = frozenset(ring) - dead
    coordinator, reveals = Coordinator(plan), {}
    for client in alive:
        with contextlib.suppress(RoundAbortedError):
            reveals[client] = coordinator.round.answer(client, Survivors(alive))[1]
    edges = {ring[-1], ring[half], ring[half + island - 1], ring[2 * half + island]}
    assert not edges & reveals.keys()
    # It is an island: nobody in it has a neighbour alive outside it.
    inside = frozenset(ring[half : half + island])
    assert all(plan.neighbours_of(client) & alive <= inside for client in inside)
    assert not coordinator.succeeds(alive, reveals)


# What the complete graph gives, and a sparse one does not.


@pytest.mark.parametrize("clients", [5, 20, 64, COMPLETE_UP_TO])
def test_up_to_128_clients_no_seating_surrounds_a_victim_with_colluders(clients):
    degree = choose_degree(clients, Threat())
    assert degree.neighbours == clients - 1
    assert int(Threat().corrupt * clients) < 2 * degree.threshold - degree.neighbours


@pytest.mark.parametrize(("clients", "possible"), [(200, False), (400, True), (1000, True)])
def test_beyond_128_a_coordinator_may_seat_enough_colluders_around_a_victim(clients, possible):
    """A limit that docs/threat_model.md states: indices are the coordinator's to give."""
    plan = make_plan(clients, 4, 16)
    seated = min(int(Threat().corrupt * clients), plan.neighbours)
    assert (seated >= 2 * plan.threshold - plan.neighbours) is possible


@pytest.mark.parametrize(("colluding", "read"), [(1, False), (2, True)])
def test_a_client_with_more_colluding_neighbours_than_planned_for_is_read(colluding, read):
    """What such a seating gives: half of the other neighbours open one secret, half the other."""
    plan = Plan(40, 8, 5, 2, 16, 6)
    coordinator, everybody = Coordinator(plan), frozenset(range(40))
    peers = sorted(plan.neighbours_of(VICTIM))
    honest, seated = peers[colluding:], peers[:colluding]
    half = len(honest) // 2
    seeds, keys = {}, {}
    for asked, claim in ((honest[:half], everybody), (honest[half:], everybody - {VICTIM})):
        for peer in asked:
            _, message = coordinator.round.answer(peer, Survivors(claim))
            if VICTIM in claim:
                seeds[peer + 1] = message.self_mask_shares[VICTIM]
            else:
                keys[peer + 1] = message.mask_key_shares[VICTIM]
    for peer in seated:
        state = coordinator.round.states[peer]
        seeds[peer + 1] = state.self_mask_shares[VICTIM]
        keys[peer + 1] = state.mask_key_shares[VICTIM]
    assert len(seeds) + len(keys) == 8 + colluding
    assert (min(len(seeds), len(keys)) >= plan.threshold) is read
    if not read:
        return
    secret = combine(keys, plan.threshold)
    publics = {peer: coordinator.adding.keys[peer] for peer in peers}
    masks = [
        Mask(combine(seeds, plan.threshold)),
        *pairwise_masks(secret, VICTIM, publics, plan.digest()),
    ]
    opposite = [Mask(mask.seed, -mask.sign) for mask in masks]
    found = add_masks(coordinator.masked[VICTIM], opposite, plan.ring)
    assert (found == coordinator.inputs[VICTIM]).all()


def test_a_part_of_a_sparse_graph_is_read_if_colluders_sit_in_both_of_its_gaps():
    """A limit too: t - k/2 colluders in each gap, claimed alive, satisfy whoever sits beside it."""
    plan = Plan(60, 8, 5, 40, 16, 6)
    ring = _seating(plan.clients, plan.digest())[0]
    island, gaps = frozenset(ring[4:14]), frozenset(ring[:4] + ring[14:18])
    colluding = frozenset({ring[1], ring[15]})
    dead = gaps - colluding
    alive = frozenset(ring) - dead
    assert len(island) < plan.minimum_survivors <= len(alive)
    coordinator = Coordinator(plan)
    reveals = {c: coordinator.round.answer(c, Survivors(alive))[1] for c in alive}

    def opened(owner, kind):
        peers = plan.neighbours_of(owner) & alive
        shares = {peer + 1: getattr(reveals[peer], kind)[owner] for peer in peers}
        return combine(shares, plan.threshold)

    masks = [Mask(opened(member, "self_mask_shares"), -1) for member in island]
    for other in gaps:
        if other in colluding:  # it says what it drew
            entropy = coordinator.round.entropy.child(f"client={other}")
            secret = KeyPair.generate(entropy, "mask-key").secret
        else:
            secret = opened(other, "mask_key_shares")
        keys = {peer: coordinator.adding.keys[peer] for peer in plan.neighbours_of(other) & island}
        masks += pairwise_masks(secret, other, keys, plan.digest())
    masked, wanted = (
        np.sum([vectors[c].astype(np.uint64) for c in island], axis=0)
        for vectors in (coordinator.masked, coordinator.inputs)
    )
    found = add_masks(plan.ring.reduce(masked), masks, plan.ring)
    assert (found == plan.ring.reduce(wanted)).all()
