"""Where simulated nodes run: in the caller, or in forked worker processes.

Both executors take messages with `submit` and give replies with `result`; the grid does
not know which one it has. `Serial` runs a node when its reply is asked for. `Forked`
owns persistent processes:

    affinity    node i always runs in worker i mod workers, where its Context lives: replies
                do not depend on the number of workers, and state never crosses a pipe
    forking     at the first message, not at construction: what the server imported until
                then (torch, data sets) is shared, not loaded again
    threads     one compute thread a worker; two on a busy pair of cores are several times slower
    payloads    the bytes of a broadcast array cross each pipe once, not once a message
    states      leave a worker only when all of them are asked for, to be kept on a disk
    death       workers end with their parent: its end of the pipe closes. A worker that dies
                takes the state of its nodes along, so they answer with errors from then on

The parent writes only to idle workers, which are reading: two full pipes cannot block
each other. The price is that a worker waits while the caller aggregates.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Protocol

from flwr.app import Message, RecordDict

from fedcore.engine.flower_private import ErrorCode, set_message_id
from fedcore.engine.nodes import FIRST_NODE_ID, Nodes, failure
from fedcore.errors import ConfigurationError

SHARED_BYTES = 1 << 16
"""Byte strings from this size on are sent to a worker once while they repeat."""
GRACE_SECONDS = 1.0
"""How long a worker may take to end before it is killed."""


class Executor(Protocol):
    """Something that turns messages into replies."""

    window: int
    """How many messages to submit ahead of the reply that is asked for."""

    def submit(self, message: Message, task_id: int, /) -> None:
        """Accept a message; its id must not have been submitted before."""
        ...

    def result(self, message_id: str, /) -> Message:
        """Return the reply to a submitted message; once."""
        ...

    def states(self) -> dict[int, RecordDict]:
        """Return what the nodes keep, when all that was submitted is done."""
        ...

    def close(self) -> None:
        """Free everything; afterwards the executor is unusable."""
        ...


class Serial:
    """Runs a node in the calling thread, at the moment its reply is asked for."""

    window = 1

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._waiting: dict[str, tuple[Message, int]] = {}

    def submit(self, message: Message, task_id: int, /) -> None:
        """Keep the message; nothing runs yet."""
        self._waiting[message.metadata.message_id] = (message, task_id)

    def result(self, message_id: str, /) -> Message:
        """Run the node and return its reply."""
        return self._nodes.answer(*self._waiting.pop(message_id))

    def states(self) -> dict[int, RecordDict]:
        """Return what the nodes keep; one whose reply was never asked for did not run."""
        return self._nodes.states(self._nodes.ids)

    def close(self) -> None:
        """Forget what was never asked for."""
        self._waiting.clear()


@dataclass(slots=True)
class _Worker:
    """The parent's view of one process."""

    process: ForkProcess
    pipe: Connection
    queue: deque[tuple[Message, int]] = field(default_factory=deque)
    running: Message | None = None
    known: dict[int, bytes] = field(default_factory=dict)
    epitaph: str = ""


