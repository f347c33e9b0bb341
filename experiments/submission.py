"""Starting a run on a SuperLink, and following it to its true end.

Flower runs what an app bundle holds: the four packages of this repository, and a
pyproject.toml that names the two apps. Devices run that code, whoever they trust; what
they demand of it stays theirs (`clients.deployed`).

`flwr run` ends with status 0 also when the ServerApp crashed. So the end of a run is what
two witnesses say together: the SuperLink's status, and the summary that the ServerApp
writes last (`experiments.deployed`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from experiments import certificates
from experiments.processes import LOOPBACK, Coordinator, environment, program, toml
from fedcore.errors import ConfigurationError, FedcoreError

CONNECTION: Final = "deployment"
PACKAGES: Final = ("fedcore", "clients", "strategies", "experiments")
_ROOT: Final = Path(__file__).parents[1]
_POLL_SECONDS: Final = 2.0
_ASK_EVERY: Final = 10
"""Looks at the run's files before the SuperLink is asked: each question starts a process."""
MANIFEST: Final = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "fedcore"
version = "0.1.0"
description = "Private federated learning."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedcore"

[tool.flwr.app.components]
serverapp = "experiments.deployed:app"
clientapp = "clients.deployed:app"

[tool.flwr.app.config]
job = ""
output = ""
rehearsal = false
noise-file = ""
"""


class RunFailedError(FedcoreError):
    """A run ended without all of its rounds."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What is run, and where its results go.

    Attributes:
        job: As canonical JSON.
        output: New folder of the results; absolute.
        rehearsal: Whether the coordinator's randomness follows from the job's seed too.
    """

    job: str
    output: Path
    rehearsal: bool

    def settings(self) -> dict[str, str | bool]:
        """Return the run configuration."""
        return {"job": self.job, "output": str(self.output), "rehearsal": self.rehearsal}


def write_connection(coordinator: Coordinator) -> None:
    """Tell Flower's command line, in a home of its own, where the SuperLink is."""
    home = coordinator.state / "flwr"
    home.mkdir(parents=True, exist_ok=True)
    where = toml(
        {
            "address": f"{LOOPBACK}:{coordinator.port}",
            "root-certificates": str(coordinator.keys.folder / certificates.CA),
        }
    )
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{where}'
    (home / "config.toml").write_text(text, encoding="utf-8")


