import os
import signal
import stat
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients import journal as journal_module
from clients.journal import MOST_ID_BYTES, Answer, AnsweredJournal
from fedcore.errors import ConfigurationError, PeerProtocolError

ROOT = Path(journal_module.__file__).parents[1]
# Loads the module by its file: the package's front would load Flower for every process.
LOAD = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("journal", "clients/journal.py")
journal = sys.modules["journal"] = module_from_spec(spec)
spec.loader.exec_module(journal)
book = journal.AnsweredJournal(Path(sys.argv[1]))
"""
ANSWER_UNTIL_KILLED = f"""{LOAD}
for number in range(int(sys.argv[2]), 10**9):
    book.claim("run", journal.Answer(number, 1))
    print(number, flush=True)
"""
CLAIM_EVERY_ROUND_IF_FREE = f"""{LOAD}
from fedcore.errors import PeerProtocolError
sys.stdin.readline()
for number in range(1, 101):
    try:
        book.claim("run", journal.Answer(number, 1))
    except PeerProtocolError:
        continue
    print(number)
"""

answers = st.builds(Answer, st.integers(1, 5), st.integers(1, 3), st.integers(0, 3))


@pytest.fixture
def journal(tmp_path):
    return AnsweredJournal(tmp_path / "answers")


def start(script, *arguments, **streams):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, **streams,
    )  # fmt: skip


def test_an_answer_is_given_once(journal):
    journal.claim("run", Answer(3, 1))
    with pytest.raises(PeerProtocolError, match=r"up to round 3, attempt 1, stage 0 .* round 3"):
        journal.claim("run", Answer(3, 1))


@pytest.mark.parametrize("older", [Answer(3, 1, 9), Answer(2, 9, 9), Answer(3, 2, 1)])
def test_an_older_answer_is_refused(journal, older):
    journal.claim("run", Answer(3, 2, 2))
    with pytest.raises(PeerProtocolError, match="later ones only"):
        journal.claim("run", older)
    assert journal.last("run") == Answer(3, 2, 2)


@pytest.mark.parametrize("later", [Answer(3, 2, 3), Answer(3, 3), Answer(4, 1)])
def test_a_later_answer_is_given(journal, later):
    journal.claim("run", Answer(3, 2, 2))
    journal.claim("run", later)
    assert journal.last("run") == later


def test_runs_do_not_hinder_each_other(journal):
    journal.claim("one", Answer(9, 1))
    journal.claim("two", Answer(1, 1))
    assert (journal.last("one"), journal.last("two")) == (Answer(9, 1), Answer(1, 1))
    assert journal.last("three") is None


@given(asked=st.lists(st.tuples(st.sampled_from(["", "\n", "ü\ud800", "run"]), answers)))
def test_what_is_answered_increases_strictly_whatever_is_asked(tmp_path_factory, asked):
    path = tmp_path_factory.mktemp("journal") / "answers"
    given_answers: dict[str, list[Answer]] = {}
    for run, answer in asked:
        try:
            AnsweredJournal(path).claim(f"run {run}", answer)  # every claim after a restart
        except PeerProtocolError:
            assert answer <= given_answers[run][-1]
        else:
            given_answers.setdefault(run, []).append(answer)
    for row in given_answers.values():
        assert all(one < other for one, other in pairwise(row))


# A process may die at any moment.


def test_a_killed_device_never_answers_again_what_it_answered(tmp_path):
    path, known = tmp_path / "answers", 0
    book = AnsweredJournal(path)
    for number in range(40):
        device = start(ANSWER_UNTIL_KILLED, path, known + 1)
        first = device.stdout.readline()
        # Steps of the golden ratio reach every part of a claim about equally often.
        delay = (number * 0.618 % 1) * 0.003
        time.sleep(delay)
        device.send_signal(signal.SIGKILL)
        given_answers = [int(first), *map(int, device.communicate()[0].split())]
        assert given_answers[0] > known
        last = book.last("run")
        assert last is not None
        # At most one answer was noted and not given.
        assert last.round_number - given_answers[-1] in (0, 1)
        with pytest.raises(PeerProtocolError):
            book.claim("run", Answer(given_answers[-1], 1))
        known = last.round_number


def test_two_processes_never_give_the_same_answer(tmp_path):
    path = tmp_path / "answers"
    devices = [start(CLAIM_EVERY_ROUND_IF_FREE, path, stdin=subprocess.PIPE) for _ in range(2)]
    for device in devices:
        device.stdin.write("\n")
        device.stdin.flush()
    rows = [device.communicate()[0].split() for device in devices]
    assert all(device.returncode == 0 for device in devices)
    assert len(rows[0]) + len(rows[1]) == len({*rows[0], *rows[1]}) > 0
    assert AnsweredJournal(path).last("run") == Answer(100, 1)


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_answer(
    journal, monkeypatch
):
    order = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append("folder" if is_folder(fd) else "file"), sync(fd))
    )
    monkeypatch.setattr(Path, "replace", lambda path, to: (order.append("name"), replace(path, to)))
    journal.claim("run", Answer(1, 1))
    assert order == ["file", "name", "folder"]


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("call", ["os.write", "os.fsync", "pathlib.Path.replace"])
def test_an_answer_that_cannot_be_noted_is_not_given(journal, monkeypatch, call):
    journal.claim("run", Answer(1, 1))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(call, full)
        with pytest.raises(ConfigurationError, match=r"No space left on device.*nothing may be"):
            journal.claim("run", Answer(2, 1))
    assert journal.last("run") in (Answer(1, 1), Answer(2, 1))
    journal.claim("run", Answer(3, 1))


def test_a_write_that_stops_short_is_taken_up_again(journal, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    journal.claim("run", Answer(1, 1))
    assert journal.last("run") == Answer(1, 1)


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"gone.answers cannot be kept \(No such file"):
        AnsweredJournal(tmp_path / "gone" / "answers").claim("run", Answer(1, 1))


# A file may rot, or be tampered with by accident.


def test_a_journal_with_any_byte_changed_refuses_everything(journal):
    journal.claim("run", Answer(3, 1))
    whole = journal.path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        journal.path.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match="is damaged, so nothing may be answered"):
            journal.claim("another", Answer(9, 9))
        assert journal.path.read_bytes() == damaged  # left for somebody to look at


def test_a_journal_that_was_cut_short_refuses_everything(journal):
    journal.claim("run", Answer(3, 1))
    whole = journal.path.read_bytes()
    for size in range(len(whole)):
        journal.path.write_bytes(whole[:size])
        with pytest.raises(ConfigurationError, match="is damaged"):
            journal.last("run")


@pytest.mark.parametrize(
    "body", ["[]", "{}x", '{"a":1}', '{"a":[1,1,0,0]}', '{"a":[1]}', '{"a":[true,1,0]}',
             '{"a":[-1,1,0]}', '{"a":["1",1,0]}', '{"":[1,1,0]}', '{"a":[1.0,1,0]}', "[" * 5000],
)  # fmt: skip
def test_a_body_that_is_no_journal_refuses_everything(journal, body):
    digest = journal_module._digest(body)
    journal.path.write_text(f"{journal_module._FORMAT}\n{digest}\n{body}\n")
    with pytest.raises(ConfigurationError, match="is damaged"):
        journal.claim("run", Answer(1, 1))


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_damaged(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "answers"
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="is damaged"):
        AnsweredJournal(path).last("run")


def test_what_a_dead_process_left_half_written_is_no_journal(journal):
    journal.claim("run", Answer(1, 1))
    journal.path.with_name("answers.new").write_bytes(b"half of")
    assert journal.last("run") == Answer(1, 1)
    journal.claim("run", Answer(2, 1))
    assert journal.last("run") == Answer(2, 1)


def test_a_link_in_the_place_of_the_new_file_is_not_followed(journal, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("other")
    journal.path.with_name("answers.new").symlink_to(precious)
    with pytest.raises(ConfigurationError, match="cannot be kept"):
        journal.claim("run", Answer(1, 1))
    assert precious.read_text() == "other"


# A coordinator may ask for anything.


def test_a_full_journal_refuses_new_runs_and_forgets_none(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "MOST_RUNS", 3)
    for number in range(3):
        journal.claim(f"run {number}", Answer(1, 1))
    with pytest.raises(ConfigurationError, match="holds 3 runs, as many as it keeps"):
        journal.claim("run 3", Answer(1, 1))
    with pytest.raises(PeerProtocolError):
        journal.claim("run 0", Answer(1, 1))
    journal.claim("run 0", Answer(2, 1))


def test_a_long_run_takes_no_more_room_than_a_short_one(journal):
    sizes = []
    for number in range(10, 90):
        journal.claim("run", Answer(number, 1))
        sizes.append(journal.path.stat().st_size)
    assert len(set(sizes[10:])) == 1  # but for the digits of the numbers


def test_the_longest_journal_is_still_read(journal, monkeypatch):
    monkeypatch.setattr(journal_module, "MOST_RUNS", 4)
    monkeypatch.setattr(journal_module, "_MOST_BYTES", 4 * (6 * MOST_ID_BYTES + 64) + 1024)
    highest = Answer(*[(1 << 48) - 1] * 3)
    for letter in "\0\1\2\3":
        journal.claim(letter * MOST_ID_BYTES, highest)
    assert journal.last("\3" * MOST_ID_BYTES) == highest


@pytest.mark.parametrize("answer", [Answer(1 << 48, 1), Answer(-1, 1), Answer(1, 1, -1)])
def test_a_number_that_no_plan_has_is_refused(journal, answer):
    with pytest.raises(PeerProtocolError, match=r"whole numbers in 0\.\.2\^48"):
        journal.claim("run", answer)
    assert not journal.path.exists()


@pytest.mark.parametrize("name", ["", "x" * (MOST_ID_BYTES + 1), "ü" * MOST_ID_BYTES])
def test_a_name_that_is_no_name_is_refused(journal, name):
    with pytest.raises(PeerProtocolError, match="1 to 128 bytes"):
        journal.claim(name, Answer(1, 1))


def test_the_files_belong_to_their_owner_only(journal):
    journal.claim("run", Answer(1, 1))
    modes = {path.name: path.stat().st_mode & 0o777 for path in journal.path.parent.iterdir()}
    assert modes == {"answers": 0o600, "answers.lock": 0o600}
