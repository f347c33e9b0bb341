"""A real deployment on loopback: SuperLink with TLS, SuperNodes with keys, runs to their end."""

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from experiments import deploy
from experiments.board_memory import tree

pytestmark = pytest.mark.slow

ROOT = Path(deploy.__file__).parents[1]
DEVICES = 3
SEED = 5
SECONDS = 600
"""After which a process that says nothing counts as broken."""
JOB = (
    *(f"seed={SEED}", "rounds=2", f"clients={DEVICES}", f"clients_per_round={DEVICES}"),
    *("weighting=uniform", "privacy=distributed_gaussian", "privacy.epsilon=8"),
)


def command(*arguments):
    return [sys.executable, "-m", "experiments.deploy", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(
        command(*arguments),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip


@contextmanager
def running(*arguments, said):
    """A command that goes on until it is asked to stop, from the moment at which it says so."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A job in a shell's background inherits an ignored SIGINT, and so would this one.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - C only
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith(said):
                break
        else:
            pytest.fail(f"{arguments[0]} ended with status {process.wait()}")
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 0
        # A node tells before what became of a SuperNode that a test has killed.
        assert process.stdout.read().splitlines()[-1] == "stopped"
    finally:
        process.terminate()
        process.wait(SECONDS)
        process.stdout.close()


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@dataclass(frozen=True)
class Deployment:
    pki: Path
    state: Path
    port: int

    @property
    def coordinator(self):
        return ("--keys", self.pki / "coordinator", "--state", self.state, "--port", self.port)

    @property
    def superlink(self):
        return f"localhost:{self.port}"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    assert run("certs", "--out", folder / "pki", "--count", DEVICES).returncode == 0
    found = Deployment(folder / "pki", folder / "coordinator", free_port())
    with ExitStack() as stack:
        stack.enter_context(running("superlink", *found.coordinator, said="ready on 127.0.0.1"))
        for number in range(DEVICES):
            stack.enter_context(
                running(
                    *("node", "--keys", found.pki / f"device-{number + 1}"),
                    *("--state", folder / f"node-{number}", "--superlink", found.superlink),
                    *("--partition", number, "--rehearse", SEED),
                    said="connected to",
                )
            )
        yield found


def test_a_deployed_run_gives_the_same_model_as_one_process_bit_for_bit(deployment, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    done = run("submit", *deployment.coordinator, "--out", first, "--rehearse", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 rounds" in done.stdout
    rehearsed = run(
        *("rehearse", "--parties", deployment.pki),
        *("--job", first / "job.json", "--out", again),
    )
    assert rehearsed.returncode == 0, rehearsed.stderr
    assert (first / "model.npz").read_bytes() == (again / "model.npz").read_bytes()
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert [line["survivors"] for line in lines] == [DEVICES] * 2
    assert lines[-1]["epsilon"] <= 8
    told = run("status", *deployment.coordinator).stdout
    assert "3 of 3 admitted devices online" in told
    assert "finished:completed" in told
    # Each device noted on its own disk what it answered.
    assert all(
        (deployment.state.parent / f"node-{number}" / "answered").stat().st_size
        for number in range(DEVICES)
    )


def test_a_deployed_fleet_trains_in_buffers(deployment, tmp_path):
    folder = tmp_path / "buffered"
    done = run(
        *("submit", *deployment.coordinator, "--out", folder, *JOB, "rounds=3"),
        *("schedule=buffered", "clients_per_round=2", "schedule.concurrency=3"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["survivors"] for line in lines] == [2] * 3
    assert lines[0]["buffer"]["staleness_max"] == 0
    assert all(line["downloads"] >= 2 for line in lines)
    ledger = json.loads((folder / "ledger.json").read_text())
    assert [release["round_number"] for release in ledger["releases"]] == [1, 2, 3]


def test_a_run_that_cannot_be_held_ends_with_status_1_and_the_reason(deployment, tmp_path):
    done = run(
        *("submit", *deployment.coordinator, "--out", tmp_path / "run", *JOB),
        *("clients=4", "stage_seconds=5"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "after 0 of all rounds" in done.stderr
    assert "expected 4 nodes, found 3" in done.stderr


def test_a_device_that_was_not_admitted_is_refused(deployment, tmp_path):
    """It has a key, and trusts the right authority; the coordinator does not know it."""
    assert run("certs", "--out", tmp_path / "other", "--count", 1).returncode == 0
    keys = tmp_path / "other" / "device-1"
    shutil.copyfile(deployment.pki / "device-1" / "ca.crt", keys / "ca.crt")
    done = run(
        *("node", "--keys", keys, "--state", tmp_path / "state", "--partition", 0),
        *("--superlink", deployment.superlink),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "supernode ended with status" in done.stderr
    assert "3 of 3 admitted devices" in run("status", *deployment.coordinator).stdout


def test_a_device_of_another_authority_does_not_speak_with_this_coordinator(deployment, tmp_path):
    assert run("certs", "--out", tmp_path / "other", "--count", 1).returncode == 0
    keys = tmp_path / "other" / "device-1"
    done = run(
        *("node", "--keys", keys, "--state", tmp_path / "state", "--partition", 0),
        *("--superlink", deployment.superlink),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "certificate" in done.stderr.lower()
    assert "connected to" not in done.stdout


def test_a_node_that_is_killed_is_taken_back_and_answers_the_next_run(deployment, tmp_path):
    """The SuperLink refuses it until the heartbeats of its last process are overdue."""
    state = deployment.state.parent / "node-0"
    launcher = next(
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(state / "board.json").encode() in path.read_bytes()
        and len(list(tree(int(path.parent.name)))) > 1
    )
    supernode = min(set(tree(launcher)) - {launcher})  # the first that it forked
    os.kill(supernode, signal.SIGKILL)
    done = run("submit", *deployment.coordinator, "--out", tmp_path / "run", "--rehearse", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 rounds" in done.stdout


def post(deployment, path, body=b""):
    """The status with which the SuperLink answers on loopback."""
    context = ssl.create_default_context(cafile=deployment.pki / "coordinator" / "ca.crt")
    connection = http.client.HTTPSConnection(
        "127.0.0.1", deployment.port, timeout=60, context=context
    )
    try:
        connection.request("POST", path, body, {"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_nobody_reaches_the_control_api_from_outside(deployment):
    """Another address of this machine stands for its network: nothing listens there."""
    socket.create_connection(("127.0.0.1", deployment.port), timeout=60).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", deployment.port), timeout=60)


def test_a_local_stranger_gets_neither_a_task_nor_a_message(deployment):
    assert post(deployment, "/v1/runtime/acquire-task") == 401
    assert post(deployment, "/v1/fleet/pull-messages") == 401


def test_a_second_superlink_on_the_same_port_is_refused(deployment):
    done = run("superlink", *deployment.coordinator)
    assert done.returncode == 2
    assert "has a SuperLink already" in done.stderr
