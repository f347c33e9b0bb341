"""Runs in bad weather on the in-process grid: nothing that must hold is broken."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.chaos.virtual import campaign

ROOT = Path(__file__).parents[2]


def test_nothing_is_broken_by_some_runs_of_random_faults(tmp_path):
    said = []
    found = campaign(48, 3, tmp_path, said.append)
    assert (found["broken"], said) == ([], [])
    assert found["rounds"] >= 48
    assert found["completed"] > found["rounds"] // 2
    done = Counter(found["faults"])
    assert done["lost request"]
    assert done["lost reply"]
    assert done["death of the coordinator"]
    assert done["replay"]


def test_the_command_says_how_it_went_in_one_summary():
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--rounds", "0", "--virtual", "12", "--seed", "1"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, _, summary = done.stdout.partition("{")
    assert "rounds completed" in told
    found = json.loads("{" + summary)
    assert (found["in_process_rounds"], found["real_rounds"], found["violations"]) == (12, 0, [])
