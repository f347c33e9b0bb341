"""What a round of a real deployment takes: Flower's own device processes beside the edge runner.

A SuperLink with TLS and node authentication, five nodes with keys, all on loopback, all
real processes. Both arms run the same bundles:

    secure round, nobody trains    `experiments.bench_round`: four stages of the protocol
    secure round, 2NN              the apps of `deploy submit`, 600 examples a device

`stock` is `flower-supernode` as it comes: it starts `flower-superexec`, which starts a
Python for every message. `edge` is what `deploy node` runs. Seconds are wall time, and
depend on what else the machine does; processor seconds of a board's processes do not.
A coordinator with a database does several times the work for each question; without one, it
forgets its runs when it ends. Memory is that of one board's process tree, sampled from
outside (`experiments.board_memory`): `alone` is what counts, since five boards on one machine
share the pages of libraries.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from experiments import certificates, submission
from experiments.board_memory import Held, held, processor_seconds
from experiments.edge.pace import Pace
from experiments.following import Following
from experiments.parties import AUTHORITY, NODE_KEY, CoordinatorKeys, DeviceKeys, create_parties
from experiments.processes import (
    STATE_KEY,
    Board,
    Coordinator,
    answers,
    board_environment,
    environment,
    prepare,
    prepare_board,
    program,
    started,
    toml,
    wait_until,
)
from fedcore.crypto import SystemEntropy
from fedcore.data import NpzFile
from fedcore.keyfiles import load_authority
from fedcore.models import TwoNN
from fedcore.pipeline import Bonawitz, Uniform

Row: TypeAlias = dict[str, str | int | float]
Runner: TypeAlias = Literal["stock", "edge"]
NODES: Final = 5
TRAINED_ROUNDS: Final = 2
EXAMPLES: Final = 600
SAMPLE_SECONDS: Final = 0.1
IDLE_SECONDS: Final = 5.0
WARM_SECONDS: Final = 10.0
LIMIT_SECONDS: Final = 900.0
"""After which a run counts as broken."""


def measure_deployment(rounds: int = 5) -> list[Row]:
    """Return a row for each arm: stock Flower first, then the edge runner.

    Args:
        rounds: Without training; the first is reported apart.
    """
    return [
        _measure("stock", rounds, database=True),
        _measure("edge", rounds, database=True),
        _measure("edge", rounds, database=False),
    ]


def _measure(arm: Runner, rounds: int, *, database: bool) -> Row:
    with tempfile.TemporaryDirectory(prefix="fedcore-") as folder, ExitStack() as stack:
        site = Site(Path(folder), stack)
        site.open(arm, database=database)
        still = site.run_still(rounds)
        trained, peak, cost = site.run_trained()
        time.sleep(WARM_SECONDS + IDLE_SECONDS)
        idle = held(site.boards[0].pid)
        seconds = [float(row["seconds"]) for row in still]
        later = seconds[1:] or seconds
        return {
            "arm": arm,
            "database": "yes" if database else "no",
            "nodes": NODES,
            "rounds": rounds,
            "stages": len(still[-1]["stages"]),
            "first_round_seconds": round(seconds[0], 2),
            "round_seconds": round(median(later), 2),
            "fastest_round_seconds": round(min(later), 2),
            "board_cpu_seconds": round(site.cpu_still / rounds / NODES, 2),
            "coordinator_cpu_seconds": round(site.cpu_coordinator / rounds, 2),
            "trained_round_seconds": round(trained, 1),
            "trained_board_cpu_seconds": round(cost / TRAINED_ROUNDS, 2),
            "peak_mb": round(peak.alone, 1),
            "peak_pss_mb": round(peak.pss, 1),
            "idle_mb": round(idle.alone, 1),
            "idle_pss_mb": round(idle.pss, 1),
        }


@dataclass(slots=True)
class Site:
    """One machine with a coordinator and its boards.

    Attributes:
        folder: For everything.
        stack: Ends the processes.
    """

    folder: Path
    stack: ExitStack
    boards: list[subprocess.Popen[bytes]] = field(default_factory=list)
    cpu_still: float = 0.0
    cpu_coordinator: float = 0.0
    _coordinator: Coordinator | None = None
    _superlink: int = 0

    @property
    def coordinator(self) -> Coordinator:
        """The coordinator, once it is open."""
        if self._coordinator is None:
            msg = "a site must be opened first"
            raise RuntimeError(msg)
        return self._coordinator

    def open(self, arm: Runner, *, database: bool) -> None:
        """Create the keys, start the SuperLink and the boards, and admit them."""
        pki, names = self.folder / "pki", [f"device-{number}" for number in range(NODES)]
        create_parties(
            pki, ["localhost", "127.0.0.1"], names,
            days=1, now=int(time.time()), entropy=SystemEntropy(),
        )  # fmt: skip
        coordinator = Coordinator(
            CoordinatorKeys(pki / "coordinator"),
            self.folder / "coordinator",
            _free_port(),
            database,
        )
        self._coordinator = coordinator
        prepare(coordinator.state, SystemEntropy())
        commands = coordinator.commands()
        processes = self.stack.enter_context(started(commands, coordinator.state))
        self._superlink = processes["superlink"].pid
        authority = coordinator.keys.folder / certificates.CA
        wait_until(lambda: answers(coordinator.port, authority), processes, coordinator.state)
        submission.admit(coordinator)
        for number, name in enumerate(names):
            self.boards.append(
                self.stack.enter_context(self._board(arm, number, DeviceKeys(pki / name)))
            )

    @contextmanager
    def _board(
        self, arm: Runner, number: int, keys: DeviceKeys
    ) -> Iterator[subprocess.Popen[bytes]]:
        state = self.folder / keys.folder.name
        board = Board(
            keys, state, f"localhost:{self.coordinator.port}", state / STATE_KEY,
            Pace(), WARM_SECONDS,
        )  # fmt: skip
        data = self.folder / f"{keys.folder.name}.npz"
        write_examples(data, number)
        settings = board.settings(
            {
                **keys.settings(),
                "partition-id": number,
                "data-path": str(data),
                "journal": str(state / "answered"),
                "state-key": str(board.state_key),
            }
        )
        prepare_board(board, settings, SystemEntropy())
        command, variables = board.command, board_environment(state)
        if arm == "stock":
            (state / "node.toml").write_text(toml(settings.node_config), encoding="utf-8")
            command, variables = stock_command(board, _free_port()), stock_environment(state)
        with (state / "board.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own command line
                command, stdout=log, stderr=log, env=variables, start_new_session=True
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:  # Flower's SuperExec outlives its SuperNode by some seconds
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def run_still(self, rounds: int) -> list[dict[str, Any]]:
        """Run secure rounds in which nobody trains; return what the ServerApp wrote."""
        bundle = self.folder / "still"
        manifest = submission.MANIFEST
        for name, value in (
            ("experiments.deployed:app", "experiments.bench_round:server_app"),
            ("clients.deployed:app", "experiments.bench_round:client_app"),
            ('job = ""', "nodes = 1\nrounds = 1"),
        ):
            manifest = manifest.replace(name, value)
        submission.write_bundle(bundle, manifest)
        output = self.folder / "still.json"
        settings = self.folder / "still.toml"
        settings.write_text(
            toml({"output": str(output), "nodes": NODES, "rounds": rounds}), encoding="utf-8"
        )
        board = [processor_seconds(process.pid) for process in self.boards]
        coordinator = processor_seconds(self._superlink)
        answer = submission.flwr(
            self.coordinator,
            *("run", str(bundle), submission.CONNECTION, "--run-config", str(settings)),
        )
        self._wait(output.exists, str(answer["run-id"]))
        now = [processor_seconds(process.pid) for process in self.boards]
        self.cpu_still = sum(now) - sum(board)
        self.cpu_coordinator = processor_seconds(self._superlink) - coordinator
        rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))
        return rows

    def run_trained(self) -> tuple[float, Held, float]:
        """Train; return seconds of the last round, and of one board its peak and its cost."""
        from fedcore.job import Job  # noqa: PLC0415 - imports Flower

        output = self.folder / "trained"
        output.mkdir()
        data = self.folder / "device-0.npz"
        authority = load_authority(self.coordinator.keys.folder / AUTHORITY)
        job = Job(
            name="deployment", data=NpzFile(path=str(data)), model=TwoNN(), rounds=TRAINED_ROUNDS,
            clients=NODES, clients_per_round=NODES, weighting=Uniform(),
            secagg=Bonawitz(authority=authority.hex()),
        )  # fmt: skip
        watched = self.boards[0].pid
        before = processor_seconds(watched)
        with sampled(watched) as samples:
            run = submission.Submission(job.to_json(), output, rehearsal=False)
            Following(submission.FlowerLink(self.coordinator, run), output, lambda _: None).start()
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        peak = max(samples, key=lambda sample: sample.alone)
        return (
            float(json.loads(lines[-1])["seconds"]), peak, processor_seconds(watched) - before
        )  # fmt: skip

    def _wait(self, done: Callable[[], bool], run_id: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not done():
            time.sleep(0.5)
            if time.monotonic() > deadline:
                status = [
                    run.get("status-details")
                    for run in submission.runs(self.coordinator)
                    if str(run["run-id"]) == run_id
                ]
                msg = f"run {run_id} gave no result in {LIMIT_SECONDS:g} s: {status}"
                raise RuntimeError(msg)


def stock_command(board: Board, port: int) -> list[str]:
    """Return the command of Flower's own SuperNode, as its documentation gives it."""
    return [
        program("flower-supernode"),
        *("--root-certificates", str(board.keys.folder / certificates.CA)),
        *("--superlink", board.superlink),
        *("--auth-supernode-private-key", str(board.keys.folder / NODE_KEY)),
        *("--node-config", str(board.state / "node.toml"), "--port", str(port)),
    ]


def stock_environment(state: Path) -> dict[str, str]:
    """Return an environment in which Flower polls as it does by itself."""
    variables = environment(state)
    del variables["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"]
    return variables


@contextmanager
def sampled(pid: int) -> Iterator[list[Held]]:
    """Collect what a process tree holds, from now to the end of the block."""
    samples, stop = [held(pid)], threading.Event()

    def look() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append(held(pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def write_examples(path: Path, seed: int) -> None:
    """Write images that look like noise: what counts is their number and size."""
    rng = np.random.default_rng(seed)
    images = rng.random((EXAMPLES, 1, 28, 28), np.float32)
    labels = rng.integers(0, 10, EXAMPLES)
    np.savez(path, x_train=images, y_train=labels, x_test=images[:100], y_test=labels[:100])


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
