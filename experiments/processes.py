"""Flower's processes of one machine: how they are called, started and stopped together.

    coordinator    flower-superlink, and flower-superexec that starts ServerApps
    device         flower-supernode, and flower-superexec that starts ClientApps

`--isolation process` keeps the two of a machine apart, with a secret file between them:
in Flower's default, whoever reaches the port may fetch a task and the model with it. The
SuperLink's one port carries three APIs, and its control API starts any code on every
device without asking who calls. So it listens on loopback only; a reverse proxy passes on
`/v1/fleet/`, which asks for a SuperNode's key, and nothing else (`proxy_configuration`).

Nothing here reports home, looks for updates or installs packages.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

from experiments import certificates
from experiments.parties import NODE_KEY, CoordinatorKeys, DeviceKeys
from fedcore.crypto import Entropy
from fedcore.errors import ConfigurationError, FedcoreError
from fedcore.keyfiles import SECRET_MODE, create, read_file

LOOPBACK: Final = "127.0.0.1"
SECRET: Final = "superexec.secret"  # noqa: S105 - the name of a file
READY_SECONDS: Final = 180.0
"""For the slowest board: importing Flower takes a second on a desktop."""
_POLL_SECONDS: Final = 0.2
_STOP_SECONDS: Final = 20.0
_TAIL_LINES: Final = 8
_PR_SET_PDEATHSIG: Final = 1
_GAVE_UP: Final = b"SSL/TLS handshake error detected."
_WARM: Final = Path(__file__).parent / "warm_superexec.py"
"""Called by its path: what it forks must not have this repository on its path."""
_TEMPLATES: Final = Path(__file__).parent / "templates"


class EndedError(FedcoreError):
    """A process ended that should go on."""


@dataclass(frozen=True, slots=True)
class Coordinator:
    """What the coordinator's processes are started with.

    Attributes:
        keys: Its folder of `experiments.parties`.
        state: Folder for the database, the logs and the secret.
        port: Of the SuperLink, on loopback.
    """

    keys: CoordinatorKeys
    state: Path
    port: int

    def commands(self) -> dict[str, list[str]]:
        """Return the command of each process, by the name of its log."""
        folder, secret = self.keys.folder, str(self.state / SECRET)
        return {
            "superlink": [
                program("flower-superlink"),
                *("--ssl-ca-certfile", str(folder / certificates.CA)),
                *("--ssl-certfile", str(folder / certificates.SERVER)),
                *("--ssl-keyfile", str(folder / certificates.SERVER_KEY)),
                "--enable-supernode-auth",
                *("--isolation", "process", "--superexec-auth-secret-file", secret),
                *("--database", str(self.state / "state.db")),
                *("--host", LOOPBACK, "--port", str(self.port)),
                "--disable-runtime-dependency-installation",
            ],
            "superexec": [
                program("flower-superexec"),
                *("--runtime-api-address", f"{LOOPBACK}:{self.port}"),
                *("--root-certificates", str(folder / certificates.CA)),
                *("--superexec-auth-secret-file", secret, "--parent-pid", str(os.getpid())),
            ],
        }


@dataclass(frozen=True, slots=True)
class Board:
    """What a device's processes are started with.

    Attributes:
        keys: Its folder of `experiments.parties`.
        state: Folder for the node configuration, the journal, the logs and the secret.
        superlink: Host and port of the coordinator.
        port: Of the SuperNode's own API, on loopback; one for each node of a machine.
    """

    keys: DeviceKeys
    state: Path
    superlink: str
    port: int

    def commands(self) -> dict[str, list[str]]:
        """Return the command of each process, by the name of its log."""
        secret = str(self.state / SECRET)
        return {
            "supernode": [
                program("flower-supernode"),
                *("--root-certificates", str(self.keys.folder / certificates.CA)),
                *("--superlink", self.superlink),
                *("--auth-supernode-private-key", str(self.keys.folder / NODE_KEY)),
                *("--node-config", str(self.state / "node.toml")),
                *("--isolation", "process", "--superexec-auth-secret-file", secret),
                *("--host", LOOPBACK, "--port", str(self.port)),
            ],
            "superexec": [
                *(sys.executable, str(_WARM)),
                *("--runtime-api-address", f"{LOOPBACK}:{self.port}", "--insecure"),
                *("--superexec-auth-secret-file", secret, "--parent-pid", str(os.getpid())),
            ],
        }


def program(name: str) -> str:
    """Return the path of one of Flower's commands: the one beside this Python.

    Raises:
        ConfigurationError: It is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        msg = f'{name} is not installed beside {sys.executable}: pip install "fedcore[train]"'
        raise ConfigurationError(msg)
    return str(path)


def environment(state: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: its own home, and nothing sent home."""
    here = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONUNBUFFERED": "1",
    }


def prepare(state: Path, entropy: Entropy) -> None:
    """Make the folder of a machine's state, and the secret between its two processes."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (state / SECRET).exists():
        read_file(state / SECRET, secret=True)
    else:
        create({state / SECRET: (entropy.draw("superexec", 32), SECRET_MODE)})


def toml(settings: Mapping[str, str | float | bool]) -> str:
    """Return flat settings as TOML, which Flower reads from a file.

    Raises:
        ConfigurationError: A text has control characters.
    """
    lines = []
    for key, value in settings.items():
        if isinstance(value, str):
            if not value.isprintable():
                msg = f"{key} must be printable text: choose another path"
                raise ConfigurationError(msg)
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'{key} = "{escaped}"')
        else:
            lines.append(f"{key} = {str(value).lower()}")
    return "\n".join([*lines, ""])


