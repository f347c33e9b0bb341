import re
from fractions import Fraction
from itertools import pairwise, product
from math import comb

import pytest

from fedcore.errors import ConfigurationError
from fedcore.secagg import Degree, Plan, Threat, choose_degree, make_plan, sparse_degree
from fedcore.secagg.parameters import (
    COMPLETE_UP_TO,
    _connected,
    _fewest_responding,
    _hypergeometric,
    _most_colluding,
)
from tests.fedcore.secagg.rehearsal import refusal

# clients, corrupt, dropout, then (neighbours, threshold) against a server that follows the
# protocol and against one that lies about drop-outs; 2^-40 for secrecy, 2^-30 for correctness.
PUBLISHED = [
    (20, 0.05, 0.05, (4, 2), (4, 3)),
    (20, 0.1, 0.1, (6, 3), (8, 6)),
    (50, 0.05, 0.05, (6, 3), (8, 6)),
    (50, 0.1, 0.1, (12, 6), (16, 11)),
    (50, 0.2, 0.2, (22, 11), (32, 22)),
    (100, 0.05, 0.05, (12, 6), (16, 11)),
    (100, 0.1, 0.1, (22, 11), (32, 22)),
    (100, 0.2, 0.1, (32, 21), (42, 32)),
    (100, 0.2, 0.2, (42, 21), (62, 42)),
    (200, 0.1, 0.1, (36, 19), (60, 41)),
    (200, 0.2, 0.2, (68, 36), (122, 82)),
    (500, 0.05, 0.05, (30, 16), (52, 36)),
    (500, 0.1, 0.1, (46, 25), (94, 64)),
    (1000, 0.05, 0.05, (34, 18), (62, 43)),
    (1000, 0.1, 0.1, (52, 28), (114, 78)),
    (1000, 0.2, 0.1, (76, 47), (162, 118)),
    (1000, 0.2, 0.2, (112, 59), (340, 229)),
    (1000, 0.33, 0.05, (86, 64), (152, 124)),
    (10_000, 0.1, 0.1, (60, 32), (144, 98)),
    (10_000, 0.2, 0.2, (136, 71), (566, 381)),
    (100_000, 0.1, 0.1, (66, 35), (156, 106)),
]
# The same at corrupt = dropout = 0.1 and 2^-80 for secrecy: a server that may try 2^40 rosters.
AGAINST_GRINDING = [
    (100, 32, 22),
    (200, 60, 41),
    (500, 110, 78),
    (1000, 138, 98),
    (10_000, 182, 129),
]


@pytest.mark.parametrize(("clients", "corrupt", "dropout", "honest", "lying"), PUBLISHED)
def test_the_published_parameters_are_reproduced(clients, corrupt, dropout, honest, lying):
    assert sparse_degree(clients, Threat(corrupt, dropout, malicious=False)) == Degree(*honest)
    assert sparse_degree(clients, Threat(corrupt, dropout)) == Degree(*lying)


@pytest.mark.parametrize(("clients", "neighbours", "threshold"), AGAINST_GRINDING)
def test_the_published_margin_against_grinding_is_reproduced(clients, neighbours, threshold):
    degree = sparse_degree(clients, Threat(0.1, 0.1, security_bits=80))
    assert degree == Degree(neighbours, threshold)


def test_a_third_corrupt_and_a_third_silent_need_almost_the_complete_graph():
    # The table calls this row infeasible for a lying server; at corrupt + 2 dropout = 0.99 a
    # graph does exist, but one of 992 neighbours out of 999.
    assert sparse_degree(1000, Threat(0.33, 0.33, malicious=False)) == Degree(310, 159)
    assert sparse_degree(1000, Threat(0.33, 0.33)).neighbours > 0.99 * 999


@pytest.mark.parametrize("clients", [2, 3, 20, 64, COMPLETE_UP_TO])
def test_the_graph_is_complete_for_small_cohorts(clients):
    degree = choose_degree(clients, Threat(corrupt=0.1, dropout=0.0))
    assert degree.neighbours == clients - 1


def test_the_graph_is_sparse_beyond_that():
    threat = Threat(0.05, 0.05)
    assert choose_degree(COMPLETE_UP_TO + 1, threat) == sparse_degree(COMPLETE_UP_TO + 1, threat)
    assert choose_degree(COMPLETE_UP_TO + 1, threat).neighbours < COMPLETE_UP_TO
    assert COMPLETE_UP_TO == 128


@pytest.mark.parametrize("population", [1, 2, 7, 12])
def test_the_chance_of_a_draw_is_the_exact_fraction(population):
    for marked, drawn in product(range(population + 1), repeat=2):
        for count in range(drawn + 1):
            exact = comb(marked, count) * comb(population - marked, drawn - count)
            chance = _hypergeometric(population, marked, drawn, count)
            assert chance == pytest.approx(exact / comb(population, drawn), abs=1e-9)


@pytest.mark.parametrize("clients", [20, 60, 200])
@pytest.mark.parametrize("bits", [3, 20, 40])
@pytest.mark.parametrize(("corrupt", "dropout"), [(0.1, 0.1), (0.05, 0.3), (0.3, 0.05), (0.0, 0.0)])
def test_a_graph_counts_as_connected_exactly_if_the_union_bound_says_so(
    clients, bits, corrupt, dropout
):
    bad = int(corrupt * clients) + int(dropout * clients)
    for neighbours in range(2, clients, 2):
        cuts = clients * (clients - neighbours - 1) // 2  # pairs of runs of neighbours / 2
        rest = comb(clients - neighbours, bad - neighbours) if bad >= neighbours else 0
        exact = cuts * rest << bits + 1 <= comb(clients, bad)
        threat = Threat(corrupt, dropout, security_bits=bits)
        assert _connected(clients, neighbours, threat) == exact


