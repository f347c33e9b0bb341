"""The app's process: imports an app once, and forks a process for each message.

    launcher --fork--> this one: imports the app of one bundle, answers nothing itself
                         |--fork--> message 1 --> answer, end
                         '--fork--> message 2 --> answer, end

A message finds the app as it was after its import. What it does to the app's globals, to
its libraries or to its process is gone with its process: nothing goes from one message to
the next but the Context, as with Flower, and nothing at all from one bundle to another,
which gets a process of its own from a launcher that never imported an app.

Forking is safe in a process of one thread only. An app that starts threads when it is
imported is not kept: it answers one message in this process, which then ends.

Libraries that take seconds to import (torch) are not imported because an app might need
them: most messages of a protocol do not. The first message that did says so when it ends;
from then on they are imported here, and the next one finds them.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final

from experiments.edge.family import follow_parent
from experiments.edge.flower_board import ClientApp, answer, load_app
from experiments.edge.parcels import App, Ended, Task, read, receive, send, write

SLOW_LIBRARIES: Final = ("torch",)
"""Worth keeping, once a message has needed them. None starts a thread when it is imported."""
OWN: Final = ("experiments", "clients", "strategies", "fedcore")
"""Names that the runner's own modules share with those of a bundle."""
Load = Callable[[App], ClientApp]


def keep_warm(
    app: App,
    launcher: socket.socket,
    say: Callable[[str], None],
    load: Load = load_app,
) -> int:
    """Answer messages with one app until the launcher ends this process; return a status."""
    forget_own_modules(str(Path(__file__).parents[2]))
    loaded = _loaded(app, load)
    while (order := receive(launcher)) is not None:
        task, descriptors = order
        if not isinstance(task, Task):
            continue
        if threads() > 1:
            say("the app starts threads when it is imported: it is loaded for each message")
            status = _answer(task, descriptors, loaded, say)
            send(launcher, Ended(task.number, status))
            return status
        status, libraries = _in_a_process(task, descriptors, loaded, launcher, say)
        for descriptor in descriptors:
            os.close(descriptor)
        send(launcher, Ended(task.number, status))
        if libraries:
            for name in libraries:
                import_module(name)
            gc.collect()
            gc.freeze()  # what a collection touches is copied in every fork
    return 0


def forget_own_modules(root: str) -> None:
    """Make Python import a bundle's modules, where ours have the same name."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != root]


def threads() -> int:
    """Return how many threads this process has, whoever started them."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def _loaded(app: App, load: Load) -> Callable[[], ClientApp]:
    """Import the app now; an error is told to each message instead."""
    try:
        found = load(app)
    except Exception as error:  # noqa: BLE001 - becomes the reply
        failure = error

        def fail() -> ClientApp:
            raise failure

        return fail
    gc.collect()
    gc.freeze()
    return lambda: found


def _in_a_process(
    task: Task,
    descriptors: list[int],
    loaded: Callable[[], ClientApp],
    launcher: socket.socket,
    say: Callable[[str], None],
) -> tuple[int, list[str]]:
    """Answer in a new process; return how it ended, and what is worth importing here."""
    known = set(sys.modules)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            launcher.close()
            os.close(reading)
            follow_parent()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _draw_anew()
            status = _answer(task, descriptors, loaded, say)
            new = [name for name in SLOW_LIBRARIES if name in sys.modules and name not in known]
            os.write(writing, json.dumps(new).encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, wait_status = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(wait_status)
    return status, json.loads(said) if status == 0 and said else []


def _answer(
    task: Task,
    descriptors: list[int],
    loaded: Callable[[], ClientApp],
    say: Callable[[str], None],
) -> int:
    request, reply = descriptors
    try:
        write(reply, answer(read(request), task.number, loaded, say))
    except Exception as error:  # noqa: BLE001 - the coordinator is told that there is no answer
        say(f"a message could not be answered: {error!r}")
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _draw_anew() -> None:
    """Give the process its own randomness where a fork would repeat its parent's.

    Python's, OpenSSL's and the system's generators do that by themselves.
    """
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed()