def write_bundle(folder: Path, manifest: str = MANIFEST) -> None:
    """Write the app that is sent to ServerApp and devices into a new folder.

    Args:
        folder: New, or replaced.
        manifest: Names the two apps.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in PACKAGES:
        for path in (_ROOT / name).rglob("*.py"):
            target = folder / path.relative_to(_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (folder / "pyproject.toml").write_text(manifest, encoding="utf-8")


def flwr(coordinator: Coordinator, *arguments: str) -> dict[str, Any]:
    """Run a command of Flower's and return what it says as JSON.

    Raises:
        ConfigurationError: The SuperLink does not answer, or refuses.
    """
    write_connection(coordinator)
    done = subprocess.run(  # noqa: S603 - our own command line
        [program("flwr"), *arguments, "--format", "json"],
        env=environment(coordinator.state),
        capture_output=True,
        text=True,
        check=False,
    )
    start = done.stdout.find("{")
    try:
        answer = json.loads(done.stdout[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        answer = {}
    if done.returncode or not isinstance(answer, dict) or not answer.get("success"):
        said = answer.get("error-message") or (done.stderr or done.stdout).strip() or "nothing"
        msg = (
            f"flwr {' '.join(arguments[:2])} failed: {' '.join(str(said).split())[:400]} "
            "(is the SuperLink running, with this --state and --port?)"
        )
        raise ConfigurationError(msg)
    return answer


def admit(coordinator: Coordinator) -> list[str]:
    """Register the SuperNodes whose keys lie in the coordinator's folder; return the new ones.

    Raises:
        ConfigurationError: The SuperLink refuses a key.
    """
    file = coordinator.state / "admitted.json"
    admitted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    new = [name for name in coordinator.keys.admitted if name not in admitted.values()]
    for name in new:
        key = str(coordinator.keys.admitted[name])
        answer = flwr(coordinator, "supernode", "register", key, CONNECTION, "--name", name)
        admitted[str(answer["node-id"])] = name
        file.write_text(json.dumps(admitted, indent=1), encoding="utf-8")
    return new


def nodes(coordinator: Coordinator) -> list[tuple[str, str]]:
    """Return the name and status of each SuperNode that was admitted."""
    file = coordinator.state / "admitted.json"
    names = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    listed = flwr(coordinator, "supernode", "ls", CONNECTION).get("nodes", [])
    ids = [(str(node.get("node-id")), str(node.get("status"))) for node in listed]
    return sorted((names.get(node_id, node_id), status) for node_id, status in ids)


def runs(coordinator: Coordinator) -> list[dict[str, Any]]:
    """Return what the SuperLink knows of its runs, the newest first."""
    return list(flwr(coordinator, "ls", CONNECTION).get("runs", []))


def submit(
    coordinator: Coordinator, submission: Submission, say: Callable[[str], None]
) -> dict[str, Any]:
    """Start a run, tell of its rounds, and return its summary.

    Raises:
        ConfigurationError: It could not be started.
        RunFailedError: It ended without all of its rounds.
    """
    bundle = coordinator.state / "bundle"
    write_bundle(bundle)
    settings = submission.output / "run-config.toml"
    settings.write_text(toml(submission.settings()), encoding="utf-8")
    answer = flwr(coordinator, "run", str(bundle), CONNECTION, "--run-config", str(settings))
    run_id = str(answer["run-id"])
    say(f"run {run_id}: {submission.output}")
    try:
        return follow(coordinator, submission, run_id, say)
    except KeyboardInterrupt:
        flwr(coordinator, "stop", run_id, CONNECTION)
        raise


def follow(
    coordinator: Coordinator, submission: Submission, run_id: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Wait for the end of a run and return its summary.

    Raises:
        RunFailedError: It ended without all of its rounds.
    """
    told = 0
    while True:
        for _ in range(_ASK_EVERY):
            told = _tell(submission.output / "metrics.jsonl", told, say)
            if (submission.output / "summary.json").exists():
                break
            time.sleep(_POLL_SECONDS)
        run = next((run for run in runs(coordinator) if str(run["run-id"]) == run_id), {})
        status = str(run.get("status", "unknown"))
        if status.startswith("finished") or not run:
            return judge(submission.output, status, str(run.get("status-details", "")))
        time.sleep(_POLL_SECONDS)  # the ServerApp has written its summary and is about to end


def judge(output: Path, status: str, details: str = "") -> dict[str, Any]:
    """Return the summary of a run that finished; both witnesses must say so.

    Args:
        output: Its folder.
        status: What the SuperLink says.
        details: What it says beside.

    Raises:
        RunFailedError: One of them says otherwise.
    """
    try:
        summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    done, wanted = summary.get("completed_rounds", 0), summary.get("rounds", "all")
    stopped = summary.get("stopped")
    if status == "finished:completed" and done == wanted and not stopped:
        return dict(summary)
    why = stopped or details or "the ServerApp could not begin, see `flwr log`"
    msg = f"the run is {status} after {done} of {wanted} rounds: {why}"
    raise RunFailedError(msg)


def _tell(metrics: Path, told: int, say: Callable[[str], None]) -> int:
    """Say what is new in the metrics; return how many rounds are told now."""
    if not metrics.exists():
        return told
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be half a line
    for line in lines[told:]:
        say(describe_round(json.loads(line)))
    return len(lines)


def describe_round(line: Mapping[str, Any]) -> str:
    """Return a round as a person wants to read it."""
    accuracy = line["accuracy"]
    tested = "" if accuracy is None else f", accuracy {accuracy:.4f}"
    epsilon = line["epsilon"]
    spent = f"{epsilon:.3g}" if isinstance(epsilon, float) else epsilon
    aborted = f", aborted: {line['aborted'][-1]}" if line["aborted"] else ""
    return (
        f"round {line['round']}: {line['survivors']} of {line['invited']} devices{tested}, "
        f"epsilon {spent}, {line['seconds']:.0f} s{aborted}"
    )
