"""The SuperNode's process asks, hands over, keeps, answers; and waits to be taken back."""

import os
import socket
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import Context as ContextProto

from experiments.edge import node
from experiments.edge.contexts import Contexts
from experiments.edge.flower_board import Received, RefusedError, RunNotRunningException
from experiments.edge.node import REFUSED, Desk, run_node, serve
from experiments.edge.pace import Pace
from experiments.edge.parcels import Ended, read, receive, send, write
from fedcore.sealed import Seal
from tests.experiments.edge.boards import APP, asked, settings


class StopError(Exception):
    """Ends what goes on forever."""


def served(messages, answer, pauses):
    """Let a node find `messages`, then stop it; collect its pauses."""
    found, now = iter(messages), [0.0]

    def receive_one():
        item = next(found, StopError)
        if item is StopError or isinstance(item, BaseException):
            raise item
        return item

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += 1.0

    with pytest.raises(StopError):
        serve(receive_one, answer, Pace(0.1, 3.0), now=lambda: now[0], sleep=sleep)


def test_a_node_asks_at_once_after_an_answer_and_more_seldom_the_longer_it_is_quiet():
    answers, pauses = [], []
    served(["first", "second", *[None] * 40], answers.append, pauses)
    assert answers == ["first", "second"]
    assert pauses[0] < 0.2
    assert pauses[-1] > 2.0


def test_a_run_that_ended_meanwhile_costs_its_message_only():
    answers, pauses = [], []
    served([RunNotRunningException(), "second"], answers.append, pauses)
    assert answers == ["second"]


class FakeConnection:
    """A SuperLink's side, as far as a desk needs it."""

    node_id = 1000

    def __init__(self):
        self.replies, self.bundles = [], 0

    def bundle(self, run, folder):
        self.bundles += 1
        return APP, b"bundle"

    def context(self, run, bundle, node_config, state):
        context = context_from_proto(ContextProto.FromString(asked()[0]))
        context.state = state
        return node_context(context)

    def reply(self, parts, seconds):
        self.replies.append(parts)


def node_context(context):
    return context_to_proto(context).SerializeToString()


@pytest.fixture
def desk(tmp_path):
    """A desk, and a thread in place of the launcher that answers each task."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plans = []

    def launcher():
        while (order := receive(there)) is not None:
            task, descriptors = order
            parts = read(descriptors[0])
            status, answer = plans.pop(0)(parts)
            if status == 0:
                write(descriptors[1], answer)
            for descriptor in descriptors:
                os.close(descriptor)
            send(there, Ended(task.number - 1, 0))  # of an earlier task: not the one waited for
            send(there, Ended(task.number, status))

    thread = threading.Thread(target=launcher)
    thread.start()
    contexts = Contexts(tmp_path / "contexts", Seal(bytes(32)))
    yield Desk(FakeConnection(), contexts, settings(tmp_path), here), plans
    here.close()
    thread.join()
    there.close()


def message(run_id=9):
    run = SimpleNamespace(run_id=run_id, series_id=4, fab_hash=APP.digest)
    metadata = SimpleNamespace(message_type="train", run_id=run_id)
    return Received(SimpleNamespace(metadata=metadata), run, tuple(asked()[1:]))


def test_the_context_is_on_the_disk_before_the_answer_leaves(desk):
    desk, plans = desk
    kept = []
    desk.connection.reply = lambda parts, _: kept.append(desk.contexts.load(4, print))
    plans.append(lambda parts: (0, [b"context after", b"head", b"tree"]))
    desk.answer(message())
    assert kept == [b"context after"]


def test_the_next_message_gets_the_context_of_the_last_one(desk):
    desk, plans = desk
    seen = []
    plans += [
        lambda parts: (0, [b"after the first", b"head", b"tree"]),
        lambda parts: seen.append(parts[0]) or (0, [b"after", b"head", b"tree"]),
    ]
    desk.answer(message())
    desk.answer(message())
    assert seen == [b"after the first"]
    assert desk.connection.bundles == 1


def test_a_node_that_was_restarted_goes_on_with_the_context_on_its_disk(desk, tmp_path):
    desk, plans = desk
    context = context_from_proto(ContextProto.FromString(asked()[0]))
    context.state = RecordDict({"keys": ConfigRecord({"stage": "share"})})
    desk.contexts.save(4, node_context(context))
    seen = []
    plans.append(lambda parts: seen.append(parts[0]) or (0, [parts[0], b"head", b"tree"]))
    desk.answer(message())
    assert context_from_proto(ContextProto.FromString(seen[0])).state["keys"]["stage"] == "share"


def test_a_process_that_ended_is_told_at_once_and_the_context_stays(desk, monkeypatch):
    desk, plans = desk
    monkeypatch.setattr(node, "crashed", lambda message: (b"error",))
    plans.append(lambda parts: (-9, []))
    desk.answer(message())
    assert desk.connection.replies == [[b"error"]]
    assert desk.contexts.load(4, print) is None


class Refusing:
    """A SuperLink that refuses a node some times."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.tries = 0

    @contextmanager
    def __call__(self, *_):
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        yield SimpleNamespace(node_id=1000, receive=None)


@pytest.fixture
def board(tmp_path, monkeypatch):
    """Runs a node against a SuperLink that refuses; time passes in its pauses only."""
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    def run(refusing):
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        monkeypatch.setattr(node, "connect", refusing)
        monkeypatch.setattr(node, "serve", lambda *_: (_ for _ in ()).throw(StopError))
        monkeypatch.setattr(node, "node_key", lambda data: data)
        monkeypatch.setattr(node.signal, "signal", lambda *_: None)
        monkeypatch.setattr(node.time, "sleep", sleep)
        monkeypatch.setattr(node.time, "monotonic", lambda: clock[0])
        for name in ("state.key", "ca.crt", "node.auth"):
            (tmp_path / name).write_bytes(bytes(32))
        files = {"authority": tmp_path / "ca.crt", "node_key": tmp_path / "node.auth"}
        try:
            return run_node(settings(tmp_path, **files), here)
        finally:
            here.close()
            there.close()

    return run, clock


def test_a_killed_node_that_comes_back_early_waits_until_it_is_taken(board):
    run, clock = board
    refusing = Refusing(*[RefusedError("[code: 2004] Failed to activate")] * 8)
    with pytest.raises(StopError):  # it serves
        run(refusing)
    assert refusing.tries == 9
    assert clock[0] > 30


def test_a_refusal_that_stays_is_final_after_some_minutes(board):
    run, clock = board
    assert run(Refusing(*[RefusedError("[code: 2004] Failed to activate")] * 1000)) == REFUSED
    assert clock[0] > node.PATIENCE_SECONDS


def test_a_certificate_that_does_not_fit_is_final_at_once(board, capsys):
    run, clock = board
    refusing = Refusing(RefusedError("certificate verify failed"))
    assert run(refusing) == REFUSED
    assert (refusing.tries, clock[0]) == (1, 0.0)
    assert "certificate verify failed" in capsys.readouterr().out
