"""A coordinator that draws the neighbour graph again until it likes it.

The graph follows from the digest of the plan, and the coordinator chooses what is in it:
the run's name alone gives it as many graphs as it has time to hash. The parameters bound
the chance of one graph [BBGLR20, sections 3.1 and 4]; 2^g graphs cost g bits of it. Here
the chance is made large enough to be measured, and the real graphs are drawn.

[BBGLR20] https://eprint.iacr.org/2020/704
"""

from dataclasses import replace
from functools import lru_cache
from math import sqrt

import numpy as np
import pytest

from fedcore.crypto import transcript_hash
from fedcore.pipeline import Bonawitz, bind_round
from fedcore.secagg import Threat, sparse_degree
from fedcore.secagg.graph import _position, neighbourhood
from tests.attacks.rounds import bound_round, exact

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


def test_the_name_of_a_run_draws_another_graph():
    """So the coordinator does grind if it wants to: nothing but the margin is against it."""
    plan = bound_round(exact(secagg=Bonawitz(security_bits=10)), CLIENTS, 12).plan
    graphs = {
        bind_round(replace(plan, run_id=f"run {number}")).secagg.neighbours_of(0)
        for number in range(5)
    }
    assert len(graphs) == 5
