"""What is asked of a SuperLink: to admit devices, to start a run, to say how runs are.

Flower runs what an app bundle holds: the four packages of this repository, and a
pyproject.toml that names the two apps. Devices run that code, whoever they trust; what
they demand of it stays theirs (`clients.deployed`).

How a run is followed to its end is in `experiments.following`; here is what it asks of a
SuperLink, by Flower's own command line.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from experiments import certificates
from experiments.following import CHECKPOINT, UnreachableError
from experiments.processes import LOOPBACK, Coordinator, answers, environment, program, toml
from fedcore.errors import ConfigurationError

CONNECTION: Final = "deployment"
PACKAGES: Final = ("fedcore", "clients", "strategies", "experiments")
_ROOT: Final = Path(__file__).parents[1]
_ANSWER_SECONDS: Final = 120.0
"""After which a SuperLink that took a question counts as away."""
_UNAVAILABLE: Final = "Connection to the SuperLink is unavailable"
"""What Flower's commands say then."""
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
checkpoint = ""
"""


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
        return {
            "job": self.job,
            "output": str(self.output),
            "rehearsal": self.rehearsal,
            "checkpoint": str(self.output / CHECKPOINT),
        }


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
        UnreachableError: The SuperLink does not answer.
        ConfigurationError: It refuses.
    """
    write_connection(coordinator)
    try:
        done = subprocess.run(  # noqa: S603 - our own command line
            [program("flwr"), *arguments, "--format", "json"],
            env=environment(coordinator.state),
            capture_output=True,
            text=True,
            check=False,
            timeout=_ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"flwr {' '.join(arguments[:2])} had no answer in {_ANSWER_SECONDS:g} s"
        raise UnreachableError(msg) from error
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
        # It may be back by now: what the question met counts as well.
        there = answers(coordinator.port, coordinator.keys.folder / certificates.CA)
        if _UNAVAILABLE in str(said) or not there:
            raise UnreachableError(msg)
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


def forget_admitted(coordinator: Coordinator) -> None:
    """Have all devices admitted again: a SuperLink in memory begins without any."""
    (coordinator.state / "admitted.json").unlink(missing_ok=True)


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


@dataclass(frozen=True, slots=True)
class FlowerLink:
    """A run's SuperLink, asked by Flower's command line.

    Attributes:
        coordinator: Whose SuperLink.
        submission: What is started.
    """

    coordinator: Coordinator
    submission: Submission

    def start(self) -> str:
        """Send the app and the job; return the id of the run."""
        bundle = self.coordinator.state / "bundle"
        write_bundle(bundle)
        settings = self.submission.output / "run-config.toml"
        settings.write_text(toml(self.submission.settings()), encoding="utf-8")
        answer = flwr(
            self.coordinator, "run", str(bundle), CONNECTION, "--run-config", str(settings)
        )
        return str(answer["run-id"])

    def stop(self, run_id: str) -> None:
        """Stop a run."""
        flwr(self.coordinator, "stop", run_id, CONNECTION)

    def statuses(self) -> dict[str, tuple[str, str]]:
        """Return status and details of every run, by id, the newest first."""
        return {
            str(run["run-id"]): (str(run.get("status", "")), str(run.get("status-details") or ""))
            for run in runs(self.coordinator)
        }
