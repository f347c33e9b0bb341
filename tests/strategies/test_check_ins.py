"""Whom a buffer takes, who is asked next, and what is given up."""

from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedcore.engine import InProcessGrid, VirtualClock, WrappedGrid, to_record
from fedcore.job import Buffered
from fedcore.pipeline import RECORD
from fedcore.pipeline.decline import DECLINED
from fedcore.pipeline.envelope import CHECK_IN
from strategies.check_ins import LOOK_SECONDS, CheckIns, choose
from strategies.cohort import PROFILE
from strategies.sampling import choose_cohort
from tests.strategies.federation import node_of

groups = st.dictionaries(st.integers(0, 6), st.integers(1, 7), max_size=5)


@given(groups=groups, size=st.integers(1, 12), fewest=st.integers(1, 4))
def test_a_buffer_is_full_and_has_enough_of_each_version_whenever_that_can_be(groups, size, fewest):
    picked = choose(groups, size, fewest)
    subsets = chain.from_iterable(combinations(groups, n) for n in range(1, len(groups) + 1))
    possible = any(
        all(groups[age] >= fewest for age in subset)
        and fewest * len(subset) <= size <= sum(groups[age] for age in subset)
        for subset in subsets
    )
    assert (picked is not None) == possible
    if picked is not None:
        assert sum(picked.values()) == size
        assert all(fewest <= count <= groups[age] for age, count in picked.items())


@given(groups=groups, size=st.integers(1, 12), fewest=st.integers(1, 3))
def test_of_a_younger_version_no_more_go_than_must_while_an_older_one_waits(groups, size, fewest):
    picked = choose(groups, size, fewest) or {}
    for age, count in picked.items():
        if count < groups[age]:
            assert all(picked[other] == fewest for other in picked if other < age)


@dataclass
class Fleet(WrappedGrid):
    """Devices that answer when a test says so, and as it says."""

    inner: Any
    pushed: list[Message] = field(default_factory=list)
    done: dict[int, RecordDict | Error] = field(default_factory=dict)
    here: set[int] | None = None
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.inner)

    def get_node_ids(self):
        nodes = super().get_node_ids()
        return [node for node in nodes if self.here is None or node - node_of(0) in self.here]

    def push_messages(self, messages):
        batch = list(messages)
        ids = list(self.inner.push_messages(batch))
        self.pushed += batch
        return ids

    def pull_messages(self, message_ids):
        for message in self.pushed:
            node = message.metadata.dst_node_id
            if message.metadata.message_id not in message_ids:
                continue
            if message.metadata.message_type == PROFILE:
                name = self.names.get(node - node_of(0), str(node - node_of(0)))
                profile = ConfigRecord({"label": name})
                yield Message(RecordDict({"profile": profile}), reply_to=message)
            elif node in self.done:
                yield Message(self.done.pop(node), reply_to=message)

    def finish(self, *clients, answer=None):
        done = RecordDict({RECORD: ConfigRecord({CHECK_IN: True})})
        self.done |= {node_of(client): answer or done for client in clients}

    @property
    def asked(self):
        return [
            message.metadata.dst_node_id - node_of(0)
            for message in self.pushed
            if message.metadata.message_type == "train"
        ]


def model(value):
    return RecordDict({"arrays": to_record({"w": np.full(3, value, np.float32)})})


def fleet(check, *, clients=6, seconds=100.0, fewest=1, size=2, **schedule):
    """Run `check` on check-ins over a fleet that a test drives."""
    values = {"concurrency": 3, "max_staleness": 2, "same_model": 1} | schedule
    with InProcessGrid(_app(), [{}] * clients, {}) as nodes:
        grid = Fleet(nodes)
        labels = {node_of(client): str(client) for client in range(clients)}
        check(
            grid,
            CheckIns(
                grid, VirtualClock(), labels, Buffered(**values), size=size, fewest=fewest,
                seconds=seconds,
            ),
        )  # fmt: skip


def _app():
    from flwr.clientapp import ClientApp  # noqa: PLC0415 - never called

    return ClientApp()


def test_as_many_train_as_may_and_the_next_is_asked_when_one_is_done():
    def check(grid, check_ins):
        grid.finish(*range(6))
        members = check_ins.gather(model(1), "train", 1)
        assert sorted(members.values()) == [0, 0]
        first = grid.asked
        # Three were asked at first, and one more for each that was done.
        assert len(first) == len(set(first)) == 5
        assert {node - node_of(0) for node in members} == set(first[:2])

    fleet(check)


