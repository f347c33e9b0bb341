"""Flower's processes of one machine: how they are called, started and stopped together.

    coordinator    flower-superlink, and flower-superexec that starts ServerApps
    device         one process that forks two more (`experiments.edge`)

`--isolation process` keeps the two of a machine apart, with a secret file between them:
in Flower's default, whoever reaches the port may fetch a task and the model with it. The
SuperLink's one port carries three APIs, and its control API starts any code on every
device without asking who calls. So it listens on loopback only; a reverse proxy passes on
`/v1/fleet/`, which asks for a SuperNode's key, and nothing else (`proxy_configuration`).

Nothing here reports home, looks for updates or installs packages.
"""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, TypeAlias

from experiments import certificates
from experiments.edge.family import follow_parent
from experiments.edge.pace import Pace
from experiments.edge.settings import FILE as SETTINGS
from experiments.edge.settings import Settings
from experiments.parties import NODE_KEY, CoordinatorKeys, DeviceKeys
from fedcore.crypto import Entropy
from fedcore.durable import replace_file
from fedcore.errors import ConfigurationError, FedcoreError
from fedcore.keyfiles import SECRET_MODE, create, read_file
from fedcore.sealed import KEY_BYTES, Seal

LOOPBACK: Final = "127.0.0.1"
STATE_KEY: Final = "state.key"
SECRET: Final = "superexec.secret"  # noqa: S105 - the name of a file
READY_SECONDS: Final = 180.0
"""For the slowest board: importing Flower takes a second on a desktop."""
WARM_SECONDS: Final = 60.0
Setting: TypeAlias = str | int | float | bool
_POLL_SECONDS: Final = 0.2
_STOP_SECONDS: Final = 20.0
_TAIL_LINES: Final = 8
_EDGE: Final = Path(__file__).parent / "edge"
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
        database: Whether it keeps runs and nodes on the disk. Without, each question costs it a
            third, and it begins anew whenever it is started.
    """

    keys: CoordinatorKeys
    state: Path
    port: int
    database: bool = True

    def commands(self) -> dict[str, list[str]]:
        """Return the command of each process, by the name of its log."""
        folder, secret = self.keys.folder, str(self.state / SECRET)
        database = ("--database", str(self.state / "state.db")) if self.database else ()
        return {
            "superlink": [
                program("flower-superlink"),
                *("--ssl-ca-certfile", str(folder / certificates.CA)),
                *("--ssl-certfile", str(folder / certificates.SERVER)),
                *("--ssl-keyfile", str(folder / certificates.SERVER_KEY)),
                "--enable-supernode-auth",
                *("--isolation", "process", "--superexec-auth-secret-file", secret),
                *database,
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
        state: Folder for what a restart must not forget, and the logs.
        superlink: Host and port of the coordinator.
        state_key: File with the key that seals what is in `state`.
        pace: How often the coordinator is asked for work.
        warm_seconds: How long an app stays loaded after its last message.
    """

    keys: DeviceKeys
    state: Path
    superlink: str
    state_key: Path
    pace: Pace = field(default_factory=Pace)
    warm_seconds: float = WARM_SECONDS

    def settings(self, node_config: Mapping[str, Setting]) -> Settings:
        """Return what the processes read from STATE/board.json."""
        return Settings(
            superlink=self.superlink,
            authority=str(self.keys.folder / certificates.CA),
            node_key=str(self.keys.folder / NODE_KEY),
            state=str(self.state),
            state_key=str(self.state_key),
            node_config=node_config,
            pace=self.pace,
            warm_seconds=self.warm_seconds,
        )

    @property
    def command(self) -> list[str]:
        """The command of the first process; it starts the others."""
        return [sys.executable, str(_EDGE), str(self.state / SETTINGS)]


def board_environment(state: Path) -> dict[str, str]:
    """Return the environment of a board's processes, in which memory goes back to the system."""
    return {
        **environment(state),
        # glibc keeps an arena a thread, and what was freed: megabytes on a board.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "MALLOC_MMAP_THRESHOLD_": "131072",
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


def prepare_board(board: Board, settings: Settings, entropy: Entropy) -> None:
    """Make the folder of a device's state, the key that seals it, and what processes read.

    Raises:
        ConfigurationError: Others may read the key, or a file cannot be written.
    """
    board.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not board.state_key.exists():
        key = entropy.draw("state-key", KEY_BYTES)
        create({board.state_key: (key, SECRET_MODE)})
    Seal(read_file(board.state_key, secret=True))
    replace_file(board.state / SETTINGS, settings.to_json().encode("utf-8"))


def become(board: Board) -> NoReturn:
    """Replace this process by the board's first one."""
    sys.stdout.flush()
    os.execve(board.command[0], board.command, board_environment(board.state))  # noqa: S606


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
                # Who is killed cannot stop what it started: a SuperLink would keep its port.
                preexec_fn=partial(follow_parent, signal.SIGTERM),  # noqa: PLW1509 - no thread
            )
            stack.callback(_stop, processes[name])
        yield processes


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


def wait_forever(processes: Mapping[str, subprocess.Popen[bytes]], state: Path) -> None:
    """Return when this process is asked to stop, by SIGINT or SIGTERM.

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
