"""Devices that decline: an answer, counted by its reason, for which nobody waits."""

from collections import Counter
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedcore.engine import InProcessGrid, VirtualClock
from fedcore.pipeline import RECORD, NoSecAgg
from fedcore.pipeline.decline import DECLINED
from strategies.plain_grid import PlainGrid
from tests.strategies.federation import (
    OPEN,
    ROOMY,
    SIGNED,
    assert_close,
    client_app,
    initial,
    node_of,
    play,
    stage_of,
    stages_of,
    tampering,
    weighted_mean,
)

REASONS = {4: "low_battery", 7: "too_warm", 9: "low_battery"}
COUNTS = {"low_battery": 2, "too_warm": 1}
REST = [client for client in range(10) if client not in REASONS]
PLANS = {"unsigned": ROOMY, "signed": SIGNED, "clear": replace(ROOMY, secagg=NoSecAgg())}
ASKED = {
    "unsigned": ("advertise", "upload"),
    "signed": ("identify", "advertise", "upload"),
    "clear": ("upload",),
}


def unfit_from(time):
    """A guard of clients that are fit until they are asked the `time`-th time."""
    asked = Counter()

    def guard(context):
        client = context.node_config["partition-id"]
        asked[client] += 1
        return REASONS.get(client) if asked[client] >= time else None

    return guard


@pytest.mark.parametrize(
    ("name", "stage"), [(name, stage) for name, stages in ASKED.items() for stage in stages]
)
def test_who_declines_is_lost_at_that_stage_and_the_sum_is_of_the_others(name, stage):
    clock = VirtualClock()
    guard = unfit_from(ASKED[name].index(stage) + 1)
    app = client_app(seed=1, policy=OPEN, guard=guard)
    played = play(app, PLANS[name], clock=clock, retry_after=(0.0, 5.0))
    assert_close(played.arrays, weighted_mean(REST), atol=1e-5)
    (report,) = played.reports
    assert (report.lost, report.declined, report.survivors) == ({stage: 3}, COUNTS, 7)
    assert clock.now() == 0.0
    sent = [stage_of(m) for m in played.wire.sent if m.metadata.dst_node_id == node_of(4)]
    stages = ("upload",) if name == "clear" else stages_of(PLANS[name])
    assert sent == list(stages[: stages.index(stage) + 1])  # once each, and nothing after


def test_a_round_that_too_many_decline_is_given_up_and_says_why():
    app = client_app(seed=1, guard=lambda context: "outside_hours")
    (report,) = play(app, replace(ROOMY, attempts=2)).reports
    assert (report.survivors, report.attempts) == (0, 2)
    assert (report.lost, report.declined) == ({"advertise": 10}, {"outside_hours": 10})


def test_a_device_cannot_write_words_of_its_own_into_the_report():
    def boast(content):
        return RecordDict({RECORD: ConfigRecord({DECLINED: "<b>read me</b>"})})

    app = client_app(tampering([3], "advertise", boast), tampering([4], "upload", boast), seed=1)
    (report,) = play(app, ROOMY).reports
    assert (report.declined, report.survivors) == ({"other": 2}, 8)


def test_a_plain_run_counts_errors_by_their_reason():
    reports = []
    app = client_app(guard=unfit_from(1))
    with InProcessGrid(app, [{}] * 10, {}) as nodes:
        grid = PlainGrid(nodes, {}, reports.append)
        content = RecordDict({"arrays": initial()})
        grid.send_and_receive([Message(content, node_of(n), "train") for n in range(10)])
    assert (reports[0].survivors, reports[0].declined) == (7, COUNTS)
    assert reports[0].lost == {"upload": 3}