@pytest.mark.parametrize(("done_in", "age"), [(1, 0), (2, 1), (3, 2), (4, None)])
def test_an_update_is_as_old_as_models_came_since_and_dropped_if_it_is_too_old(done_in, age):
    (slow, *_) = choose_cohort(map(str, range(6)), 2, seed=0, round_number=1)
    others = {client for client in range(6) if str(client) != slow}

    def check(grid, check_ins):
        for number in range(1, done_in):
            grid.done.clear()
            grid.finish(*others)
            assert node_of(int(slow)) not in check_ins.gather(model(number), "train", number)
        grid.done.clear()
        grid.finish(int(slow), *(others if age is None else ()))
        members = check_ins.gather(model(done_in), "train", done_in)
        if age is None:
            assert node_of(int(slow)) not in members
        else:
            assert members == {node_of(int(slow)): age}
        assert check_ins.report()[0].dropped == (age is None)

    fleet(check, size=1, concurrency=2, max_staleness=2)


def test_a_device_is_asked_once_between_two_buffers():
    def check(grid, check_ins):
        grid.finish(*range(6), answer=Error(2, "it failed"))
        assert check_ins.gather(model(1), "train", 1) == {}
        assert sorted(grid.asked) == list(range(6))
        told, _, lost, _ = check_ins.report()
        assert (lost, told.running, told.waiting) == (6, 0, 0)

    fleet(check)


def test_devices_that_decline_are_counted_by_their_reasons():
    def check(grid, check_ins):
        answer = RecordDict({RECORD: ConfigRecord({DECLINED: "low_battery"})})
        grid.finish(0, 1, 2, answer=answer)
        grid.finish(3, 4, 5)
        assert check_ins.gather(model(1), "train", 1) == {}
        told, traffic, lost, declined = check_ins.report()
        assert told.waiting == 3
        assert (lost, declined) == (3, {"low_battery": 3})
        assert traffic.downloads == len(grid.asked)
        assert check_ins.report()[2:] == (0, {})  # counted anew

    fleet(check, size=4)


def test_a_reply_that_says_something_else_is_no_check_in():
    def check(grid, check_ins):
        grid.finish(*range(6), answer=RecordDict({RECORD: ConfigRecord({CHECK_IN: 1})}))
        assert check_ins.gather(model(1), "train", 1) == {}
        assert check_ins.report()[2] == 6

    fleet(check)


def test_a_device_that_does_not_answer_is_given_up_and_not_waited_for():
    def check(grid, check_ins):
        assert check_ins.gather(model(1), "train", 1) == {}
        assert check_ins.clock.now() > 200  # six devices, three at a time, 100 s each
        assert check_ins.report()[2] == 6

    fleet(check)


def test_an_update_that_nobody_can_join_any_more_is_dropped():
    def check(grid, check_ins):
        grid.finish(*range(6))
        members = check_ins.gather(model(1), "train", 1)
        lonely = check_ins.state()
        assert len(members) == 2
        assert {task.version for task in (*lonely.running, *lonely.waiting)} == set(
            check_ins.versions
        )
        # Of those that still train from model 1 one fails: the other is alone with it.
        one, *others = [task.node_id - node_of(0) for task in lonely.running]
        grid.done.clear()
        grid.finish(one)
        grid.finish(*others, answer=Error(2, "it failed"))
        for client in set(range(6)) - {one, *others}:
            grid.finish(client)
        members = check_ins.gather(model(2), "train", 2)
        assert node_of(one) not in members or members[node_of(one)] == 0
        assert check_ins.report()[0].dropped == 1

    fleet(check, fewest=2, same_model=2, concurrency=3)


def test_devices_that_come_later_are_asked_their_names_and_then_to_train():
    def check(grid, check_ins):
        grid.here = {0, 1, 2}
        for node in (node_of(3), node_of(4), node_of(5)):
            del check_ins.labels[node]
        grid.finish(*range(6))
        check_ins.gather(model(1), "train", 1)
        assert set(grid.asked) <= {0, 1, 2}
        grid.here |= {3, 4}
        check_ins.clock.sleep(LOOK_SECONDS)
        grid.finish(*range(6))
        check_ins.gather(model(2), "train", 2)
        assert {check_ins.labels[node_of(client)] for client in (3, 4)} == {"3", "4"}
        assert {3, 4} & set(grid.asked)
        assert 5 not in grid.asked

    fleet(check)


def test_a_device_that_comes_back_as_another_node_is_still_the_same_and_a_double_is_not_asked():
    def check(grid, check_ins):
        grid.here = {1, 2, 3, 4}
        grid.names = {4: "0", 3: "1"}  # 0 is back as node 4; node 3 calls itself like node 1
        for node in (node_of(3), node_of(4)):
            del check_ins.labels[node]
        grid.finish(*range(6))
        check_ins.gather(model(1), "train", 1)
        assert check_ins.labels == {
            node_of(1): "1", node_of(2): "2", node_of(4): "0", node_of(5): "5",
        }  # fmt: skip
        assert set(grid.asked) <= {1, 2, 4}

    fleet(check)


def test_a_device_that_is_not_connected_is_not_asked():
    def check(grid, check_ins):
        grid.here = {2, 3}
        grid.finish(*range(6))
        members = check_ins.gather(model(1), "train", 1)
        assert set(members) == {node_of(2), node_of(3)}

    fleet(check)