def proxy_configuration(coordinator: Coordinator, public_port: int) -> str:
    """Return a configuration for nginx that lets devices, and nothing else, through.

    Raises:
        ConfigurationError: A path cannot be written into it.
    """
    folder = str(coordinator.keys.folder)
    if not folder.isprintable() or any(character in folder for character in "\"'\\;{}$ "):
        msg = f"the folder of the keys must have a plain path for nginx, got {folder!r}"
        raise ConfigurationError(msg)
    text = (_TEMPLATES / "nginx.conf").read_text(encoding="utf-8")
    values = {"KEYS": folder, "PORT": str(coordinator.port), "PUBLIC": str(public_port)}
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def unit(role: str, arguments: Sequence[str]) -> str:
    """Return a systemd unit that starts `python -m experiments.deploy` with `arguments`.

    Raises:
        ConfigurationError: An argument cannot be written into it.
    """
    command = [sys.executable, "-m", "experiments.deploy", *arguments]
    root = str(Path(__file__).parents[1])
    if any(not part.isprintable() or set(part) & set(" \"'\\%$;") for part in (root, *command)):
        msg = "a systemd unit needs plain paths, without blanks, quotes, %, $, ; or backslashes"
        raise ConfigurationError(msg)
    text = (_TEMPLATES / "unit.service").read_text(encoding="utf-8")
    for name, value in {"ROLE": role, "FOLDER": root, "COMMAND": " ".join(command)}.items():
        text = text.replace(f"@{name}@", value)
    return text.rstrip()


@contextmanager
def started(
    commands: Mapping[str, Sequence[str]], state: Path
) -> Iterator[Mapping[str, subprocess.Popen[bytes]]]:
    """Start processes whose output goes to STATE/NAME.log; stop all of them in the end."""
    with ExitStack() as stack:
        processes: dict[str, subprocess.Popen[bytes]] = {}
        for name, command in commands.items():
            log = stack.enter_context((state / f"{name}.log").open("ab"))
            processes[name] = subprocess.Popen(  # noqa: S603 - our own command lines
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment(state),
                start_new_session=True,  # so that `_stop` reaches what it starts itself
                preexec_fn=_ends_with_its_parent,  # noqa: PLW1509 - no thread, one system call
            )
            stack.callback(_stop, processes[name])
        yield processes


def _prctl() -> Callable[[], object]:
    """Return what has a new process asked to end when its parent dies, on Linux."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    call = ctypes.CDLL(None).prctl
    return partial(call, _PR_SET_PDEATHSIG, signal.SIGTERM.value)


_ends_with_its_parent: Final = _prctl()
"""Who is killed cannot stop what it started: a SuperLink would go on, and keep its port."""


def wait_until(
    ready: Callable[[], bool], processes: Mapping[str, subprocess.Popen[bytes]], state: Path
) -> None:
    """Return as soon as `ready` says so.

    Raises:
        EndedError: A process ended before, or it took too long.
    """
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        check_alive(processes, state)
        if time.monotonic() > deadline:
            msg = f"not ready after {READY_SECONDS:g} s: see the logs in {state}"
            raise EndedError(msg)
        time.sleep(_POLL_SECONDS)


def check_alive(processes: Mapping[str, subprocess.Popen[bytes]], state: Path) -> None:
    """Raise an error with the end of its log if a process has ended.

    Raises:
        EndedError: One has.
    """
    for name, process in processes.items():
        if (status := process.poll()) is not None:
            msg = f"{name} ended with status {status}: {tail(state / f'{name}.log')}"
            raise EndedError(msg)


def tail(log: Path) -> str:
    """Return the last lines of a log as one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return " / ".join(said[-_TAIL_LINES:]) or "it said nothing"


def gave_up(log: Path) -> Callable[[], bool]:
    """Return what tells whether the SuperNode that writes this log works no more.

    A connection that breaks off while TLS begins is a wrong certificate to Flower 1.41: the
    SuperNode's loop ends, and its process stays.
    """
    read = 0

    def found() -> bool:
        nonlocal read
        with log.open("rb") as file:
            file.seek(max(0, read - len(_GAVE_UP)))
            data = file.read()
            read = file.tell()
        return _GAVE_UP in data

    return found


def wait_forever(
    processes: Mapping[str, subprocess.Popen[bytes]],
    state: Path,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Return when this process is asked to stop, by SIGINT or SIGTERM.

    Args:
        processes: That must go on.
        state: Of their logs.
        check: Called again and again; raises what is wrong.

    Raises:
        EndedError: A process ended by itself.
    """
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        del number, frame
        asked = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not asked:
            check_alive(processes, state)
            check()
            time.sleep(_POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answers(port: int, authority: Path) -> bool:
    """Return whether something with our certificate answers on loopback."""
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection(LOOPBACK, port, timeout=5, context=context)
    try:
        connection.request("GET", "/v1/fleet/")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and end what it leaves behind: apps wait for a SuperLink forever."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
