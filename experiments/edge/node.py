"""The SuperNode's process: pulls messages, has them answered by another, pushes the answers.

    pull > Context and message into a memory file > order to the launcher
         > wait for the end of that process > Context to the disk > push

One message at a time, as Flower's. It imports neither an app nor torch, and outlives them.
That a process ended without an answer is known at once, from the kernel, and said to the
coordinator with Flower's own error; Flower's SuperNode waits for missed heartbeats, a minute.

A SuperLink takes a node back only when the heartbeats of its last process are overdue. A
node that was killed and started again is therefore refused for up to a minute. It waits.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from flwr.app import RecordDict

from experiments.edge.contexts import FOLDER, Contexts
from experiments.edge.flower_board import (
    Connection,
    Received,
    RefusedError,
    RunNotRunningException,
    connect,
    crashed,
    node_key,
    state_of,
)
from experiments.edge.pace import Pace, Patience
from experiments.edge.parcels import (
    App,
    Connected,
    Ended,
    Task,
    new_file,
    read,
    receive,
    send,
    write,
)
from experiments.edge.settings import Settings
from fedcore.sealed import Seal

REFUSED: Final = 3
"""Exit status: the SuperLink does not take this node, and will not without somebody's help."""
PATIENCE_SECONDS: Final = 180.0
"""Heartbeats of a killed node are overdue after one minute; three are for slow clocks."""
_APPS: Final = "apps"


def run_node(settings: Settings, launcher: socket.socket) -> int:
    """Take part until asked to stop; return the exit status."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _unauthorized)
    state = Path(settings.state)
    contexts = Contexts(state / FOLDER, Seal(Path(settings.state_key).read_bytes()))
    contexts.clean(time.time())
    keys = node_key(Path(settings.node_key).read_bytes())
    authority = Path(settings.authority).read_bytes()
    failures, first_refusal = 0, None
    while True:
        try:
            with connect(settings.superlink, authority, keys) as connection:
                send(launcher, Connected(connection.node_id))
                failures, first_refusal = 0, None
                desk = Desk(connection, contexts, settings, launcher)
                serve(connection.receive, desk.answer, settings.pace)
        except RefusedError as error:
            first_refusal = first_refusal or time.monotonic()
            if not error.for_now or time.monotonic() - first_refusal > PATIENCE_SECONDS:
                say(str(error))
                return REFUSED
            say(f"not taken for now, trying again: {error}")
        failures += 1
        time.sleep(Patience().wait(failures, random.random()))  # noqa: S311 - only spreads


def serve(
    receive_one: Callable[[], Received | None],
    answer: Callable[[Received], None],
    pace: Pace,
    *,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> NoReturn:
    """Answer messages one by one; whatever goes wrong with the link is raised."""
    last = now()
    while True:
        try:
            received = receive_one()
            if received is not None:
                answer(received)
                last = now()
                continue
        except RunNotRunningException:
            say("the run ended meanwhile: its message is left")
        sleep(pace.pause(now() - last, random.random()))  # noqa: S311 - only spreads


@dataclass(slots=True)
class Desk:
    """Where one message is answered; remembers the run of the last one."""

    connection: Connection
    contexts: Contexts
    settings: Settings
    launcher: socket.socket
    run_id: int | None = None
    app: App | None = None
    bundle: bytes = field(default=b"", repr=False)
    context: bytes = field(default=b"", repr=False)
    tasks: int = 0

    def answer(self, received: Received) -> None:
        """Have a message answered, keep the Context, push the answer.

        Raises:
            RunNotRunningException: The run ended meanwhile.
            ConfigurationError: The Context cannot be kept: nothing was answered.
        """
        start = time.monotonic()
        message, series = received.message, received.run.series_id
        say(f"received {message.metadata.message_type} of run {message.metadata.run_id}")
        app = self._begin(received)
        parts = self._hand_over(app, (self.context, *received.parts))
        if parts is None:
            say("its process ended without an answer: the coordinator is told")
            answer = list(crashed(message))
        else:
            if parts[0] != self.context:
                self.contexts.save(series, parts[0])
                self.context = parts[0]
            answer = parts[1:]
        self.connection.reply(answer, time.monotonic() - start)
        say("answered")

    def _begin(self, received: Received) -> App:
        """Return the app of a message's run, with the Context in place."""
        run = received.run
        if self.app is None or self.app.digest != run.fab_hash:
            self.app, self.bundle = self.connection.bundle(run, Path(self.settings.state) / _APPS)
        if self.run_id != run.run_id:
            kept = self.contexts.load(run.series_id, say)
            state = RecordDict() if kept is None else state_of(kept)
            self.context = self.connection.context(
                run, self.bundle, self.settings.node_config, state
            )
            self.run_id = run.run_id
        return self.app

    def _hand_over(self, app: App, parcel: tuple[bytes, ...]) -> list[bytes] | None:
        """Have another process answer; None if it could not."""
        self.tasks += 1
        request, reply = new_file(), new_file()
        try:
            write(request, parcel)
            send(self.launcher, Task(self.tasks, app), (request, reply))
            os.close(request)
            request = -1
            while True:
                order = receive(self.launcher)
                if order is None:
                    raise SystemExit(0)  # the launcher is gone, and this process follows it
                ended, _ = order
                if isinstance(ended, Ended) and ended.number == self.tasks:
                    return read(reply) if ended.status == 0 else None
        finally:
            for descriptor in (request, reply):
                if descriptor >= 0:
                    os.close(descriptor)


def say(line: str) -> None:
    """Write a line into the log."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Leave by the way on which the SuperLink is told."""
    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(0)


def _unauthorized(number: int, frame: FrameType | None) -> NoReturn:
    """End: Flower's client sends this process SIGINT when a SuperLink answers 401."""
    del number, frame
    say("the SuperLink does not know this node's key, or the clocks differ by minutes")
    raise SystemExit(REFUSED)
