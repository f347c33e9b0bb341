import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from clients.memory import ProtocolMemory
from fedcore.errors import LocalProtocolError, PeerProtocolError
from fedcore.pipeline import RunPlan
from tests.fedcore.pipeline.rounds import round_plan

FEEDBACK = RunPlan(error_feedback=True)


@pytest.fixture
def context():
    return Context(1, 1000, {}, RecordDict(), {})


@pytest.fixture
def memory(context):
    return ProtocolMemory(context)


def plan(number=1, attempt=1, run=FEEDBACK, **changes):
    return round_plan(run, round_number=number, attempt=attempt, **changes)


def filled(value):
    return np.full(12, value, np.float32)


def test_a_state_is_taken_once(memory, context):
    memory.put(plan(), b"state")
    assert memory.take() == (plan(), b"state")
    assert list(context.state) == []
    with pytest.raises(PeerProtocolError, match="in no round"):
        memory.take()


def test_a_state_survives_its_process(memory, context):
    memory.put(plan(3), b"state")
    assert ProtocolMemory(context).take() == (plan(3), b"state")


def test_beginning_a_round_drops_the_state_of_the_last(memory):
    memory.begin(plan(1))
    memory.put(plan(1), b"state")
    memory.begin(plan(2))
    with pytest.raises(PeerProtocolError, match="in no round"):
        memory.take()


def test_a_refused_round_leaves_the_current_one_alone(memory):
    memory.begin(plan(2))
    memory.put(plan(2), b"state")
    with pytest.raises(PeerProtocolError, match="round 1, attempt 9 must be later"):
        memory.begin(plan(1, 9))
    assert memory.take() == (plan(2), b"state")


def test_the_next_round_starts_from_what_the_last_one_left_out(memory):
    assert memory.residual(plan(1)) is None
    memory.keep_residual(plan(1), filled(1))
    np.testing.assert_array_equal(memory.residual(plan(2)), filled(1))
    memory.keep_residual(plan(2), filled(2))
    np.testing.assert_array_equal(memory.residual(plan(5)), filled(2))


def test_every_attempt_of_a_round_starts_from_the_same(memory):
    memory.keep_residual(plan(1), filled(1))
    for attempt in (1, 2, 3):
        np.testing.assert_array_equal(memory.residual(plan(2, attempt)), filled(1))
        memory.keep_residual(plan(2, attempt), filled(10 * attempt))
    np.testing.assert_array_equal(memory.residual(plan(3)), filled(30))


def test_a_second_attempt_of_the_first_round_starts_from_nothing(memory):
    memory.keep_residual(plan(1, 1), filled(1))
    assert memory.residual(plan(1, 2)) is None


def test_without_feedback_nothing_is_remembered(memory, context):
    memory.keep_residual(plan(run=RunPlan()), None)
    assert list(context.state) == []
    memory.keep_residual(plan(1), filled(1))
    assert memory.residual(plan(2, run=RunPlan())) is None


def test_a_residual_of_another_size_is_refused(memory):
    memory.keep_residual(plan(1), filled(1))
    with pytest.raises(LocalProtocolError, match=r"shape \(12,\), the model needs \(13,\)"):
        memory.residual(plan(2, dim=13))


def test_other_records_of_the_app_are_left_alone(memory, context):
    context.state["mine"] = ConfigRecord({"visits": 3})
    memory.begin(plan(1))
    memory.put(plan(1), b"state")
    memory.keep_residual(plan(1), filled(1))
    memory.take()
    assert context.state["mine"]["visits"] == 3
    assert set(context.state) == {"mine", "fedcore.round", "fedcore.residual"}
