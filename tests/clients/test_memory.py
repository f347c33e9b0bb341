import pytest
from flwr.app import ConfigRecord, Context, RecordDict

from clients.memory import ProtocolMemory
from fedcore.errors import PeerProtocolError
from tests.fedcore.pipeline.rounds import round_plan


@pytest.fixture
def context():
    return Context(1, 1000, {}, RecordDict(), {})


@pytest.fixture
def memory(context):
    return ProtocolMemory(context)


def plan(number=1, attempt=1):
    return round_plan(round_number=number, attempt=attempt)


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


def test_other_records_of_the_app_are_left_alone(memory, context):
    context.state["mine"] = ConfigRecord({"visits": 3})
    memory.begin(plan(1))
    memory.put(plan(1), b"state")
    memory.take()
    assert context.state["mine"]["visits"] == 3
    assert set(context.state) == {"mine", "fedcore.round"}