class Forked:
    """Runs nodes in `workers` forked processes.

    Raises:
        ConfigurationError: This platform cannot fork.
    """

    def __init__(self, nodes: Nodes, workers: int) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            msg = f"workers must be 0 on {sys.platform}, got {workers}: processes cannot fork here"
            raise ConfigurationError(msg)
        self._nodes = nodes
        self._count = min(workers, len(nodes.ids))
        self._workers: list[_Worker] = []
        self._done: dict[str, Message] = {}
        self.window = 4 * self._count

    def submit(self, message: Message, task_id: int, /) -> None:
        """Queue the message for the worker that its node lives in."""
        if not self._workers:
            self._fork()
        worker = self._workers[(message.metadata.dst_node_id - FIRST_NODE_ID) % self._count]
        worker.queue.append((message, task_id))
        self._feed(worker)

    def result(self, message_id: str, /) -> Message:
        """Return the reply, after waiting for it if necessary.

        Raises:
            KeyboardInterrupt: The ClientApp raised it in the worker.
        """
        for worker in self._workers:
            self._feed(worker)
        while message_id not in self._done:
            self._wait()
        return self._done.pop(message_id)

    def states(self) -> dict[int, RecordDict]:
        """Return what the nodes keep; those of a worker that died keep nothing any more.

        Raises:
            KeyboardInterrupt: The ClientApp raised it in a worker.
        """
        if not self._workers:
            return self._nodes.states(self._nodes.ids)
        while any(worker.running for worker in self._workers):
            self._wait()
        states: dict[int, RecordDict] = {}
        for index, worker in enumerate(self._workers):
            try:
                if not worker.epitaph:
                    worker.pipe.send(self._nodes.ids[index :: self._count])
                    states |= worker.pipe.recv()
            except (EOFError, OSError):
                self._bury(worker)
        return dict(sorted(states.items()))

    def _wait(self) -> None:
        """Receive a reply, or more, and let their workers go on."""
        busy = {worker.pipe: worker for worker in self._workers if worker.running}
        for pipe in wait(list(busy)):
            worker = busy[pipe]  # type: ignore[index]
            self._receive(worker)
            self._feed(worker)

    def close(self) -> None:
        """End the workers; one that is busy is killed after `GRACE_SECONDS`."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(GRACE_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
        self._workers.clear()

    def _fork(self) -> None:
        context = multiprocessing.get_context("fork")
        ours: list[Connection] = []
        for index in range(self._count):
            here, there = context.Pipe()
            ours.append(here)
            process = context.Process(
                target=_serve,
                args=(self._nodes, there, ours),
                name=f"fedcore-worker-{index}",
                daemon=True,
            )
            process.start()
            there.close()
            self._workers.append(_Worker(process, here))

    def _feed(self, worker: _Worker) -> None:
        while worker.queue and worker.running is None:
            message, task_id = worker.queue.popleft()
            if not worker.epitaph:
                worker.running = message
                try:
                    _send(worker, message, task_id)
                except OSError:  # the worker died while it was idle
                    self._bury(worker)
            if worker.epitaph:
                self._finish(message, _crash(message, worker.epitaph))

    def _receive(self, worker: _Worker) -> None:
        message = worker.running
        if message is None:
            return
        try:
            reply = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            reply = _crash(message, worker.epitaph)
        worker.running = None
        if not isinstance(reply, Message):
            raise KeyboardInterrupt
        self._finish(message, reply)

    def _finish(self, message: Message, reply: Message) -> None:
        self._done[message.metadata.message_id] = reply

    def _bury(self, worker: _Worker) -> None:
        worker.running = None
        worker.process.join(GRACE_SECONDS)
        status = worker.process.exitcode or 0
        cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        worker.epitaph = (
            f"{worker.process.name} died ({cause}) and took the state of its nodes along: "
            "run with workers=0 to see the cause"
        )


def _crash(message: Message, epitaph: str) -> Message:
    reply = failure(message, ErrorCode.CLIENT_APP_CRASHED, epitaph)
    set_message_id(reply, f"{message.metadata.message_id}/reply")
    return reply


class _SharingPickler(pickle.Pickler):
    """Replaces large byte strings by their identity, and collects them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.shared: dict[int, bytes] = {}

    def persistent_id(self, obj: object) -> int | None:
        """Return the key of a large byte string, None for everything else."""
        if type(obj) is not bytes or len(obj) < SHARED_BYTES:
            return None
        self.shared[id(obj)] = obj
        return id(obj)


class _SharingUnpickler(pickle.Unpickler):
    """Puts the byte strings back in their places."""

    def __init__(self, data: bytes, shared: Mapping[int, bytes]) -> None:
        super().__init__(io.BytesIO(data))
        self._shared = shared

    def persistent_load(self, pid: int) -> bytes:
        """Return the byte string with this key."""
        return self._shared[pid]


def _send(worker: _Worker, message: Message, task_id: int) -> None:
    buffer = io.BytesIO()
    pickler = _SharingPickler(buffer)
    pickler.dump((message, task_id))
    # Both sides remember exactly the byte strings of the last message. Holding them here
    # keeps their identities from being given to other objects.
    fresh = {key: data for key, data in pickler.shared.items() if key not in worker.known}
    worker.known = pickler.shared
    worker.pipe.send((buffer.getvalue(), list(pickler.shared), fresh))


def _serve(nodes: Nodes, pipe: Connection, ours: list[Connection]) -> None:
    """Answer messages until the parent closes its end: the body of a worker."""
    for inherited in ours:  # or this process would keep its own pipe open for ever
        inherited.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _use_one_thread()
    known: dict[int, bytes] = {}
    while True:
        try:
            request = pipe.recv()
            if isinstance(request[0], int):  # not a message, but whose states are wanted
                pipe.send(nodes.states(request))
                continue
        except (EOFError, OSError):
            return
        data, keys, fresh = request
        known = {key: fresh[key] if key in fresh else known[key] for key in keys}
        message, task_id = _SharingUnpickler(data, known).load()
        try:
            reply: Message | None = nodes.answer(message, task_id)
        except KeyboardInterrupt:
            reply = None
        try:
            pipe.send(reply)
        except OSError:
            return


def _use_one_thread() -> None:
    # Libraries that are loaded later read the environment, those already loaded are told.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
