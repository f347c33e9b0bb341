"""What a command of a deployment starts ends with it, however it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import deploy
from experiments.processes import EndedError, gave_up, wait_forever

ROOT = Path(deploy.__file__).parents[1]
STARTS = """
import sys
from pathlib import Path
from experiments.processes import started
child = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
with started({"child": child}, Path(sys.argv[1])) as processes:
    print(processes["child"].pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_command_started_ends_when_the_command_is_killed(tmp_path, number):
    command = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = int(command.stdout.readline())
    assert wait_for(lambda: (tmp_path / "child.log").read_text() == "up\n")
    command.send_signal(number)
    command.communicate()
    assert wait_for(lambda: not is_running(child))


def test_a_supernode_that_gave_up_is_known_by_its_log_as_it_grows(tmp_path):
    log = tmp_path / "supernode.log"
    log.write_bytes(b"SuperNode ID: 7\n")
    found = gave_up(log)
    assert not found()
    with log.open("ab") as file:
        file.write(b"ERROR: SSL/TLS hand")
        file.flush()
        assert not found()
        file.write(b"shake error detected.\n")
    assert found()


def test_a_process_that_works_no_more_ends_the_wait(tmp_path):
    def check():
        msg = "it gave up"
        raise EndedError(msg)

    with pytest.raises(EndedError, match="it gave up"):
        wait_forever({}, tmp_path, check)


def is_running(pid):
    """Whether a process is there, and not only its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(happened, seconds=30):
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)
    return happened()
