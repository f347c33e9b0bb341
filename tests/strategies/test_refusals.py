"""A device that refuses says why, and the coordinator's report says it too."""

from collections import Counter

import pytest
from flwr.app import Error, Message, RecordDict

from clients import DevicePolicy
from fedcore.engine import FaultyGrid, InProcessGrid
from fedcore.pipeline.decline import DECLINE_CODE
from strategies.refusals import (
    MOST_LETTERS,
    MOST_TEXTS,
    OTHERS,
    add_refusals,
    clean,
    most_frequent,
    refusal_of,
)
from tests.strategies.federation import ROOMY, SIGNED, client_app, losing, plain_app, play, pull
from tests.strategies.jobs import run_job

WANTED = "this device's policy demands at least 50 invited clients, found 10; it does not take part"


@pytest.mark.parametrize("plan", [ROOMY, SIGNED], ids=["unsigned", "signed"])
def test_a_policy_that_refuses_a_plan_is_told_in_the_report(plan, caplog):
    app = client_app(policy=DevicePolicy(minimum_cohort=50))
    (report,) = play(app, plan).reports
    assert report.refusals == {f"PeerProtocolError: {WANTED}": 20}  # ten devices, two attempts
    assert report.survivors == 0
    assert f"10 devices said: PeerProtocolError: {WANTED}" in caplog.text


def test_one_device_that_fails_costs_the_others_nothing_and_is_told_without_its_data():
    def train(message, client):
        if client == 4:
            float("Ada Lovelace, 36")
        return pull(message, client)

    (report,) = play(client_app(train=train), ROOMY).reports
    assert report.survivors == 9
    failed = "DeviceFailedError: the train function failed with ValueError: see the device's log"
    assert report.refusals == {failed: 1}


def test_a_silent_device_says_nothing():
    silent = play(plan=ROOMY, wrap=lambda grid: FaultyGrid(grid, losing([1], "upload")))
    assert silent.reports[0].refusals == {}


def test_a_run_that_stalls_says_what_devices_said(monkeypatch):
    monkeypatch.setattr("tests.strategies.jobs.OPEN", DevicePolicy(minimum_cohort=50))
    recorder = run_job()
    assert "demands at least 50 invited clients, found 6" in recorder.reasons[0]
    assert recorder.last.report.refusals


def error(code, reason):
    with InProcessGrid(plain_app(), [{}], {}) as grid:
        asked = Message(RecordDict(), 1000, "train")
        (key,) = grid.push_messages([asked])
        (reply,) = grid.pull_messages([key])
        return Message(Error(code, reason), reply_to=reply)


@pytest.mark.parametrize(
    ("code", "reason", "said"),
    [
        (2, "<class 'fedcore.errors.PeerProtocolError'>:<'no: it's late'>", None),
        (2, "", "error 2"),
        (8, "crashed", "crashed"),
        (5, "gone", ""),
        (DECLINE_CODE, "busy", ""),
    ],
)
def test_only_a_devices_own_words_are_told(code, reason, said):
    wanted = "PeerProtocolError: no: it's late" if said is None else said
    assert (refusal_of(error(code, reason)) or "") == wanted


def test_what_a_device_says_is_one_short_printable_line():
    assert clean("a\n\tb\x1b[2J\u202e") == "a b?[2J?"
    assert len(clean("x" * 10**6)) == MOST_LETTERS
    assert clean("\n" * 10**6) == ""


def test_of_many_different_texts_only_the_first_are_kept():
    total = {}
    for number in range(100):
        total = add_refusals(total, {f"text {number}": 1})
    assert len(total) == MOST_TEXTS + 1
    assert Counter(total)[OTHERS] == 100 - MOST_TEXTS
    assert most_frequent(total) == f"; {100 - MOST_TEXTS} said: {OTHERS}"
