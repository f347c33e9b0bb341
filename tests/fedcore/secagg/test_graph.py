import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.secagg import make_plan
from fedcore.secagg.graph import neighbourhood
from fedcore.secagg.plan import Plan

# Ten clients, degree 4, context 00...00.
GOLDEN = [
    {3, 4, 6, 9}, {5, 6, 7, 8}, {3, 4, 5, 7}, {0, 2, 4, 5}, {0, 2, 3, 9},
    {1, 2, 3, 7}, {0, 1, 8, 9}, {1, 2, 5, 8}, {1, 6, 7, 9}, {0, 4, 6, 8},
]  # fmt: skip


def graph_of(clients, degree, context=bytes(32)):
    return [neighbourhood(client, clients, degree, context) for client in range(clients)]


def reachable(graph):
    seen, frontier = {0}, {0}
    while frontier:
        frontier = set().union(*(graph[client] for client in frontier)) - seen
        seen |= frontier
    return seen


@settings(deadline=None, max_examples=60)
@given(data=st.data(), clients=st.integers(3, 60), context=st.binary(max_size=32))
def test_a_graph_is_symmetric_regular_connected_and_without_loops(data, clients, context):
    degree = 2 * data.draw(st.integers(1, (clients - 1) // 2))
    graph = graph_of(clients, degree, context)
    for client, peers in enumerate(graph):
        assert len(peers) == degree
        assert client not in peers
        assert all(client in graph[peer] for peer in peers)
    assert reachable(graph) == set(range(clients))


@pytest.mark.parametrize("clients", [2, 3, 10, 128])
def test_the_complete_graph_joins_everybody_with_everybody_else(clients):
    everybody = set(range(clients))
    assert graph_of(clients, clients - 1) == [everybody - {client} for client in everybody]


def test_known_answer():
    assert graph_of(10, 4) == GOLDEN


def test_neighbours_change_with_the_context_and_with_nothing_else():
    contexts = [bytes([number]) * 32 for number in range(20)]
    graphs = [tuple(graph_of(50, 6, context)) for context in contexts]
    assert len(set(graphs)) == len(graphs)
    assert graphs == [tuple(graph_of(50, 6, context)) for context in contexts]


def test_every_field_of_the_plan_moves_the_neighbours():
    plans = [
        Plan(60, 6, 4, 30, 16, 10),
        Plan(60, 6, 5, 30, 16, 10),
        Plan(60, 6, 4, 31, 16, 10),
        Plan(60, 6, 4, 30, 17, 10),
        Plan(60, 6, 4, 30, 16, 11),
        Plan(60, 6, 4, 30, 16, 10, b"c" * 32),
    ]
    graphs = {tuple(plan.neighbours_of(client) for client in range(60)) for plan in plans}
    assert len(graphs) == len(plans)


def test_any_two_clients_are_neighbours_equally_often():
    # 800 graphs of 21 clients and degree 4: a pair is joined with probability 4/20.
    counts = [0] * 21
    for number in range(800):
        for peer in neighbourhood(0, 21, 4, number.to_bytes(4, "little")):
            counts[peer] += 1
    expected = 800 * 4 / 20
    assert counts[0] == 0
    assert sum((count - expected) ** 2 / expected for count in counts[1:]) < 45  # 19 d.o.f., 1e-3


@pytest.mark.parametrize("neighbours", [65_519, 65_518, 156])
def test_a_device_pays_for_its_own_neighbours_only(neighbours):
    plan = Plan(65_520, neighbours, neighbours - 10, 2, 16, 10)
    tracemalloc.start()
    try:
        peers = plan.neighbours_of(7)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(peers) == neighbours
    assert peak < 40e6  # bytes; the whole graph takes 500 MB at 156 neighbours


def test_the_plan_of_a_large_cohort_uses_the_sparse_graph():
    plan = make_plan(1000, 4, 16)
    assert {len(plan.neighbours_of(client)) for client in range(1000)} == {plan.neighbours}
