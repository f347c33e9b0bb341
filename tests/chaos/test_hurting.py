"""What the harness does to processes is what it says, and what is drawn follows from the seed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from random import Random

import pytest

from tests.chaos import proc
from tests.chaos.faults import KINDS, ORDERS, SKEW, SKEWED, draw
from tests.chaos.federation import Party, Tail
from tests.chaos.traced import orders_in

SLEEP = "import time; time.sleep(600)"
TWO = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"
WRITER = """
import sys
for line in sys.stdin:
    try:
        with open(sys.argv[1], "a") as file:
            file.write(line)
        print("written", flush=True)
    except OSError:
        print("full", flush=True)
"""


@pytest.fixture
def party(tmp_path):
    found = Party("two", [sys.executable, "-c", TWO], tmp_path / "log")
    yield found
    found.stop()


def wait_for(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.02)
    return happened()


def test_a_party_is_known_with_all_that_it_started_and_is_killed_whole(party):
    party.keep_up()
    assert wait_for(lambda: len(party.part("time.sleep")) == 2)
    found = party.tree()
    assert party.send(signal.SIGKILL) == 2
    party.process.wait(30)
    assert wait_for(lambda: not any(map(proc.tree, found)))


def test_a_party_that_ended_is_started_again_unless_it_was_stopped(party, monkeypatch):
    monkeypatch.setattr("tests.chaos.federation.RESTART_SECONDS", 0.0)
    party.keep_up()
    party.process.kill()
    party.process.wait(30)
    party.keep_up()
    party.keep_up()
    assert party.starts == 2
    party.stop()
    party.keep_up()
    assert party.starts == 2


def test_the_processes_of_a_tree_have_their_command_lines():
    with subprocess.Popen(
        [sys.executable, "-c", "import os, sys; os.fork(); sys.stdin.read()", "a-mark"],
        stdin=subprocess.PIPE,
    ) as process:
        assert wait_for(lambda: len(proc.tree(process.pid)) == 2)
        assert all("a-mark" in proc.command_line(pid) for pid in proc.tree(process.pid))
        assert proc.send(proc.tree(process.pid), signal.SIGKILL) == 2
    assert proc.tree(process.pid) == []


def test_a_full_disk_fails_writes_until_it_is_freed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-u", "-c", WRITER, str(tmp_path / "file")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    ) as process:  # fmt: skip
        party = Party("writer", [], tmp_path / "log", process=process)

        def write():
            process.stdin.write("line\n")
            return process.stdout.readline().strip()

        assert write() == "written"
        party.limit_files(0)
        assert write() == "full"
        party.limit_files(-1)
        assert write() == "written"
        process.stdin.close()
    assert (tmp_path / "file").read_text() == "line\nline\n"


@pytest.mark.parametrize("skew", [3600.0, -60.0])
def test_a_wrong_clock_is_wrong_wherever_python_asks(skew):
    code = (
        "import time, datetime; print(time.time(), time.time_ns() / 1e9, "
        "datetime.datetime.now(datetime.UTC).timestamp())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SKEWED), SKEW: str(skew)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for told in map(float, done.stdout.split()):
        assert abs(told - time.time() - skew) < 30


def test_the_same_seed_draws_the_same_faults_and_every_kind_comes_up():
    def of(seed):
        random = Random(seed)
        return [fault for number in range(1, 400) for fault in draw(random, number, 5)]

    assert of(7) == of(7)
    assert of(7) != of(8)
    assert set(Counter(fault.kind for fault in of(7))) == {*KINDS, *ORDERS}
    assert {fault.node for fault in of(7)} == set(range(5))


def test_an_order_is_carried_out_once_in_its_round_or_the_first_after_it(tmp_path):
    path = tmp_path / "orders.jsonl"
    order = orders_in(path)
    assert order(1, "share", "0") is None
    path.write_text('{"round": 2, "stage": "share", "names": ["0", "77"], "do": "replay"}\n')
    assert order(1, "share", "0") is None
    assert order(2, "upload", "0") is None
    assert order(2, "share", "1") is None
    assert order(3, "share", "77") == "replay"
    assert order(3, "share", "0") is None


def test_a_tail_gives_whole_lines_and_each_once(tmp_path):
    tail = Tail(tmp_path / "lines")
    assert list(tail.lines()) == []
    tail.path.write_text('{"a": 1}\n{"b"')
    assert list(tail.lines()) == [{"a": 1}]
    tail.path.write_text('{"a": 1}\n{"b": 2}\n')
    assert list(tail.lines()) == [{"b": 2}]
    assert list(tail.lines()) == []
