"""The first process of a board starts the others when they are needed, and again when they end."""

import itertools
import os
import select
import signal
import threading

import pytest

from experiments.edge.launcher import Launcher
from experiments.edge.node import REFUSED
from experiments.edge.parcels import Connected, Ended, Task, new_file, read, receive, send, write
from tests.experiments.edge.boards import APP, OTHER_APP, ask, settings


def stamp(app, link, say):
    """An app's process whose answers say who gave them."""
    del say
    while (order := receive(link)) is not None:
        task, (request, reply) = order
        (asked,) = read(request)
        if asked == b"die":
            os._exit(7)
        if asked == b"wait":
            threading.Event().wait()
        write(reply, [app.path.encode(), str(os.getpid()).encode()])
        send(link, Ended(task.number, 0))
    return 0


@pytest.fixture
def board(tmp_path):
    """Runs a board whose SuperNode is a function; returns its status and what it told."""

    def run(node, now=lambda: 0.0):
        told = []
        launcher = Launcher(settings(tmp_path), told.append, node, stamp, now)
        return launcher.run(), told

    return run


def gone(pid):
    """Wait until a process has ended."""
    descriptor = os.pidfd_open(pid)
    select.select([descriptor], [], [])
    os.close(descriptor)


def test_tasks_of_one_app_are_answered_by_one_process_and_of_another_by_another(board, tmp_path):
    def node(_, link):
        answers = [ask(link, [b""], n, app)[1] for n, app in enumerate((APP, APP, OTHER_APP), 1)]
        (tmp_path / "answers").write_bytes(b"\n".join(b" ".join(parts) for parts in answers))
        return REFUSED

    assert board(node)[0] == 1
    first, second, third = (tmp_path / "answers").read_bytes().split(b"\n")
    assert first == second
    assert first.startswith(APP.path.encode())
    assert third.startswith(OTHER_APP.path.encode())
    assert third.split()[1] != first.split()[1]


def test_an_app_that_dies_is_told_and_started_again_for_the_next_task(board, tmp_path):
    def node(_, link):
        statuses = [ask(link, [b"die"], 1)[0], ask(link, [b""], 2)[0]]
        (tmp_path / "statuses").write_text(repr(statuses))
        return REFUSED

    assert board(node)[0] == 1
    assert (tmp_path / "statuses").read_text() == "[7, 0]"


def test_an_app_that_has_nothing_to_do_is_ended(board, tmp_path):
    clock = itertools.count(0, 1000)

    def node(_, link):
        before = int(ask(link, [b""], 1)[1][1])
        send(link, Connected(1))  # wakes the launcher, an hour later by its clock
        gone(before)
        after = int(ask(link, [b""], 2)[1][1])
        (tmp_path / "pids").write_text(f"{before} {after}")
        return REFUSED

    assert board(node, lambda: float(next(clock)))[0] == 1
    before, after = (tmp_path / "pids").read_text().split()
    assert before != after


def test_nothing_is_due_while_a_task_is_at_work(tmp_path):
    launcher = Launcher(settings(tmp_path), print, now=lambda: 5.0)
    launcher._supernode = launcher._zygote = object()
    launcher._last, launcher._task = 1.0, 3
    assert launcher.timeout() is None
    launcher._task = None
    assert launcher.timeout() == 56.0


def test_a_node_that_is_killed_is_started_again(board, tmp_path):
    clock, starts = itertools.count(0, 1000), tmp_path / "starts"

    def node(_, link):
        with starts.open("a") as file:
            file.write("x")
        if len(starts.read_text()) < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return REFUSED

    status, told = board(node, lambda: float(next(clock)))
    assert status == 1
    assert starts.read_text() == "xxx"
    assert [line.partition(":")[0] for line in told] == [
        *["supernode ended with status -9"] * 2,
        "error",
    ]


def test_an_app_that_is_loaded_outlives_a_node_that_lost_its_link(board, tmp_path):
    clock, pids = itertools.count(0, 2), tmp_path / "pids"

    def node(_, link):
        with pids.open("ab") as file:
            file.write(ask(link, [b""], 1)[1][1] + b" ")
        if len(pids.read_bytes().split()) < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return REFUSED

    assert board(node, lambda: float(next(clock)))[0] == 1
    assert len(set(pids.read_bytes().split())) == 1


def test_a_task_whose_node_died_is_given_up_with_the_process_that_works_on_it(board, tmp_path):
    clock, pids = itertools.count(0, 2), tmp_path / "pids"

    def node(_, link):
        with pids.open("ab") as file:
            file.write(ask(link, [b""], 1)[1][1] + b" ")
        if len(pids.read_bytes().split()) < 2:
            request, reply = new_file(), new_file()
            write(request, [b"wait"])
            send(link, Task(2, APP), (request, reply))
            os.kill(os.getpid(), signal.SIGKILL)
        return REFUSED

    assert board(node, lambda: float(next(clock)))[0] == 1
    before, after = pids.read_bytes().split()
    assert before != after
    with pytest.raises(ProcessLookupError):
        os.kill(int(before), 0)


def test_a_node_that_is_refused_ends_the_board_with_the_reason(board):
    def node(*_):
        os.write(1, b"the SuperLink does not know this key\n")
        return REFUSED

    status, told = board(node)
    assert status == 1
    assert told == [
        f"error: supernode ended with status {REFUSED}: the SuperLink does not know this key"
    ]


def test_a_board_that_is_asked_to_stop_lets_its_node_take_leave(board, tmp_path):
    def node(_, link):
        left = threading.Event()

        def leave(*_):
            (tmp_path / "left").write_text("in order")
            raise SystemExit(0)

        signal.signal(signal.SIGTERM, leave)
        send(link, Connected(77))
        os.kill(os.getppid(), signal.SIGINT)
        left.wait()
        return 1

    before = signal.getsignal(signal.SIGINT)
    status, told = board(node)
    assert status == 0
    assert told[-1] == "stopped"
    assert told[0].startswith("connected to localhost:1")
    assert (tmp_path / "left").read_text() == "in order"
    assert signal.getsignal(signal.SIGINT) is before
