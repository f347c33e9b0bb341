import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore.engine import InProcessGrid
from fedcore.engine.workers import SHARED_BYTES, _send, _SharingUnpickler, _Worker
from tests.fedcore.engine.engine_apps import client, instructions

ORPHANS = """
import os, signal
from tests.fedcore.engine.engine_apps import client, instructions
from fedcore.engine import InProcessGrid
grid = InProcessGrid(client, [{}, {}, {}], {}, workers=3)
replies = grid.send_and_receive(instructions(grid, "query"))
print(*(reply.content["me"]["process"] for reply in replies), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Recorder:
    """A pipe that keeps what is sent through it."""

    def __init__(self):
        self.sent = []

    def send(self, item):
        self.sent.append(item)


def is_running(pid):
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def message_with(data):
    array = Array("uint8", (len(data),), "bytes", data)
    with InProcessGrid(ClientApp(), [{}], {}) as grid:
        record = RecordDict({"a": ArrayRecord({"x": array, "y": array})})
        return instructions(grid, "train", content=record)[0]


def test_the_bytes_of_a_broadcast_cross_a_pipe_once():
    big, other = bytes(SHARED_BYTES), bytes(range(256)) * (SHARED_BYTES // 256)
    worker = _Worker(process=None, pipe=Recorder())
    for data in (big, big, other, big):
        _send(worker, message_with(data), 7)
    fresh = [list(new.values()) for _, _, new in worker.pipe.sent]
    assert fresh == [[big], [], [other], [big]]
    assert all(len(text) < SHARED_BYTES for text, _, _ in worker.pipe.sent)
    known = {}
    for (text, keys, new), data in zip(worker.pipe.sent, (big, big, other, big), strict=True):
        known = {key: new[key] if key in new else known[key] for key in keys}
        message, task_id = _SharingUnpickler(text, known).load()
        assert (message.content["a"]["x"].data, task_id) == (data, 7)


def test_workers_end_when_their_parent_is_killed():
    done = subprocess.run(
        [sys.executable, "-c", ORPHANS],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == -signal.SIGKILL
    orphans = [int(pid) for pid in done.stdout.split()]
    assert len(set(orphans)) == 3
    deadline = time.monotonic() + 30.0
    while any(map(is_running, orphans)):
        assert time.monotonic() < deadline, f"still running: {orphans}"
        time.sleep(0.05)


def test_a_worker_that_dies_between_messages_is_noticed():
    with InProcessGrid(client, [{}, {}], {}, workers=2) as grid:
        first, _ = grid.send_and_receive(instructions(grid, "query"))
        os.kill(first.content["me"]["process"], signal.SIGKILL)
        grid._executor._workers[0].process.join()
        replies = grid.send_and_receive(instructions(grid, "query"))
    assert [reply.has_error() for reply in replies] == [True, False]
    assert "fedcore-worker-0 died (SIGKILL)" in replies[0].error.reason


def test_a_busy_worker_does_not_hold_up_the_end_of_the_grid():
    app = ClientApp()

    @app.train()
    def hang(message, context):
        time.sleep(600.0)
        return Message(RecordDict(), reply_to=message)

    @app.query()
    def quick(message, context):
        return Message(RecordDict(), reply_to=message)

    started = time.monotonic()
    with InProcessGrid(app, [{}, {}], {}, workers=2) as grid:
        slow, fast = grid.get_node_ids()
        ids = grid.push_messages(
            [
                *instructions(grid, "query", nodes=[fast]),
                *instructions(grid, "train", nodes=[slow]),
            ]
        )
        assert next(grid.pull_messages(ids)).metadata.src_node_id == fast
    assert time.monotonic() - started < 60.0


def test_large_messages_in_both_directions_do_not_block_each_other():
    app = ClientApp()

    @app.train()
    def grow(message, context):
        content = {"big": ConfigRecord({"data": os.urandom(1) * 3_000_000})}
        return Message(RecordDict(content), reply_to=message)

    with InProcessGrid(app, [{}] * 6, {}, workers=2) as grid:
        messages = [
            Message(RecordDict({"c": ConfigRecord({"data": os.urandom(3_000_000)})}), n, "train")
            for n in grid.get_node_ids()
        ]
        replies = grid.send_and_receive(messages)
    assert [len(r.content["big"]["data"]) for r in replies] == [3_000_000] * 6