def chance_of_at_most(population, marked, drawn, count):
    """Exactly."""
    ways = sum(comb(marked, i) * comb(population - marked, drawn - i) for i in range(count + 1))
    return Fraction(ways, comb(population, drawn))


@pytest.mark.parametrize("clients", [10, 21, 60])
@pytest.mark.parametrize("bits", [1, 3, 10, 30])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.45])
def test_the_worst_neighbourhood_is_the_exact_one(clients, bits, fraction):
    threat = Threat(fraction, fraction, security_bits=bits, correctness_bits=bits)
    bad, others = int(fraction * clients), clients - 1
    for neighbours in range(2, clients, 2):
        colluding = next(  # more have a chance of at most 2^-(bits + 1) for any client
            count
            for count in range(neighbours + 1)
            if 1 - chance_of_at_most(others, bad, neighbours, count)
            <= Fraction(1, clients << bits + 1)
        )
        assert _most_colluding(clients, neighbours, threat) == colluding
        responding = next(  # fewer have a chance of at most 2^-bits for any client
            count
            for count in range(neighbours, -1, -1)
            if chance_of_at_most(others, others - bad, neighbours, count - 1)
            <= Fraction(1, clients << bits)
        )
        assert _fewest_responding(clients, neighbours, threat) == responding


def test_without_colluding_clients_one_share_is_a_secret_kept():
    degree = sparse_degree(200, Threat(0.0, 0.1, malicious=False))
    assert degree.threshold == 1


@pytest.mark.parametrize(
    ("clients", "threat", "numbers"),
    [
        (20, Threat(0.4, 0.4), ("20", "0.4", "14", "11")),
        (128, Threat(0.4, 0.35), ("128", "0.4", "0.35", "90", "83")),
        (500, Threat(0.4, 0.4), ("500", "0.4")),
    ],
)
def test_a_threat_that_nothing_withstands_is_refused_with_its_numbers(clients, threat, numbers):
    with refusal(ConfigurationError, "lower") as caught:
        choose_degree(clients, threat)
    assert set(numbers) <= set(re.findall(r"\d+(?:\.\d+)?", str(caught.value)))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"corrupt": 0.5}, "corrupt"),
        ({"corrupt": -0.1}, "corrupt"),
        ({"corrupt": float("nan")}, "corrupt"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"corrupt": 0.4, "dropout": 0.6}, "dropout"),
        ({"security_bits": 0}, "security_bits"),
        ({"security_bits": 129}, "security_bits"),
        ({"security_bits": -40}, "security_bits"),
        ({"correctness_bits": 0}, "correctness_bits"),
        ({"correctness_bits": 129}, "correctness_bits"),
    ],
)
def test_a_threat_outside_its_range_is_refused_by_name(values, field):
    with refusal(ConfigurationError, f"secagg.{field} must be .*got"):
        Threat(**values)


def test_more_of_anything_bad_never_needs_fewer_neighbours():
    series = [
        [sparse_degree(n, Threat()) for n in (200, 500, 1000, 5000, 10_000, 100_000)],
        [sparse_degree(1000, Threat(c, 0.1)) for c in (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)],
        [sparse_degree(1000, Threat(0.1, d)) for d in (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)],
        [sparse_degree(1000, Threat(security_bits=b)) for b in (20, 40, 60, 80, 128)],
        [sparse_degree(1000, Threat(correctness_bits=b)) for b in (10, 20, 30, 40, 60)],
    ]
    for degrees in series:
        assert all(a.neighbours <= b.neighbours for a, b in pairwise(degrees))


@pytest.mark.parametrize("clients", [20, 100, 128, 129, 200, 500, 1000])
@pytest.mark.parametrize("corrupt", [0.0, 0.05, 0.1, 0.2])
def test_two_contradictory_requests_cannot_both_reach_the_threshold(clients, corrupt):
    degree = choose_degree(clients, Threat(corrupt, 0.1))
    # An honest neighbour answers one of them, a colluding one both: 2t <= k + colluding is needed.
    needed = 2 * degree.threshold - degree.neighbours
    colluding, others = int(corrupt * clients), clients - 1 - int(corrupt * clients)
    bad_draws = sum(
        comb(colluding, bad) * comb(others, degree.neighbours - bad)
        for bad in range(needed, min(colluding, degree.neighbours) + 1)
    )
    assert bad_draws * clients << 41 <= comb(clients - 1, degree.neighbours)


@pytest.mark.parametrize("clients", [2, 10, 100, 128, 200, 500])
@pytest.mark.parametrize("dropout", [0.1, 0.35])
def test_a_server_that_follows_the_protocol_can_be_planned_for(clients, dropout):
    plan = make_plan(clients, 4, 8, threat=Threat(0.05, dropout, malicious=False))
    lying = choose_degree(clients, Threat(0.05, dropout))
    assert isinstance(plan, Plan)
    assert plan.neighbours <= lying.neighbours
