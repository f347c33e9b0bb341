import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from fedcore.engine import InProcessGrid, VirtualClock
from fedcore.engine.flower_private import Identity, empty_run
from fedcore.errors import ConfigurationError
from tests.fedcore.engine.engine_apps import client, instructions

ENGINES = pytest.mark.parametrize("workers", [0, 2])


def grid_of(nodes, workers=0, **run_config):
    return InProcessGrid(client, [{}] * nodes, run_config, workers)


def payload():
    arrays = ArrayRecord([np.arange(100_000.0)])
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"list": [1, 2]})})


def me(reply):
    return reply.content["me"]


@ENGINES
def test_a_client_cannot_change_what_the_server_or_another_client_holds(workers):
    content = payload()
    before = content["arrays"].to_numpy_ndarrays()[0].copy()
    with grid_of(4, workers) as grid:
        messages = instructions(grid, "train.plunder", content=content)
        for _ in range(2):
            replies = grid.send_and_receive(messages)
            assert [list(r.content["found"]["counts"]) for r in replies] == [[1, 2]] * 4
    assert content["config"]["list"] == [1, 2]
    np.testing.assert_array_equal(content["arrays"].to_numpy_ndarrays()[0], before)
    assert {m.metadata.group_id for m in messages} == {"1"}


def test_array_bytes_are_shared_with_the_client_and_never_copied():
    received = []
    app = ClientApp()

    @app.train()
    def keep(message, context):
        received.append(message.content["arrays"])
        return Message(message.content, reply_to=message)

    content = payload()
    (array,) = content["arrays"].values()
    with InProcessGrid(app, [{}, {}], {}) as grid:
        replies = grid.send_and_receive(instructions(grid, "train", content=content))
    for record in [*received, *(reply.content["arrays"] for reply in replies)]:
        (copied,) = record.values()
        assert copied.data is array.data
        assert copied is not array


def test_changing_the_content_after_the_push_does_not_reach_the_client():
    content = payload()
    with grid_of(1) as grid:
        ids = grid.push_messages(instructions(grid, "train.plunder", content=content))
        content.clear()
        (reply,) = grid.pull_messages(ids)
    assert list(reply.content["found"]["counts"]) == [1, 2]


@ENGINES
def test_the_state_of_a_node_survives_between_messages_and_is_its_own(workers):
    with grid_of(3, workers) as grid:
        everyone, some = grid.get_node_ids(), grid.get_node_ids()[:1]
        first = grid.send_and_receive(instructions(grid, "train.leak", nodes=everyone))
        second = grid.send_and_receive(instructions(grid, "train.leak", nodes=some))
        third = grid.send_and_receive(instructions(grid, "train.leak", nodes=everyone))
    assert [len(r.content["log"]["visits"]) for r in first] == [1, 1, 1]
    assert [len(r.content["log"]["visits"]) for r in second] == [2]
    assert [len(r.content["log"]["visits"]) for r in third] == [3, 2, 2]


@ENGINES
def test_a_node_has_its_own_identity_and_configuration(workers):
    configs = [{"path": "a"}, {"path": "b", "partition-id": 7}]
    with InProcessGrid(client, configs, {"rate": 0.5}, workers) as grid:
        grid.send_and_receive(instructions(grid, "query"))  # tries to change its configuration
        first, second = map(me, grid.send_and_receive(instructions(grid, "query")))
    assert (first["node"], first["source"], first["run"]) == (1000, 1000, 1)
    assert (first["node.partition-id"], first["node.num-partitions"]) == (0, 2)
    assert (first["node.path"], first["run.rate"]) == ("a", 0.5)
    assert (second["node"], second["node.partition-id"]) == (1001, 7)


def test_messages_of_the_server_come_from_the_superlink_until_the_grid_is_closed():
    before = Identity.current()
    with grid_of(1) as outer:
        with grid_of(1) as inner:
            (message,) = instructions(inner, "query")
            list(inner.pull_messages(inner.push_messages([message])))
        (again,) = instructions(outer, "query")
        assert message.metadata.src_node_id == again.metadata.src_node_id == 1
        assert message.metadata.run_id == outer.run.run_id
    inner.close()
    assert Identity.current() == before


