"""Nodes that never answer: a stage ends at its deadline, on a clock that costs nothing."""

import itertools
from dataclasses import replace

import pytest
from flwr.app import Message, RecordDict

from fedcore.engine import InProcessGrid, VirtualClock
from fedcore.pipeline import NoSecAgg
from strategies.exchange import LONGEST_POLL_SECONDS, POLL_SECONDS, exchange
from tests.strategies.federation import (
    EVERY,
    EVERY_STAGE,
    OPEN,
    ROOMY,
    SilentGrid,
    assert_close,
    client_app,
    node_of,
    plain_app,
    play,
    stage_of,
    weighted_mean,
)

PLAN = replace(ROOMY, stage_seconds=60.0)
GONE = {node_of(4), node_of(9)}
REST = [client for client in range(10) if client not in {4, 9}]


def from_stage(stage):
    """GONE fall silent at `stage`, and stay so."""

    def silent(message: Message) -> bool:
        reached = stage_of(message)
        if message.metadata.dst_node_id not in GONE or not reached:
            return False
        return EVERY.index(reached) >= EVERY.index(stage)

    return silent


@pytest.mark.parametrize(("plan", "stage"), EVERY_STAGE)
def test_a_stage_waits_for_its_deadline_once_and_goes_on_without_the_silent(plan, stage):
    clock = VirtualClock()
    plan = replace(plan, stage_seconds=60.0)
    played = play(plan=plan, clock=clock, wrap=lambda grid: SilentGrid(grid, from_stage(stage)))
    survivors = range(10) if stage in {"endorse", "reveal"} else REST
    assert_close(played.arrays, weighted_mean(survivors), atol=1e-5)
    assert played.reports[0].lost == {stage: 2}
    assert clock.now() == pytest.approx(60.0, abs=2 * POLL_SECONDS)


def test_without_silence_nobody_waits():
    clock = VirtualClock()
    play(plan=PLAN, clock=clock)
    assert clock.now() == 0.0


def test_in_the_clear_there_is_one_deadline():
    clock = VirtualClock()
    plan = replace(PLAN, secagg=NoSecAgg())
    played = play(
        client_app(policy=OPEN), plan, clock=clock,
        wrap=lambda grid: SilentGrid(grid, from_stage("upload")),
    )  # fmt: skip
    assert_close(played.arrays, weighted_mean(REST), atol=1e-5)
    assert clock.now() == pytest.approx(60.0, abs=2 * POLL_SECONDS)


def test_the_strategys_timeout_shortens_the_wait():
    clock = VirtualClock()
    play(plan=PLAN, clock=clock, timeout=5, wrap=lambda g: SilentGrid(g, from_stage("share")))
    assert clock.now() == pytest.approx(5.0, abs=2 * POLL_SECONDS)


def test_when_everybody_is_silent_each_attempt_waits_once():
    clock = VirtualClock()
    played = play(plan=PLAN, clock=clock, wrap=lambda grid: SilentGrid(grid, lambda _: True))
    (report,) = played.reports
    assert (report.survivors, report.attempts, report.lost) == (0, 2, {"advertise": 10})
    assert clock.now() == pytest.approx(120.0, abs=4 * POLL_SECONDS)


def test_an_answer_within_the_deadline_counts_and_one_after_it_does_not():
    def played(late):
        clock = VirtualClock()
        silent = from_stage("upload")
        return play(
            plan=PLAN,
            clock=clock,
            wrap=lambda grid: SilentGrid(grid, silent, clock, late_seconds=late),
        )

    assert_close(played(3.0).arrays, weighted_mean(range(10)), atol=1e-5)
    late = played(90.0)
    assert_close(late.arrays, weighted_mean(REST), atol=1e-5)
    assert late.reports[0].lost == {"upload": 2}


def questions(grid):
    return {n: Message(RecordDict(), n, "evaluate") for n in grid.get_node_ids()}


def test_an_exchange_hands_over_every_reply_as_it_comes():
    clock = VirtualClock()
    with InProcessGrid(plain_app(), [{}] * 3, {}) as grid:
        replies = exchange(grid, questions(grid), seconds=9.0, clock=clock)
        key, reply = next(replies)
        assert (key, reply.metadata.src_node_id) == (1000, 1000)
        assert [key for key, _ in replies] == [1001, 1002]


def test_an_exchange_maps_an_error_to_the_node_that_it_is_about():
    clock = VirtualClock()
    with InProcessGrid(plain_app(), [{}] * 2, {}) as grid:
        messages = {**questions(grid), "ghost": Message(RecordDict(), 4711, "evaluate")}
        replies = dict(exchange(grid, messages, seconds=9.0, clock=clock))
    assert replies["ghost"].has_error()
    assert replies["ghost"].metadata.src_node_id == 1
    assert replies[1000].has_content()


class NetworkedGrid(SilentGrid):
    """Hands over what has come as a list, as a grid over a network does, and notes when."""

    def __init__(self, grid, silent, clock):
        super().__init__(grid, silent, clock)
        self.clock, self.asked_at = clock, []

    def pull_messages(self, message_ids):
        self.asked_at.append(self.clock.now())
        return list(super().pull_messages(message_ids))


def test_a_network_is_asked_less_often_the_longer_it_takes():
    clock = VirtualClock()
    with InProcessGrid(plain_app(), [{}] * 2, {}) as inner:
        grid = NetworkedGrid(inner, lambda message: message.metadata.dst_node_id == 1001, clock)
        replies = exchange(grid, questions(grid), seconds=60.0, clock=clock)
        assert [key for key, _ in replies] == [1000]
    pauses = [b - a for a, b in itertools.pairwise(grid.asked_at)]
    assert pauses[:2] == pytest.approx([0.0, POLL_SECONDS])  # there was something, then nothing
    assert max(pauses) <= LONGEST_POLL_SECONDS + 1e-9
    assert all(
        pause <= max(POLL_SECONDS, 0.05 * at) + 1e-9
        for at, pause in zip(grid.asked_at, pauses, strict=False)
    )
    assert len(pauses) < 150  # every tenth of a second it would be 600
    assert clock.now() == pytest.approx(60.0, abs=2 * POLL_SECONDS)


def test_an_exchange_of_nothing_is_over_at_once():
    clock = VirtualClock()
    with InProcessGrid(plain_app(), [{}], {}) as grid:
        assert list(exchange(grid, {}, seconds=9.0, clock=clock)) == []
    assert clock.now() == 0.0


def test_a_message_that_the_grid_does_not_take_is_not_waited_for():
    class Refusing(SilentGrid):
        def push_messages(self, messages):
            return ["" for _ in messages]

    clock = VirtualClock()
    with InProcessGrid(plain_app(), [{}], {}) as grid:
        refusing = Refusing(grid, lambda _: False)
        assert list(exchange(refusing, questions(grid), seconds=9.0, clock=clock)) == []
    assert clock.now() == 0.0
