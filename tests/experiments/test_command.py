"""What every command does before it does its work."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["account", "attack", "train"])
def test_a_command_in_a_process_of_its_own_resolves_what_conf_calls(command):
    done = subprocess.run(
        [
            *(sys.executable, "-m", f"experiments.{command}", "--cfg", "job", "--resolve"),
            *("privacy=distributed_gaussian", "privacy.epsilon=4"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "noise_multiplier: null" in done.stdout
