"""A real deployment on loopback that can be hurt: one process group for each party.

    submit > SuperLink + ServerApp < nginx < a wire for each device < SuperNode + ClientApp

Everything is started by `experiments.deploy`, as docs/deployment.md does, and whatever ends
is started again after a moment, as systemd would.
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import deploy
from tests.chaos import proc
from tests.chaos.wire import Wire

ROOT = Path(deploy.__file__).parents[1]
INSTALL_NGINX = "nginx is not installed: apt-get install nginx-light, or put another on the PATH"
RESTART_SECONDS = 3.0


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def deploy_command(*arguments: object, module: str = "experiments.deploy") -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


@dataclass
class Party:
    """A process that is kept running, with all that it starts.

    Attributes:
        name: Of its log.
        command: That starts it.
        log: Where it writes.
        surroundings: Added to its environment.
        process: The one that runs now.
        wanted: Whether it is to be started again when it ends.
        starts: How often it was.
    """

    name: str
    command: Sequence[str]
    log: Path
    surroundings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    wanted: bool = True
    starts: int = 0
    _due: float = 0.0

    def keep_up(self) -> None:
        """Start it if it is wanted and not there."""
        if self.process is not None and self.process.poll() is None:
            return
        if self.process is not None and self._due == 0.0:
            self._due = time.monotonic() + RESTART_SECONDS
        if not self.wanted or time.monotonic() < self._due:
            return
        self._due = 0.0
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.surroundings},
                start_new_session=True,
            )  # fmt: skip

    def tree(self) -> list[int]:
        """Return its processes, itself first."""
        return [] if self.process is None else proc.tree(self.process.pid)

    def part(self, *words: str) -> list[int]:
        """Return those of its processes in whose command one of the words stands."""
        return [pid for pid in self.tree() if any(w in proc.command_line(pid) for w in words)]

    def send(self, number: int, processes: list[int] | None = None) -> int:
        """Send a signal to all its processes, or to some; return to how many."""
        return proc.send(self.tree() if processes is None else processes, number)

    def limit_files(self, size: int) -> None:
        """Let its processes write no file beyond `size`: for 0 its disk is full."""
        for pid in self.tree():
            with suppress(OSError):
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))

    def stop(self) -> None:
        """End it for good, with everything that it started."""
        self.wanted = False
        found = self.tree()
        self.send(signal.SIGCONT, found)
        self.send(signal.SIGTERM, found[:1])
        with suppress(subprocess.TimeoutExpired):
            if self.process is not None:
                self.process.wait(20)
        self.send(signal.SIGKILL, found)
        if self.process is not None:
            self.process.wait(20)


@dataclass
class Federation:
    """A coordinator behind nginx, and devices behind wires.

    Args:
        folder: New; holds keys, states and logs.
        devices: How many.
        seed: Devices rehearse with it, and wires are damaged by it.
        in_memory: Whether the SuperLink keeps nothing on the disk: killed, it has forgotten the
            run, and admits all devices anew.
    """

    folder: Path
    devices: int
    seed: int
    in_memory: bool = False
    parties: dict[str, Party] = field(default_factory=dict)
    wires: list[Wire] = field(default_factory=list)
    nginx: bool = True
    _numbers: dict[str, int] = field(default_factory=dict)

    def start(self, seconds: float = 240.0) -> None:
        """Make all keys, start all parties, and wait until all devices are online.

        Raises:
            RuntimeError: It took too long, or nginx is not there.
        """
        if shutil.which("nginx") is None and self.nginx:
            raise RuntimeError(INSTALL_NGINX)
        subprocess.run(
            deploy_command("certs", "--out", self.pki, "--count", self.devices),
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.port, self.public = free_port(), free_port()
        self._add(
            "superlink",
            *("superlink", *self.coordinator, "--public-port", self.public),
            *(["--in-memory"] if self.in_memory else []),
        )
        self.parties["superlink"].keep_up()
        self._wait((self.state / "nginx.conf").exists, seconds)
        door = self.port
        if self.nginx:
            door = self.public
            self.parties["nginx"] = Party(
                "nginx",
                [
                    str(shutil.which("nginx")),
                    *("-p", str(self.state), "-c", "nginx.conf", "-g", "daemon off;"),
                ],
                self.folder / "nginx.log",
            )
        for number in range(self.devices):
            wire = Wire(door, self.seed + number)
            self.wires.append(wire)
            self._add(f"node-{number}", *self.node(number, wire.port))
        deadline = time.monotonic() + seconds
        while self.online() < self.devices:
            if time.monotonic() > deadline:
                msg = f"{self.online()} of {self.devices} devices are online: see {self.folder}"
                raise RuntimeError(msg)
            self.settle(2.0)

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    @property
    def state(self) -> Path:
        return self.folder / "coordinator"

    @property
    def coordinator(self) -> tuple[object, ...]:
        return ("--keys", self.pki / "coordinator", "--state", self.state, "--port", self.port)

    def node(self, number: int, port: int, keys: Path | None = None) -> tuple[object, ...]:
        """Return the arguments of a device's command."""
        digits = len(str(self.devices))
        own = keys or self.pki / f"device-{number + 1:0{digits}}"
        return (
            *("node", "--keys", own, "--state", self.folder / f"state-{own.parent.name}-{number}"),
            *("--superlink", f"localhost:{port}", "--partition", number),
            *("--rehearse", self.seed),
        )

    def node_state(self, number: int) -> Path:
        """Return the folder that a device keeps."""
        return self.folder / f"state-{self.pki.name}-{number}"

    def online(self) -> int:
        """Return how many devices the SuperLink has, 0 if it does not answer."""
        done = subprocess.run(
            deploy_command("status", *self.coordinator),
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        first = done.stdout.partition(" ")[0]
        return int(first) if first.isdecimal() else 0

    def numbers(self) -> dict[str, int]:
        """Return the number of each device by every node id that a SuperLink ever gave it."""
        with suppress(OSError, ValueError):  # it is just being written
            admitted = json.loads((self.state / "admitted.json").read_text())
            for node_id, name in admitted.items():
                self._numbers[node_id] = int(name.rpartition("-")[2]) - 1
        return self._numbers

    def keep_up(self) -> None:
        """Start whatever ended."""
        self.numbers()
        for party in self.parties.values():
            party.keep_up()

    def settle(self, seconds: float) -> None:
        """Keep all up for some time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.keep_up()
            time.sleep(0.2)

    def stop(self) -> None:
        """End everything."""
        for party in reversed(self.parties.values()):
            party.stop()
        for wire in self.wires:
            wire.close()

    def _add(self, name: str, *arguments: object) -> None:
        self.parties[name] = Party(name, deploy_command(*arguments), self.folder / f"{name}.log")

    def _wait(self, ready: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                msg = f"not ready after {seconds:g} s: see {self.folder}"
                raise RuntimeError(msg)
            self.settle(0.5)


@dataclass
class Run:
    """A submitted run, whose command is kept up until it ends with all rounds.

    Attributes:
        federation: Where it runs.
        output: Its folder.
        overrides: Of the job.
        giving_up: Ends with status 1 after which it is not taken up again.
    """

    federation: Federation
    output: Path
    overrides: Sequence[str]
    giving_up: int = 6
    ended: int | None = None
    failures: int = 0
    party: Party | None = None

    def keep_up(self) -> None:
        """Start the command, and take the run up again whenever it ended early."""
        if self.party is None:
            self._begin(
                *("--out", self.output, "--rehearse", "--restarts", 20),
                *self.overrides,
            )
            return
        process = self.party.process
        if process is None or process.poll() is None or self.ended is not None:
            return
        if process.returncode == 0:
            self.ended = 0
            return
        if process.returncode > 0:
            self.failures += 1
        if self.failures > self.giving_up or not (self.output / "job.json").exists():
            self.ended = process.returncode
            return
        time.sleep(RESTART_SECONDS)
        self._begin("--resume", self.output, "--restarts", 20)

    def _begin(self, *arguments: object) -> None:
        self.party = Party(
            "submit",
            deploy_command(
                *("submit", *self.federation.coordinator),
                *arguments,
                module="tests.chaos.submitting",
            ),
            self.federation.folder / f"submit-{self.output.name}.log",
            {"OMP_NUM_THREADS": "1"},
        )
        self.party.keep_up()

    def stop(self) -> None:
        """End the command."""
        if self.party is not None:
            self.party.stop()

    def order(self, number: int, stage: str, node: int, do: str) -> None:
        """Have the traced ServerApp do something to an exchange of a round."""
        ids = [label for label, found in self.federation.numbers().items() if found == node]
        line = {"round": number, "stage": stage, "names": [str(node), *ids], "do": do}
        with (self.output / "orders.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass
class Tail:
    """New whole lines of a file that grows."""

    path: Path
    _offset: int = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data.rpartition(b"\n")[0]
        self._offset += len(whole) + bool(whole)
        for line in whole.split(b"\n"):
            with suppress(ValueError):
                yield json.loads(line)
