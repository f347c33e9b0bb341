"""Slow and absent devices, on a virtual clock."""

from statistics import median

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore.engine import HeavyTailed, InProcessGrid, PacedGrid, VirtualClock
from fedcore.engine.flower_private import ErrorCode
from fedcore.errors import ConfigurationError

PACE = HeavyTailed(device_spread=1.0, task_spread=0.0, latency_seconds=0.5)


def echo():
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(RecordDict(), reply_to=message)

    return app


def asking(node, *, work=True):
    content = RecordDict({"config": ConfigRecord({"round": 1})})
    if work:
        content["arrays"] = ArrayRecord({"w": Array("uint8", (1,), "raw", b"1")})
    return Message(content, node, "train")


def describe(message):
    return 1, "upload", str(message.metadata.dst_node_id)


def paced(check, pace=PACE, nodes=6):
    clock = VirtualClock()
    with InProcessGrid(echo(), [{}] * nodes, {}) as inner:
        check(PacedGrid(inner, pace, describe, clock), clock, inner.get_node_ids())


def test_durations_follow_from_the_seed_the_device_and_the_round_alone():
    pace = HeavyTailed()
    assert pace.seconds("a", 1) == pace.seconds("a", 1)
    others = {
        pace.seconds("a", 1),
        pace.seconds("b", 1),
        pace.seconds("a", 2),
        HeavyTailed(seed=1).seconds("a", 1),
    }
    assert len(others) == 4


def test_durations_are_log_normal_about_the_median():
    pace = HeavyTailed(median_seconds=60, device_spread=1.0, task_spread=0.0)
    seconds = sorted(pace.seconds(str(device), 1) for device in range(4000))
    assert median(seconds) == pytest.approx(60, rel=0.08)
    assert seconds[3600] / 60 == pytest.approx(3.6, rel=0.12)  # e^1.2816
    assert seconds[400] / 60 == pytest.approx(1 / 3.6, rel=0.12)


def test_devices_lapse_as_often_as_they_are_said_to():
    pace = HeavyTailed(lapse=0.2)
    lapsed = sum(pace.lapses(str(device), 1) for device in range(4000))
    assert lapsed / 4000 == pytest.approx(0.2, abs=0.02)
    assert not any(HeavyTailed().lapses(str(device), 1) for device in range(100))


def test_a_reply_comes_when_its_device_is_done_and_not_before():
    def check(grid, clock, nodes):
        ids = grid.push_messages([asking(node) for node in nodes])
        due = {node: PACE.seconds(str(node), 1) for node in nodes}
        assert list(grid.pull_messages(ids)) == []
        came = {}
        while len(came) < len(nodes):
            for reply in grid.pull_messages(ids):
                came[reply.metadata.src_node_id] = clock.now()
                ids.remove(reply.metadata.reply_to_message_id)
            clock.sleep(1.0)
        for node in nodes:
            assert due[node] <= came[node] < due[node] + 1

    paced(check)


def test_a_message_without_a_model_takes_the_latency_of_the_link():
    def check(grid, clock, nodes):
        ids = grid.push_messages([asking(nodes[0], work=False)])
        clock.sleep(0.4)
        assert list(grid.pull_messages(ids)) == []
        clock.sleep(0.2)
        assert len(list(grid.pull_messages(ids))) == 1

    paced(check)


def test_a_device_that_lapses_is_an_error_like_a_superlinks_after_a_while():
    pace = HeavyTailed(lapse=0.999, notice_seconds=30)

    def check(grid, clock, nodes):
        ids = grid.push_messages([asking(nodes[0])])
        clock.sleep(29)
        assert list(grid.pull_messages(ids)) == []
        clock.sleep(2)
        (reply,) = grid.pull_messages(ids)
        assert reply.error.code == ErrorCode.NODE_UNAVAILABLE

    paced(check, pace)


def test_flowers_own_exchange_waits_for_the_slowest_or_for_its_timeout():
    def check(grid, clock, nodes):
        due = sorted(PACE.seconds(str(node), 1) for node in nodes)
        replies = grid.send_and_receive([asking(node) for node in nodes])
        assert len(replies) == len(nodes)
        assert clock.now() == pytest.approx(due[-1])
        early = grid.send_and_receive([asking(node) for node in nodes], timeout=due[2] + 0.01)
        assert len(early) == 3
        assert grid.send_and_receive([]) == []

    paced(check)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("median_seconds", -1.0),
        ("device_spread", 5.0),
        ("task_spread", -0.1),
        ("lapse", 1.0),
        ("notice_seconds", -1.0),
        ("latency_seconds", float("inf")),
    ],
)
def test_a_number_out_of_range_is_named(field, value):
    with pytest.raises(ConfigurationError, match=f"pace.{field} must be in"):
        HeavyTailed(**{field: value})
