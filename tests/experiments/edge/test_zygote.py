"""An app is imported once, and every message finds it as it was then."""

import os
import signal
import sys
import threading
from functools import partial

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.constant import ErrorCode

from experiments.edge import zygote
from experiments.edge.family import fork
from experiments.edge.zygote import forget_own_modules, keep_warm
from tests.experiments.edge.boards import APP, ask, asked, log_file, told

SHARED = []


def counting(app):
    """An app whose every answer says in which process, and how many came before it."""
    del app
    imported_in, found = os.getpid(), ClientApp()

    @found.train()
    def train(message, context):
        SHARED.append(message)
        number = message.content["config"]["number"]
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 8:
            sys.modules["torch"] = sys  # as if it had been imported for this message
        said = {
            "imported-in": imported_in, "answered-in": os.getpid(), "before": len(SHARED) - 1,
            "random": int.from_bytes(os.urandom(4)),
        }  # fmt: skip
        return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)

    return found


def threaded(app):
    """An app that starts a thread when it is imported."""
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return counting(app)


def broken(app):
    raise LoadClientAppError(f"{app.path} has no app")


@pytest.fixture
def started(tmp_path):
    """Starts the process of an app."""
    children = []
    with log_file(tmp_path) as log:

        def start(load, import_slow=None):
            def work(link):
                sys.modules.pop("torch", None)  # the tests' process may have it
                if import_slow is not None:
                    zygote.import_module = import_slow
                return keep_warm(APP, link, partial(print, flush=True), load)

            children.append(fork(work, log))
            return children[-1]

        yield start
        for child in children:
            child.end()


def said_by(answer):
    return told(answer)[2].content["said"]


def test_each_message_has_a_process_of_its_own_and_finds_the_app_as_it_was_imported(started):
    child = started(counting)
    answers = [said_by(ask(child.link, asked(), number)[1]) for number in (1, 2, 3)]
    assert {answer["imported-in"] for answer in answers} == {child.pid}
    assert len({answer["answered-in"] for answer in answers} | {child.pid}) == 4
    assert [answer["before"] for answer in answers] == [0, 0, 0]


def test_a_message_that_kills_its_process_ends_that_process_only(started):
    child = started(counting)
    assert ask(child.link, asked(9))[0] == -signal.SIGKILL
    assert ask(child.link, asked(), 2)[0] == 0


def test_an_app_that_starts_threads_answers_one_message_and_goes(started):
    child = started(threaded)
    status, answer = ask(child.link, asked())
    assert status == 0
    assert said_by(answer)["answered-in"] == child.pid
    assert child.link.recv(16) == b""


def test_an_app_that_cannot_be_imported_tells_so_to_every_message(started):
    child = started(broken)
    for number in (1, 2):
        _, head, _ = told(ask(child.link, asked(), number)[1])
        assert head.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION


def test_a_library_is_imported_for_all_once_a_message_has_needed_it(started, tmp_path):
    note = tmp_path / "imported"

    def import_slow(name):
        note.write_text(name + str(os.getpid()))

    child = started(counting, import_slow)
    ask(child.link, asked(1))
    ask(child.link, asked(1), 2)
    assert not note.exists()
    ask(child.link, asked(8), 3)
    ask(child.link, asked(1), 4)
    assert note.read_text() == f"torch{child.pid}"


def test_messages_get_no_answer_from_what_is_no_request(started):
    child = started(counting)
    assert ask(child.link, [b"\xff", b"\xff", b"\xff"])[0] == 1
    assert ask(child.link, asked(), 2)[0] == 0


def test_a_bundle_finds_none_of_our_own_modules(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    forget_own_modules(str(tmp_path))
    names = {name.partition(".")[0] for name in sys.modules}
    assert not names & {"experiments", "clients", "strategies", "fedcore"}
    assert "flwr" in names
    assert str(tmp_path) not in sys.path


def test_a_process_ends_with_its_parent(tmp_path):
    """Also if the parent is killed: nobody is left to answer, or to hold a model."""
    note = tmp_path / "pid"

    def parent(link):
        with log_file(tmp_path) as log:

            def child(_):
                note.write_text(str(os.getpid()))
                link.send(b"there")
                threading.Event().wait()
                return 0

            fork(child, log)
            threading.Event().wait()
        return 0

    with log_file(tmp_path) as log:
        started = fork(parent, log)
        assert started.link.recv(16) == b"there"
        os.kill(started.pid, signal.SIGKILL)
        # The child holds the other end too: the link ends when both are gone.
        assert started.link.recv(16) == b""
        started.reap()
