"""Who is invited, and at which index, by a coordinator that knows its nodes' certificates."""

from clients.simulated import FAR_FUTURE
from fedcore.engine import InProcessGrid, VirtualClock
from fedcore.pipeline import RoundPlan, bind_round
from strategies.seats import Registry
from strategies.secure_round import Invited
from tests.strategies.federation import AUTHORITY, ENROLLED, SIGNED, client_app, node_of

CLIENTS = 6
ASKED = [Invited(node_of(client), str(client)) for client in range(CLIENTS)]
BOUND = bind_round(
    RoundPlan(
        run=SIGNED, run_id="1", round_number=1, attempt=1, clients=CLIENTS, dim=9, model_digest=""
    )
)


def seats_at(*times, asked=ASKED):
    """What a registry finds at these times, one after another."""
    now = iter(times)
    with InProcessGrid(client_app(seed=1, unix_time=lambda: 0.0), [{}] * CLIENTS, {}) as grid:
        authority = bytes.fromhex(AUTHORITY)
        registry = Registry(grid, VirtualClock(), authority, unix_time=lambda: next(now))
        return [registry.seat(BOUND, asked, "train") for _ in times]


def test_clients_are_in_the_order_of_their_keys_whatever_order_they_were_asked_in():
    (one,), (other,) = seats_at(0.0), seats_at(0.0, asked=ASKED[::-1])
    assert one.clients == other.clients
    assert one.identity_keys == other.identity_keys == tuple(sorted(set(one.identity_keys)))
    assert {client.node_id for client in one.clients} == {node_of(c) for c in range(CLIENTS)}


def test_a_key_stands_where_its_own_device_does():
    class Node:
        def __init__(self, client):
            self.node_config = {"partition-id": client}

    (seats,) = seats_at(0.0)
    for client, key in zip(seats.clients, seats.identity_keys, strict=True):
        assert ENROLLED(Node(int(client.label))).certificate.key == key


def test_a_certificate_is_asked_for_again_when_it_has_expired():
    first, second, late, later = seats_at(0.0, FAR_FUTURE - 1.0, FAR_FUTURE, FAR_FUTURE)
    assert first.traffic.up_total > 0
    assert (second.clients, second.traffic.up_total) == (first.clients, 0)
    assert late.clients == later.clients == ()
    assert late.traffic.up_total == later.traffic.up_total == first.traffic.up_total
