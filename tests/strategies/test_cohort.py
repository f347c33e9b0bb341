from collections import Counter

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto import ReplayedEntropy
from fedcore.engine import InProcessGrid, SystemClock, VirtualClock, WrappedGrid
from fedcore.errors import ConfigurationError
from fedcore.job import FixedSize
from strategies.cohort import CohortGrid, discover
from strategies.sampling import Cohorts, choose_cohort
from tests.strategies.federation import RecordingGrid, SilentGrid, initial, plain_app

label_sets = st.sets(st.text(max_size=6), min_size=1, max_size=30)


@given(labels=label_sets, seed=st.integers(0, 2**62), number=st.integers(1, 10**6), data=st.data())
def test_a_cohort_is_a_sample_without_replacement(labels, seed, number, data):
    size = data.draw(st.integers(1, len(labels)))
    cohort = choose_cohort(labels, size, seed=seed, round_number=number)
    assert len(cohort) == len(set(cohort)) == size
    assert set(cohort) <= labels
    # Neither the order in which nodes connected nor the size changes who comes first.
    assert cohort == choose_cohort(sorted(labels), size, seed=seed, round_number=number)
    everybody = choose_cohort(labels, len(labels), seed=seed, round_number=number)
    assert everybody[:size] == cohort
    assert set(everybody) == labels


def test_every_label_is_as_likely_as_every_other():
    labels = [str(n) for n in range(20)]
    chosen = Counter(
        label
        for number in range(1, 2001)
        for label in choose_cohort(labels, 5, seed=3, round_number=number)
    )
    # 500 expected with a standard deviation of 19.4: five of them.
    assert all(abs(chosen[label] - 500) < 100 for label in labels)


def test_cohorts_differ_from_round_to_round_and_from_seed_to_seed():
    labels = [str(n) for n in range(100)]
    cohorts = {
        tuple(choose_cohort(labels, 10, seed=seed, round_number=number))
        for seed in range(5)
        for number in range(1, 6)
    }
    assert len(cohorts) == 25


def named_app(name):
    app = ClientApp()

    @app.query("profile")
    def profile(message, context):
        record = ConfigRecord({"label": name(context.node_config["partition-id"])})
        return Message(RecordDict({"profile": record}), reply_to=message)

    return app


def found(app, clients, *, nodes=None, clock=None):
    with InProcessGrid(app, [{}] * clients, {}) as grid:
        clock = clock or VirtualClock()
        return discover(grid, nodes=nodes or clients, seconds=5.0, clock=clock).labels


def test_nodes_name_themselves():
    names = ["kitchen", "garage", "roof"]
    assert found(named_app(names.__getitem__), 3) == dict(
        zip([1000, 1001, 1002], names, strict=True)
    )


def test_a_node_without_a_name_is_called_by_its_id():
    assert found(plain_app(), 2) == {1000: "1000", 1001: "1001"}
    assert found(named_app(lambda _: 7), 1) == {1000: "1000"}


def test_a_node_that_does_not_answer_is_called_by_its_id_after_the_wait():
    clock = VirtualClock()
    with InProcessGrid(named_app(str), [{}] * 3, {}) as nodes:
        grid = SilentGrid(nodes, lambda message: message.metadata.dst_node_id == 1001)
        labels = discover(grid, nodes=3, seconds=5.0, clock=clock).labels
    assert labels == {1000: "0", 1001: "1001", 1002: "2"}
    assert clock.now() == pytest.approx(5.0, abs=0.2)


def test_a_name_that_is_used_twice_is_refused():
    with pytest.raises(ConfigurationError, match=r"label of its own.*partition-id"):
        found(named_app(lambda _: "twin"), 2)


def test_too_few_nodes_are_refused_after_the_wait():
    clock = VirtualClock()
    with pytest.raises(ConfigurationError, match=r"expected 4 nodes, found 3 after 5 s"):
        found(named_app(str), 3, nodes=4, clock=clock)
    assert clock.now() == pytest.approx(5.0, abs=0.2)


def test_nodes_that_connect_late_are_waited_for():
    class Arriving(WrappedGrid):
        asked = 0

        def get_node_ids(self):
            self.asked += 1
            return list(super().get_node_ids())[: self.asked]

    with InProcessGrid(named_app(str), [{}] * 3, {}) as nodes:
        labels = discover(Arriving(nodes), nodes=3, seconds=5.0, clock=VirtualClock()).labels
    assert list(labels.values()) == ["0", "1", "2"]


def test_more_nodes_than_needed_are_all_found():
    assert len(found(named_app(str), 5, nodes=2, clock=SystemClock())) == 5


def test_a_run_that_goes_on_does_not_wait_for_ever_for_a_node_that_it_knows():
    clock = VirtualClock()
    earlier = {1000: "0", 1001: "1", 4711: "2"}
    with InProcessGrid(named_app(str), [{}] * 2, {}) as nodes:
        grid = RecordingGrid(nodes)
        assert discover(grid, nodes=3, seconds=300.0, clock=clock, known=earlier).labels == earlier
        assert grid.sent == []  # nobody was asked again
        # One that is back under another number is not there twice.
        moved = {1000: "0", 4711: "1", 4712: "2"}
        found = discover(grid, nodes=3, seconds=300.0, clock=clock, known=moved)
    assert found.labels == {1000: "0", 1001: "1", 4712: "2"}
    assert clock.now() == pytest.approx(120.0, abs=0.4)


def public_cohorts(labels, **changes):
    """Three of `labels` a round, by a seed that everybody knows."""
    return Cohorts(
        labels,
        FixedSize(),
        size=3,
        devices=len(labels),
        seed=5,
        entropy=ReplayedEntropy(b"cohort"),
        **changes,
    )


def test_an_unmodified_strategy_trains_exactly_the_cohort_of_each_round():
    labels = {1000 + n: f"device-{n}" for n in range(8)}
    with InProcessGrid(plain_app(), [{}] * 8, {}) as nodes:
        wire = RecordingGrid(nodes)
        grid = CohortGrid(wire, public_cohorts(labels))
        strategy = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3
        )
        strategy.start(grid=grid, initial_arrays=initial(), num_rounds=4)
    trained = [labels[message.metadata.dst_node_id] for message in wire.sent]
    expected = [choose_cohort(labels.values(), 3, seed=5, round_number=n) for n in range(1, 5)]
    assert [set(trained[at : at + 3]) for at in range(0, 12, 3)] == [set(c) for c in expected]
    assert len(set(map(frozenset, expected))) > 1


def test_only_training_ends_a_round_and_rounds_may_start_later():
    labels = {1000 + n: str(n) for n in range(8)}
    with InProcessGrid(plain_app(), [{}] * 8, {}) as nodes:
        grid = CohortGrid(nodes, public_cohorts(labels, first_round=7))
        first = grid.get_node_ids()
        assert [labels[node] for node in first] == choose_cohort(
            labels.values(), 3, seed=5, round_number=7
        )
        content = RecordDict({"arrays": initial()})
        list(grid.send_and_receive([Message(content, node, "evaluate") for node in first]))
        assert grid.get_node_ids() == first
        list(grid.send_and_receive([Message(content, node, "train") for node in first]))
        assert grid.get_node_ids() != first
