"""Running a command of `experiments` inside the test's own process."""

import json
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments import account, attack, benchmark, train
from experiments.command import run_command

MAINS = {
    "train": train.command,
    "account": account.main,
    "attack": attack.main,
    "benchmark": benchmark.main,
}


def run(command: str, *overrides: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the command's exit status."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [command, *overrides])
    try:
        run_command(MAINS[command])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def summary_of(folder: Path) -> dict[str, object]:
    """Return a run's summary."""
    return json.loads((folder / "summary.json").read_text())


def rounds_of(folder: Path) -> list[dict[str, object]]:
    """Return a run's rounds."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
