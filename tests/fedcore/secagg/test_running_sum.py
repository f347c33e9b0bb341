import numpy as np
import pytest

from fedcore.errors import PeerProtocolError, StateReusedError
from fedcore.secagg.messages import MaskedInput
from fedcore.secagg.running_sum import RunningSum
from tests.fedcore.secagg.rehearsal import at_stage, complete_plan, refusal


def of(*values):
    return np.array(values, np.uint16)


def uploading():
    rehearsal = at_stage("upload", complete_plan(5))
    return rehearsal.server, rehearsal.listen().replies


def test_vectors_are_added_where_the_sum_lies():
    memory = of(0, 1)
    total = RunningSum(memory)
    for seen in range(3):
        total.add(of(1, 2**16 - 1), seen=seen)
    assert total.close(seen=3) is memory
    assert memory.tolist() == [3, 2**16 - 2]


@pytest.mark.parametrize("seen", [0, 1, 3])
def test_only_who_has_seen_all_inputs_may_add_or_close(seen):
    total = RunningSum(of(0))
    total.add(of(1), seen=0)
    total.add(of(1), seen=1)
    for use in (lambda: total.add(of(1), seen=seen), lambda: total.close(seen=seen)):
        with refusal(StateReusedError, f"has added {seen} inputs, but its sum holds 2"):
            use()
    assert total.close(seen=2).tolist() == [2]


def test_a_closed_sum_stays_what_it_is():
    total = RunningSum(of(7))
    assert total.close(seen=0) is total.close(seen=0)
    with refusal(StateReusedError, "was taken already"):
        total.add(of(1), seen=0)
    assert total.vector.tolist() == [7]


def test_a_server_state_that_took_an_input_takes_no_other():
    state, replies = uploading()
    newer = state.on_input(1, replies[1])
    for client in (1, 2):
        with refusal(StateReusedError, "only the newest state"):
            state.on_input(client, replies[client])
    assert newer.on_input(2, replies[2]).survivors == {1, 2}


def test_a_refused_input_leaves_the_sum_to_the_next():
    state, replies = uploading()
    state = state.on_input(1, replies[1])
    with refusal(PeerProtocolError, "already answered"):
        state.on_input(1, replies[1])
    for client in (0, 2, 3, 4):
        state = state.on_input(client, replies[client])
    closed, _ = state.close()
    expected = sum(reply.vector.astype(np.int64) for reply in replies.values()) % 2**16
    assert closed.total.tolist() == expected.tolist()


def test_an_input_after_the_close_cannot_change_what_is_unmasked():
    state, replies = uploading()
    for client in range(4):
        state = state.on_input(client, replies[client])
    closed, _ = state.close()
    before = closed.total.tolist()
    with refusal(StateReusedError, "was taken already"):
        state.on_input(4, MaskedInput(replies[4].vector))
    assert closed.total.tolist() == before