@ENGINES
def test_a_reply_carries_the_metadata_of_its_message(workers):
    with grid_of(2, workers) as grid:
        messages = instructions(grid, "query")
        replies = grid.send_and_receive(messages)
    assert [m.metadata.message_id for m in messages] == ["run-1/message-0", "run-1/message-1"]
    assert len({r.metadata.message_id for r in [*messages, *replies]}) == 4
    for message, reply in zip(messages, replies, strict=True):
        asked, got = message.metadata, reply.metadata
        assert (got.src_node_id, got.dst_node_id) == (asked.dst_node_id, asked.src_node_id)
        assert got.reply_to_message_id == asked.message_id
        assert (got.run_id, got.group_id, got.message_type) == (1, "1", "query")
        assert asked.ttl == 60.0
        assert 0 < got.ttl <= 60.0


@ENGINES
@pytest.mark.parametrize(
    ("how", "code", "reason"),
    [
        ("raise", 2, "ValueError: no such sensor"),
        ("exit", 8, "exit status 3"),
        ("nothing", 2, "must return a Message, got NoneType"),
        ("stray", 2, "not a reply"),
    ],
)
def test_a_failing_client_gives_an_error_and_keeps_its_old_state(workers, how, code, reason):
    with grid_of(2, workers, how=how) as grid:
        replies = grid.send_and_receive(instructions(grid, "train.fail"))
        states = [me(r)["state"] for r in grid.send_and_receive(instructions(grid, "query"))]
    assert [r.error.code for r in replies] == [code] * 2
    assert [r.metadata.src_node_id for r in replies] == [1000, 1001]
    assert all(reason in r.error.reason for r in replies)
    assert states == [[], []]


@ENGINES
def test_a_keyboard_interrupt_in_a_client_reaches_the_caller(workers):
    with grid_of(2, workers, how="interrupt") as grid, pytest.raises(KeyboardInterrupt):
        grid.send_and_receive(instructions(grid, "train.fail"))


def test_a_worker_that_is_killed_answers_with_errors_and_others_go_on():
    with grid_of(4, workers=2, how="kill") as grid:
        (crash,) = grid.send_and_receive(instructions(grid, "train.fail", nodes=[1001]))
        replies = grid.send_and_receive(instructions(grid, "query"))
    assert crash.error.code == 8
    assert "SIGKILL" in crash.error.reason
    assert [reply.has_error() for reply in replies] == [False, True, False, True]
    assert {r.error.code for r in replies if r.has_error()} == {8}


def test_a_node_stays_in_its_worker_process():
    with grid_of(5, workers=2) as grid:
        rounds = [
            [me(r)["process"] for r in grid.send_and_receive(instructions(grid, "query"))]
            for _ in range(3)
        ]
    assert rounds[0] == rounds[1] == rounds[2]
    a, b = rounds[0][:2]
    assert a != b
    assert rounds[0] == [a, b, a, b, a]


def test_workers_end_with_the_grid():
    grid = grid_of(2, workers=2)
    with grid:
        grid.send_and_receive(instructions(grid, "query"))
        processes = [worker.process for worker in grid._executor._workers]
        assert all(process.is_alive() for process in processes)
    assert not any(process.is_alive() for process in processes)


def test_an_unknown_node_is_unavailable_as_on_a_superlink():
    with grid_of(1) as grid:
        (reply,) = grid.send_and_receive(instructions(grid, "query", nodes=[77]))
    assert reply.error.code == 5
    assert reply.metadata.src_node_id == 1
    assert "77" in reply.error.reason


@ENGINES
def test_a_reply_is_handed_out_once(workers):
    with grid_of(1, workers) as grid:
        (key,) = grid.push_messages(instructions(grid, "query"))
        (first,) = grid.pull_messages([key, key])
        (second,) = grid.pull_messages({key})
        (unknown,) = grid.pull_messages(["never pushed"])
    assert first.has_content()
    assert second.error.code == unknown.error.code == 3
    assert second.metadata.reply_to_message_id == key


