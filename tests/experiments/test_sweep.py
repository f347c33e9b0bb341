"""A sweep draws accuracy against bytes, and goes on where it was stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import compare
from experiments.plots_pareto import accuracy_over_uploads, best_for_their_size
from experiments.schema import to_experiment
from experiments.training import simulated_devices
from fedcore.engine import run_in_process
from fedcore.job import check
from strategies.checkpoints import CheckpointFolder
from strategies.server_app import build_server_app
from strategies.surroundings import coordinator_entropy

ROOT = Path(__file__).parents[2]


def sweep(folder, *overrides):
    """Return what three small runs of `experiment=pareto` print."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.train", "--multirun", "experiment=pareto"),
            *("rounds=2", "clients=6", "clients_per_round=6", "scheme=float32,sketch"),
            *("sweep.support=0.1", "sweep.bits=10,12", f"output={folder}/${{sweep.run}}"),
            *overrides,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep(folder)


def test_every_scheme_is_trained_and_compared_by_its_bytes(swept, monkeypatch, capsys):
    folder, printed = swept
    assert printed.count("test accuracy") == 3
    assert printed.count("was finished by an earlier sweep") == 1  # float32 has no bits
    runs, unfinished = compare.compare([folder])
    assert not unfinished
    assert {run.name: run.scheme for run in runs} == {
        "float32/all": "float32",
        "sketch/0.1_10_bits": "sketch",
        "sketch/0.1_12_bits": "sketch",
    }
    sizes = {run.name: run.uplink_bytes for run in runs}
    assert sizes["sketch/0.1_10_bits"] < sizes["sketch/0.1_12_bits"] < sizes["float32/all"] / 20
    monkeypatch.setattr("sys.argv", ["compare", str(folder)])
    compare.main()
    assert "comparison_bytes.png" in capsys.readouterr().out
    assert (folder / "comparison_bytes.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "comparison.png").exists()
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {"comparison.md", "comparison_bytes.png"}  # nothing of Hydra's


def test_a_sweep_repeats_what_was_interrupted_and_nothing_else(swept):
    folder, _ = swept
    before = {path: path.read_bytes() for path in sorted(folder.rglob("metrics.jsonl"))}
    times = {path: path.stat().st_mtime_ns for path in before}
    stopped = folder / "sketch" / "0.1_12_bits"
    summary = json.loads((stopped / "summary.json").read_text())
    (stopped / "summary.json").write_text(json.dumps({**summary, "stopped": "interrupted"}))
    (stopped / "metrics.jsonl").write_text("")
    printed = sweep(folder)
    assert printed.count("was finished by an earlier sweep") == 3
    assert printed.count("test accuracy") == 1
    for path in before:
        assert (path.stat().st_mtime_ns == times[path]) == (path.parent != stopped)
    again = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in before[stopped / "metrics.jsonl"].decode().splitlines()]
    assert [line | {"seconds": 0} for line in again] == [line | {"seconds": 0} for line in first]


def test_a_sweep_goes_on_with_a_run_that_has_a_checkpoint(swept):
    folder, _ = swept
    stopped = folder / "sketch" / "0.1_10_bits"
    summary = json.loads((stopped / "summary.json").read_text())
    first = (stopped / "metrics.jsonl").read_text()
    cfg = OmegaConf.load(stopped / ".hydra" / "config.yaml")
    cfg.output = str(stopped)
    job = to_experiment(cfg).job
    checkpoints = CheckpointFolder(stopped / "checkpoint", repeatable=True)
    run_in_process(
        build_server_app(
            None, check(job), entropy=coordinator_entropy(job.seed), checkpoints=checkpoints
        ),
        simulated_devices(job, signed=False),
        num_nodes=job.clients,
        run_config={"job": job.to_json()},
    )
    latest = max((stopped / "checkpoint").glob("*.checkpoint"))
    latest.unlink()  # as if it had been stopped in the last round
    (stopped / "summary.json").write_text(json.dumps({**summary, "stopped": "failed"}))
    marker = stopped / "marker"
    marker.touch()
    printed = sweep(folder)
    assert printed.count("was finished by an earlier sweep") == 3
    assert marker.exists()  # the folder was not begun anew
    again = [json.loads(line) | {"seconds": 0} for line in first.splitlines()]
    assert [
        json.loads(line) | {"seconds": 0}
        for line in (stopped / "metrics.jsonl").read_text().splitlines()
    ] == again
    assert not (stopped / "checkpoint").exists()


def test_a_folder_of_another_configuration_is_not_touched(swept, tmp_path):
    folder, _ = swept
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.train", "experiment=pareto", "rounds=3"),
            *("clients=6", "clients_per_round=6", "scheme=sketch", "sweep.support=0.1"),
            *("sweep.bits=10", "hydra.mode=MULTIRUN", f"output={folder}/sketch/0.1_10_bits"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "output must be a new or empty folder" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files


def test_the_best_runs_are_those_that_no_smaller_one_equals():
    points = [(10.0, 0.9), (5.0, 0.8), (7.0, 0.8), (20.0, 0.85), (30.0, 0.95), (5.0, 0.7)]
    assert best_for_their_size(points) == [(5.0, 0.8), (10.0, 0.9), (30.0, 0.95)]


def test_a_comparison_without_a_reference_is_drawn_too():
    assert accuracy_over_uploads([("sketch", 100.0, 0.9)]).startswith(b"\x89PNG")
