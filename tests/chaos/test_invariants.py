"""The invariants are broken by what they are there for: evidence that was tampered with."""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest

from fedcore.privacy import PrivacyLedger
from strategies.checkpoints import LOST
from tests.chaos import virtual
from tests.chaos.expected import initial_model, model_after
from tests.chaos.invariants import attempts_of, violations


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """A run in bad weather, which broke nothing."""
    logging.getLogger("fedcore.engine").setLevel(logging.CRITICAL)
    broken, found, weather = virtual.play("evidence", tmp_path_factory.mktemp("run"))
    assert broken == []
    assert weather.done
    assert any(line["survivors"] for line in found.rounds)
    return found


def tampered(evidence, **changes):
    return violations(replace(evidence, **changes))


def last_sum(evidence):
    """The last round that has a sum."""
    return [line["round"] for line in evidence.rounds if line["survivors"]][-1]


def test_a_run_that_broke_nothing_has_no_violations(evidence):
    assert violations(evidence) == []


def test_a_sum_with_one_bit_more_is_noticed(evidence):
    model = {name: array.copy() for name, array in evidence.model.items()}
    first = next(iter(model.values()))
    first.flat[0] = np.nextafter(first.flat[0], np.float32(1e9))
    assert tampered(evidence, model=model) == ["the last model is not the sum of its survivors"]


def test_a_survivor_who_is_not_in_the_sum_is_noticed(evidence):
    number = last_sum(evidence)
    trace = [
        line
        for line in evidence.trace
        if not (
            line.get("round") == number
            and line["event"] == "asked"
            and line["stage"] in {"endorse", "reveal"}
            and line["node"] == str(min(survivors_of(evidence, number)))
        )
    ]
    assert any("survivors told" in text for text in tampered(evidence, trace=trace))


def survivors_of(evidence, number):
    attempts = attempts_of(evidence)
    return attempts[max(step for step in attempts if step[0] == number)].survivors


def rolled_back(evidence):
    """The same run, had the checkpoint with its last sum been damaged afterwards."""
    first, second = [line["round"] for line in evidence.rounds if line["survivors"]][-2:]
    rounds = copy.deepcopy(list(evidence.rounds))
    for line in rounds[second - 1 :]:
        line |= {"survivors": 0, "aborted": [LOST]}
    model, attempts = initial_model(evidence.job), attempts_of(evidence)
    for line in rounds[:first]:
        if line["survivors"]:
            last = attempts[max(step for step in attempts if step[0] == line["round"])]
            survivors = evidence.numbered(last.survivors)
            model = model_after(evidence.job, last.plan, model, survivors)
    return replace(evidence, rounds=rounds, model=model)


def test_a_damaged_checkpoint_takes_rounds_back_and_nothing_else_may(evidence):
    found = rolled_back(evidence)
    assert violations(replace(found, rolled_back=True)) == []
    assert "the last model is not the sum of its survivors" in violations(
        replace(found, rolled_back=True, model=evidence.model)
    )
    with_sum = replace(found, rolled_back=True, rounds=evidence.rounds)
    assert "the last model is not the sum of its survivors" in violations(with_sum)


def test_without_a_damaged_checkpoint_no_round_begins_with_a_lost_model(evidence):
    lost = evidence.rounds[0]["round"]
    rounds = copy.deepcopy(list(evidence.rounds))
    rounds[lost - 1] |= {"survivors": 0, "aborted": [LOST]}
    text = "began with another model"
    assert any(text in found for found in tampered(evidence, rounds=rounds))
    assert any(text in found for found in tampered(evidence, rounds=rounds, rolled_back=True))


def test_a_lost_ledger_entry_and_one_too_many_are_noticed(evidence):
    releases = evidence.ledger.releases
    for changed in (releases[1:], (*releases, releases[-1])):
        ledger = PrivacyLedger(delta=evidence.ledger.delta, releases=changed)
        assert any("are paid for" in text for text in tampered(evidence, ledger=ledger))


def test_an_entry_for_another_sum_is_noticed(evidence):
    first, *rest = evidence.ledger.releases
    other = first.survivors - 1 if first.survivors == first.clients else first.survivors + 1
    ledger = PrivacyLedger(
        delta=evidence.ledger.delta, releases=(replace(first, survivors=other), *rest)
    )
    assert any("paid for sums over" in text for text in tampered(evidence, ledger=ledger))


def test_an_epsilon_that_is_too_small_is_noticed(evidence):
    rounds = copy.deepcopy(list(evidence.rounds))
    rounds[-1]["epsilon"] /= 2
    assert any("the ledger says" in text for text in tampered(evidence, rounds=rounds))


def test_a_second_answer_is_noticed(evidence):
    answered = next(
        line for line in evidence.trace if line["event"] == "answered" and line["attempt"]
    )
    second = {**answered, "reply": "0" * 64, "late": True}
    assert any(
        "was answered in 2 ways" in text
        for text in tampered(evidence, trace=[*evidence.trace, second])
        if answered["reply"]
    )


def test_a_second_plan_for_an_attempt_is_noticed(evidence):
    begun = next(line for line in evidence.trace if line.get("plan"))
    twice = [*evidence.trace, {**begun, "plan": begun["plan"][:-2] + "00"}]
    assert any("begun with 2 plans" in text for text in tampered(evidence, trace=twice))


@pytest.mark.parametrize("kind", ["garble-request", "stale-request"])
def test_a_wrong_request_that_was_answered_is_noticed(evidence, kind):
    probe = {"at": 0, "event": "probed", "round": 1, "attempt": 1, "stage": "share", "node": "0"}
    wrong = {**probe, "kind": kind, "reply": "0" * 64, "error": None}
    assert any(f"{kind} was answered" in text for text in tampered(evidence, trace=[wrong]))


def test_a_round_that_is_missing_or_told_twice_is_noticed(evidence):
    for rounds in (evidence.rounds[1:], [*evidence.rounds, evidence.rounds[-1]]):
        assert any("rounds" in text for text in tampered(evidence, rounds=rounds))


def test_a_run_that_ended_early_is_noticed(evidence):
    assert any("rounds of" in text for text in tampered(evidence, rounds=evidence.rounds[:-1]))


def test_an_attempt_that_takes_too_long_is_noticed(evidence):
    assert any("took" in text for text in violations(evidence, seconds=1e-9))


def test_a_round_without_a_sum_and_without_a_reason_is_noticed(evidence):
    rounds = [*evidence.rounds[:-1], {**evidence.rounds[-1], "survivors": 0, "aborted": []}]
    assert any("no reason" in text for text in tampered(evidence, rounds=rounds))


def test_a_lost_round_may_have_been_paid_for_and_another_may_not(evidence):
    number = last_sum(evidence)
    trace = [line for line in evidence.trace if line.get("round") != number]
    rounds = copy.deepcopy(list(evidence.rounds))
    rounds[number - 1] |= {"survivors": 0, "aborted": [LOST]}
    lost = tampered(evidence, trace=trace, rounds=rounds)
    assert not any("are paid for" in text for text in lost)
    rounds[number - 1] |= {"aborted": ["too few"]}
    assert any("are paid for" in text for text in tampered(evidence, trace=trace, rounds=rounds))
