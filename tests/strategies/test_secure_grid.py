"""What a strategy sees of `SecureGrid`, and what a grid sees of it."""

import itertools
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedcore.codec import Clip, RandomK
from fedcore.engine import InProcessGrid, to_arrays, to_record
from fedcore.errors import ConfigurationError
from fedcore.pipeline import RECORD, VECTOR, Bonawitz, Modular, NoSecAgg, RunPlan
from fedcore.privacy import PrivacyLedger
from strategies import SecureGrid
from strategies.wire_bytes import content_bytes
from tests.fedcore.pipeline.rounds import private_plan
from tests.strategies.federation import (
    OPEN,
    RecordingGrid,
    assert_close,
    client_app,
    initial,
    node_of,
    plain_app,
    play,
    stage_of,
    weighted_mean,
)


@pytest.fixture
def wire():
    with InProcessGrid(client_app(seed=1), [{}] * 4, {}) as nodes:
        yield RecordingGrid(nodes)


def messages(grid, kind="train", content=None):
    if content is None:
        content = RecordDict({"arrays": initial(), "config": ConfigRecord({"lr": 0.1})})
    return [Message(content, node_id, kind) for node_id in grid.get_node_ids()]


def test_training_messages_get_one_reply_that_looks_like_a_large_clients(wire):
    grid = SecureGrid(wire)
    (reply,) = grid.send_and_receive(messages(grid), timeout=60)
    assert list(reply.content) == ["arrays", "metrics"]
    assert reply.metadata.src_node_id in wire.get_node_ids()
    assert_close(to_arrays(reply.content["arrays"]), weighted_mean(range(4)), atol=1e-5)
    assert reply.content["metrics"]["num-examples"] == sum(301 + 37 * n for n in range(4))


def test_pushing_training_messages_is_refused_since_a_pull_would_show_one_update(wire):
    grid = SecureGrid(wire)
    for kind in ("train", "train.secretly"):
        with pytest.raises(ConfigurationError, match="send_and_receive"):
            grid.push_messages(messages(grid, kind))
    assert wire.crossed == []


def test_other_messages_pass_through(wire):
    grid = SecureGrid(wire)
    replies = list(grid.send_and_receive(messages(grid, "evaluate"), timeout=60))
    assert [reply.content["metrics"]["eval-loss"] for reply in replies] == [0, 1, 2, 3]
    ids = list(grid.push_messages(messages(grid, "evaluate")))
    assert len(list(grid.pull_messages(ids))) == 4
    assert {stage_of(message) for message in wire.sent} == {""}
    assert list(grid.send_and_receive([])) == []
    assert (grid.run.run_id, list(grid.get_node_ids())) == (1, wire.get_node_ids())


def test_evaluation_of_the_strategy_is_federated_as_ever():
    played = play(strategy=FedAvg(), clients=4)
    assert played.result.evaluate_metrics_clientapp[1]["eval-loss"] == pytest.approx(1.5)


def test_messages_that_differ_are_refused_before_anything_is_sent(wire):
    grid = SecureGrid(wire)
    batch = messages(grid)
    changed = RecordDict({"arrays": initial(), "config": ConfigRecord({"lr": 0.2})})
    nudged = RecordDict({"arrays": to_record({"w": np.ones(43)}), "config": ConfigRecord()})
    odd = [
        [*batch[:3], messages(grid, content=changed)[3]],
        [*batch[:3], messages(grid, content=nudged)[3]],
        [*batch[:3], messages(grid, "evaluate")[3]],
        [*batch[:3], messages(grid, "train.other")[3]],
    ]
    for bad in odd:
        with pytest.raises(ConfigurationError, match="messages that differ"):
            grid.send_and_receive(bad)
    assert wire.crossed == []


def test_equal_contents_need_not_be_one_object(wire):
    grid = SecureGrid(wire)
    twins = [
        Message(RecordDict({"arrays": initial()}), node_id, "train")
        for node_id in grid.get_node_ids()
    ]
    assert len(list(grid.send_and_receive(twins))) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_a_training_message_without_exactly_one_model_is_refused(wire, count):
    grid = SecureGrid(wire)
    content = RecordDict({f"arrays{index}": initial() for index in range(count)})
    with pytest.raises(ConfigurationError, match=f"exactly one ArrayRecord, found {count}"):
        grid.send_and_receive(messages(grid, content=content))


def test_a_node_that_is_addressed_twice_counts_once(wire):
    grid = SecureGrid(wire)
    batch = messages(grid)
    (reply,) = grid.send_and_receive([*batch, batch[0]])
    assert_close(to_arrays(reply.content["arrays"]), weighted_mean(range(4)), atol=1e-5)


def test_a_cohort_of_one_is_refused_before_anything_is_sent(wire):
    grid = SecureGrid(wire)
    with pytest.raises(ConfigurationError, match="fewer than 2 clients reveals its input"):
        grid.send_and_receive(messages(grid)[:1])
    assert wire.crossed == []


def test_a_plan_that_does_not_fit_the_cohort_is_refused_before_anything_is_sent(wire):
    grid = SecureGrid(wire, private_plan(quantize=Modular(4)))
    with pytest.raises(ConfigurationError, match=r"at least .* bits, got 4"):
        grid.send_and_receive(messages(grid))
    assert wire.crossed == []


def test_clients_without_the_mod_are_lost_and_the_model_is_not_sent_to_them():
    played = play(plain_app(), clients=4)
    assert not any(message.content.array_records for message in played.wire.sent)
    assert played.reports[0].survivors == 0
    assert played.reports[0].lost == {"advertise": 4}


