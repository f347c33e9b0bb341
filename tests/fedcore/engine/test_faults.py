import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.engine import DroppingGrid, DropScript, Fault, FaultyGrid, InProcessGrid
from fedcore.engine.flower_private import empty_run
from fedcore.errors import ConfigurationError
from tests.fedcore.engine.engine_apps import client, instructions

SCRIPT = {1000: None, 1001: Fault.DROPPED, 1002: Fault.LOST_REPLY, 1003: None}


def run_script(message):
    return SCRIPT[message.metadata.dst_node_id]


@pytest.fixture
def inner():
    with InProcessGrid(client, [{}] * 4, {}) as grid:
        yield grid


def describe(message):
    stage = {"train.leak": "upload", "query": "setup"}.get(message.metadata.message_type)
    return stage and (int(message.metadata.group_id), stage, message.metadata.dst_node_id)


def receive(grid, messages, *, streaming):
    if not streaming:
        return grid.send_and_receive(messages, timeout=60.0)
    ids = list(grid.push_messages(messages))
    replies = {r.metadata.reply_to_message_id: r for r in grid.pull_messages(set(ids))}
    return [replies[key] for key in ids]


def visits(grid):
    replies = grid.send_and_receive(instructions(grid, "train.leak"))
    return [len(r.content["log"]["visits"]) - 1 for r in replies]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("fault", "visited", "error"),
    [(None, 1, False), (Fault.DROPPED, 0, True), (Fault.LOST_REPLY, 1, True)],
)
def test_a_fault_decides_whether_the_node_works_and_whether_it_is_heard(
    inner, streaming, fault, visited, error
):
    grid = FaultyGrid(inner, lambda m: fault if m.metadata.dst_node_id == 1002 else None)
    replies = receive(grid, instructions(grid, "train.leak"), streaming=streaming)
    assert [r.has_error() for r in replies] == [False, False, error, False]
    assert visits(inner) == [1, 1, visited, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_silent_node_looks_as_it_does_on_a_superlink(inner, streaming):
    grid = FaultyGrid(inner, run_script)
    messages = instructions(grid, "query")
    replies = receive(grid, messages, streaming=streaming)
    errors = [reply for reply in replies if reply.has_error()]
    assert [r.error.code for r in errors] == [5, 5]
    assert [r.metadata.src_node_id for r in errors] == [1, 1]
    asked = [messages[1].metadata.message_id, messages[2].metadata.message_id]
    assert [r.metadata.reply_to_message_id for r in errors] == asked
    assert {r.metadata.group_id for r in errors} == {"1"}


def test_the_error_for_a_dropped_message_is_handed_out_once(inner):
    grid = FaultyGrid(inner, lambda _: Fault.DROPPED)
    ids = grid.push_messages(instructions(grid, "query"))
    assert [r.error.code for r in grid.pull_messages(ids)] == [5] * 4
    assert [r.error.code for r in grid.pull_messages(ids)] == [3] * 4


def test_everything_else_is_passed_on(inner):
    grid = FaultyGrid(inner, lambda _: None)
    grid.set_run(empty_run(1))
    assert grid.run is inner.run
    assert list(grid.get_node_ids()) == inner.get_node_ids()
    (message,) = instructions(grid, "query", nodes=[1003])
    made = grid.create_message(message.content, "query", 1003, "9")
    assert (made.metadata.dst_node_id, made.metadata.group_id) == (1003, "9")


def test_clients_disappear_before_their_stage_and_only_there(inner):
    drops = DropScript(seed=3, per_round=2, stages=("upload",))
    grid = DroppingGrid(inner, drops, describe)
    setup = grid.send_and_receive(instructions(grid, "query"))
    upload = receive(grid, instructions(grid, "train.leak"), streaming=True)
    other = grid.send_and_receive(instructions(grid, "train.plunder"))
    gone = {n for n, r in zip(inner.get_node_ids(), upload, strict=True) if r.has_error()}
    assert not any(reply.has_error() for reply in setup)
    assert gone == drops.victims(1, "upload", inner.get_node_ids())
    assert len(gone) == 2
    assert {r.error.code for r in other} == {2}  # no script: the app itself failed


@given(
    seed=st.integers(0, 100),
    per_round=st.integers(0, 5),
    round_number=st.integers(1, 50),
    cohort=st.sets(st.integers(0, 10_000), min_size=1, max_size=20),
    data=st.data(),
)
def test_victims_depend_on_seed_round_and_cohort_alone(seed, per_round, round_number, cohort, data):
    drops = DropScript(seed=seed, per_round=per_round, stages=("setup", "upload"))
    shuffled = data.draw(st.permutations(sorted(cohort)))
    by_stage = [drops.victims(round_number, stage, cohort) for stage in drops.stages]
    assert by_stage == [drops.victims(round_number, stage, shuffled) for stage in drops.stages]
    assert all(victims <= cohort for victims in by_stage)
    if len(cohort) >= per_round:
        assert sum(map(len, by_stage)) == per_round


def test_other_seeds_and_rounds_have_other_victims():
    cohort = range(1000)
    victims = {
        DropScript(seed=seed, per_round=5).victims(number, "upload", cohort)
        for seed in range(5)
        for number in range(1, 6)
    }
    assert len(victims) == 25


@pytest.mark.parametrize("wrong", [{"per_round": -1}, {"stages": ()}])
def test_impossible_scripts_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=r"faults\."):
        DropScript(**wrong)


def test_a_client_that_is_gone_stays_gone_when_it_is_asked_again(inner):
    grid = DroppingGrid(inner, DropScript(seed=3, per_round=1, stages=("setup",)), describe)
    messages = instructions(grid, "query")
    gone = [reply.has_error() for reply in receive(grid, messages, streaming=False)]
    assert sum(gone) == 1
    for node, silent in zip(inner.get_node_ids(), gone, strict=True):
        (reply,) = receive(grid, instructions(grid, "query", nodes=[node]), streaming=True)
        assert reply.has_error() == silent


def test_a_lost_reply_is_lost_once_and_costs_nobody_else_one(inner):
    script = DropScript(seed=3, per_round=2, stages=("setup",), lose="reply")
    grid = DroppingGrid(inner, script, describe)
    lost = [
        reply.has_error() for reply in receive(grid, instructions(grid, "query"), streaming=True)
    ]
    assert sum(lost) == 2
    victims = [node for node, silent in zip(inner.get_node_ids(), lost, strict=True) if silent]
    again = receive(grid, instructions(grid, "query", nodes=victims), streaming=True)
    assert [reply.has_error() for reply in again] == [False, False]


def test_every_round_loses_its_own_replies(inner):
    script, number = DropScript(seed=3, stages=("setup",), lose="reply"), [0]
    grid = DroppingGrid(inner, script, lambda message: (number[0], *describe(message)[1:]))
    for number[0] in (1, 2, 3):
        replies = receive(grid, instructions(grid, "query"), streaming=True)
        assert sum(reply.has_error() for reply in replies) == 1