def test_a_client_runs_when_its_reply_is_asked_for():
    ran = []
    app = ClientApp()

    @app.train()
    def note(message, context):
        ran.append(context.node_id)
        return Message(RecordDict(), reply_to=message)

    with InProcessGrid(app, [{}] * 3, {}) as grid:
        replies = grid.pull_messages(set(grid.push_messages(instructions(grid, "train"))))
        assert ran == []
        next(replies)
        assert ran == [1000]
        next(replies)
        assert ran == [1000, 1001]


@ENGINES
def test_the_callers_set_of_ids_may_shrink_during_iteration(workers):
    with grid_of(12, workers) as grid:
        waiting = set(grid.push_messages(instructions(grid, "query")))
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
        assert not waiting


def test_replies_after_the_timeout_can_still_be_pulled():
    clock = VirtualClock()
    app = ClientApp()

    @app.train()
    def slow(message, context):
        clock.sleep(10.0)
        return Message(RecordDict(), reply_to=message)

    with InProcessGrid(app, [{}] * 3, {}, clock=clock) as grid:
        messages = instructions(grid, "train")
        replies = grid.send_and_receive(messages, timeout=15.0)
        late = list(grid.pull_messages([messages[2].metadata.message_id]))
    assert [r.metadata.src_node_id for r in replies] == [1000, 1001]
    assert [r.metadata.src_node_id for r in late] == [1002]


@given(data=st.data(), nodes=st.integers(1, 5), count=st.integers(1, 12))
def test_any_order_of_pulls_gives_each_message_its_own_reply_once(data, nodes, count):
    app = ClientApp()

    @app.train()
    def echo(message, context):
        return Message(message.content, reply_to=message)

    with InProcessGrid(app, [{}] * nodes, {}) as grid:
        sent = {}
        for number in range(count):
            node_id = data.draw(st.sampled_from(grid.get_node_ids()))
            content = RecordDict({"c": ConfigRecord({"number": number})})
            (key,) = grid.push_messages([Message(content, node_id, "train")])
            sent[key] = (number, node_id)
        received = {}
        rest = data.draw(st.permutations(list(sent)))
        while rest:
            size = data.draw(st.integers(1, len(rest)))
            batch, rest = rest[:size], rest[size:]
            stop = data.draw(st.integers(1, size))
            replies = grid.pull_messages(batch)
            for _ in range(stop):  # an abandoned iteration loses nothing
                reply = next(replies)
                key = reply.metadata.reply_to_message_id
                assert key not in received
                received[key] = (reply.content["c"]["number"], reply.metadata.src_node_id)
            rest = [*rest, *(key for key in batch if key not in received)]
    assert received == sent


@pytest.mark.parametrize("abandon", [1, 3, 9])
def test_replies_of_workers_survive_an_abandoned_iteration(abandon):
    with grid_of(20, workers=2) as grid:
        ids = grid.push_messages(instructions(grid, "query"))
        replies = grid.pull_messages(ids)
        first = [next(replies) for _ in range(abandon)]
        replies.close()
        rest = list(grid.pull_messages(ids[abandon:]))
    assert [r.metadata.reply_to_message_id for r in [*first, *rest]] == ids
    assert not any(r.has_error() for r in rest)


@pytest.mark.parametrize(
    "call",
    [
        lambda: InProcessGrid(client, [], {}),
        lambda: InProcessGrid(client, [{}], {}, workers=-1),
        lambda: InProcessGrid(client, [{"a": [1]}], {}),
        lambda: InProcessGrid(client, [{}], {"a": {"b": 1}}),
    ],
)
def test_impossible_grids_are_refused_before_anything_runs(call):
    with pytest.raises(ConfigurationError, match="must"):
        call()


def test_a_reply_or_another_run_is_refused():
    with grid_of(1) as grid:
        (reply,) = grid.send_and_receive(instructions(grid, "query"))
        with pytest.raises(ValueError, match="must be an instruction"):
            grid.push_messages([reply])
        with pytest.raises(ConfigurationError, match="serves run 1 only, got 5"):
            grid.set_run(empty_run(5))
        grid.set_run(empty_run(1))
        message = grid.create_message(RecordDict(), "query", 1000, "3", ttl=5.0)
        assert (message.metadata.group_id, message.metadata.ttl) == ("3", 5.0)
        assert [node.node_id for node in grid.get_nodes()] == [1000]