def test_the_deadline_of_the_strategy_tightens_the_plans():
    played = play(clients=4, timeout=7)
    plans = [message.content[RECORD]["plan"] for message in played.wire.sent[:4]]
    assert all(b'"stage_seconds":7,' in plan for plan in plans)
    assert {message.metadata.ttl for message in played.wire.sent} == {7}


def test_the_shorter_of_both_deadlines_counts():
    played = play(plan=RunPlan(stage_seconds=5.0), clients=4, timeout=7)
    assert {message.metadata.ttl for message in played.wire.sent} == {5.0}
    assert played.reports[0].survivors == 4


def test_the_model_is_sent_once_and_only_to_those_who_upload():
    played = play(clients=4)
    carrying = [message for message in played.wire.sent if message.content.array_records]
    assert [stage_of(message) for message in carrying] == ["upload"] * 4
    assert [stage for stage, _ in itertools.groupby(map(stage_of, played.wire.sent))] == [
        "advertise",
        "share",
        "upload",
        "reveal",
    ]


def test_the_report_counts_what_crossed_the_wire():
    played = play(plan=RunPlan(quantize=Modular(16), clip=Clip(8.0)), clients=4)
    (report,) = played.reports
    traffic = report.traffic
    assert traffic.down_total == sum(content_bytes(m.content) for m in played.wire.sent)
    assert traffic.up_total == sum(content_bytes(m.content) for m in played.wire.received)
    assert traffic.up_payload == 4 * 43 * 2
    assert (traffic.uploads, traffic.downloads) == (4, 4)
    assert traffic.down_payload >= 4 * 43 * 4
    uploaded = [
        len(reply.content[f"{RECORD}.{VECTOR}"][VECTOR].data)
        for reply in played.wire.received
        if f"{RECORD}.{VECTOR}" in reply.content
    ]
    assert len(uploaded) == 4
    assert 43 * 2 < uploaded[0] < 43 * 2 + 200  # the tally rides behind the update


def test_the_report_of_a_round_without_faults():
    (report,) = play(rounds=1).reports
    assert (report.round_number, report.attempts, report.aborted) == (1, 1, ())
    assert (report.invited, report.survivors, report.lost) == (10, 10, {})
    assert (report.neighbours, report.threshold) == (9, 6)
    assert report.clipped == 0
    assert report.epsilon == inf


def test_the_report_of_a_round_in_the_clear_names_no_masks():
    played = play(client_app(policy=OPEN), RunPlan(secagg=NoSecAgg()))
    (report,) = played.reports
    assert (report.neighbours, report.threshold, report.survivors) == (0, 0, 10)
    assert_close(played.arrays, weighted_mean(range(10)), atol=1e-5)
    assert len(played.wire.sent) == 10


def test_long_updates_are_reported_as_clipped():
    (report,) = play(plan=RunPlan(clip=Clip(0.01))).reports
    assert report.clipped == 10


@pytest.mark.parametrize("secagg", [Bonawitz(), NoSecAgg()], ids=lambda secagg: secagg.kind)
def test_one_ledger_entry_for_each_round(secagg):
    app = client_app(policy=OPEN)
    played = play(app, RunPlan(secagg=secagg), clients=4, rounds=3)
    releases = played.grid.ledger.releases
    assert [release.round_number for release in releases] == [1, 2, 3]
    assert {release.survivors for release in releases} == {4}
    assert played.grid.ledger.epsilon == inf


def test_rounds_are_numbered_on_from_a_ledger_that_is_handed_in():
    first = play(clients=4, rounds=2)
    played = play(clients=4, ledger=first.grid.ledger)
    assert [release.round_number for release in played.grid.ledger.releases] == [1, 2, 3]
    assert played.reports[0].round_number == 3
    assert len(first.grid.ledger.releases) == 2


def test_labels_decide_the_order_of_the_clients_and_are_sent_to_them():
    labels = {node_of(client): name for client, name in enumerate(["z", "b", "aa", "y"])}
    played = play(clients=4, labels=labels)
    sent = [message.content[RECORD]["label"] for message in played.wire.sent[:4]]
    assert sent == ["b", "y", "z", "aa"]


def test_a_new_support_is_used_in_every_round():
    # Half of the weights move in each round, and not the same half.
    plan = RunPlan(sparsify=RandomK(0.5))
    one, two = (play(plan=plan, rounds=rounds).arrays for rounds in (1, 2))
    start = to_arrays(initial())
    moved = {name: one[name] != start[name] for name in start}
    again = {name: two[name] != one[name] for name in start}
    flat = [np.concatenate([part[name].ravel() for name in start]) for part in (moved, again)]
    assert [int(part.sum()) for part in flat] == [22, 22]
    assert (flat[0] != flat[1]).any()


def test_the_plan_and_ledger_of_a_new_grid_are_the_defaults(wire):
    grid = SecureGrid(wire)
    assert grid.plan == RunPlan()
    assert grid.ledger.releases == ()
    assert SecureGrid(wire, ledger=PrivacyLedger(delta=1e-3)).ledger.delta == 1e-3


def test_metrics_of_the_reply_keep_single_brackets_apart_from_lists():
    def train(message, client):
        metrics = MetricRecord({"num-examples": 10, "a": [1.0] * 11, "b": 2})
        return RecordDict({"arrays": message.content["arrays"], "metrics": metrics})

    played = play(client_app(train=train), replace(RunPlan(), metric_slots=12), clients=3)
    assert played.result.train_metrics_clientapp[1]["a"] == [1.0] * 11
    assert played.result.train_metrics_clientapp[1]["b"] == 2.0
