"""A process that is killed at any moment, and the command that goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import recorder
from tests.experiments.commands import rounds_of, run, summary_of

ROOT = Path(__file__).parents[2]
ROUNDS = 20
SMALL = [
    *("clients=6", "clients_per_round=5", f"rounds={ROUNDS}", "dropout=0.34", "faults=drop"),
    *("sparsify=random_k", "sparsify.unbiased=false", "error_feedback=true"),
    *("strategy=fedavgm", "downlink=delta"),
]
PRIVATE = [
    *("clients=6", "clients_per_round=6", f"rounds={ROUNDS}", "dropout=0.34"),
    *("privacy=distributed_gaussian", "weighting=uniform", "quantize.bits=16", "clip.norm=0.5"),
    *("strategy=fedadam", "engine.workers=2"),
]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_after(process, folder, rounds, seconds):
    """Kill the process `seconds` after `rounds` rounds more than there were; tell if it lived."""
    checkpoints = folder / "checkpoint"
    before, deadline = newest(checkpoints), time.monotonic() + 120
    while process.poll() is None and newest(checkpoints) < before + rounds:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode in {0, -signal.SIGKILL}, error
    return process.returncode != 0


def newest(checkpoints):
    """The last round that is over, -1 before the first checkpoint."""
    names = [int(path.stem) for path in checkpoints.glob("*.checkpoint")]
    return max(names, default=-1)


def lines_of(folder):
    return [line | {"seconds": 0} for line in rounds_of(folder)]


def check_run(arguments, folder, kills, seed):
    """Run a job whole, and again with `kills` kills at random moments; compare."""
    rng = random.Random(seed)
    whole, broken = folder / "whole", folder / "broken"
    with start(*arguments, f"output={whole}") as process:
        assert process.wait() == 0
    command = (*arguments, f"output={broken}")
    for _ in range(kills):
        with start(*command) as process:
            if not killed_after(process, broken, rng.randint(1, 5), rng.uniform(0, 0.2)):
                break
        assert not (broken / "summary.json").exists()
        command = ("--resume", str(broken))
    else:
        with start(*command) as process:
            _, error = process.communicate()
            assert process.returncode == 0, error
    model = Path("model", "1", "model.onnx")
    assert (broken / model).read_bytes() == (whole / model).read_bytes()
    assert (broken / "ledger.json").read_bytes() == (whole / "ledger.json").read_bytes()
    assert lines_of(broken) == lines_of(whole)
    assert not (broken / "checkpoint").exists()
    times = {"seconds_total", "clients_per_second", "peak_memory_mb", "release"}
    one, other = summary_of(whole), summary_of(broken)
    assert {k: v for k, v in one.items() if k not in times} == {
        k: v for k, v in other.items() if k not in times
    }
    seconds = [line["seconds"] for line in rounds_of(broken)]
    assert seconds == sorted(seconds)


def test_a_run_that_is_killed_ends_with_the_same_model_ledger_and_metrics(tmp_path):
    check_run([*SMALL, "rounds=8"], tmp_path, kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [SMALL, PRIVATE], ids=["feedback", "private"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_run_that_is_killed_again_and_again_ends_the_same(arguments, seed, tmp_path):
    check_run(arguments, tmp_path, kills=5, seed=seed)


def test_what_cannot_be_resumed_is_one_line(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    job = ["clients=6", "clients_per_round=6", "rounds=1", "release=none", f"output={folder}"]
    for arguments, message in (
        (["--resume", str(folder)], "name the folder of a run that was stopped"),
        (["--resume", str(folder), "rounds=3"], "the folder of a run and nothing else"),
        (["--resume"], "the folder of a run and nothing else"),
    ):
        assert run("train", *arguments, monkeypatch=monkeypatch) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert run("train", *job, monkeypatch=monkeypatch) == 0
    assert run("train", "--resume", str(folder), monkeypatch=monkeypatch) == 2
    assert "was finished: start another run" in capsys.readouterr().err
    (folder / "summary.json").unlink()
    (folder / ".hydra" / "config.yaml").write_text("- no: run\n")
    assert run("train", "--resume", str(folder), monkeypatch=monkeypatch) == 2
    assert "found a list" in capsys.readouterr().err


def test_a_run_that_was_moved_or_changed_meanwhile_goes_on_or_is_refused(
    tmp_path, monkeypatch, capsys
):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    command = ("clients=6", "clients_per_round=6", "rounds=8", "release=none")
    with start(*command, f"output={folder}") as process:
        assert killed_after(process, folder, 3, 0)
    folder.rename(moved)
    configuration = moved / ".hydra" / "config.yaml"
    text = configuration.read_text()
    configuration.write_text(text.replace("seed: 0", "seed: 1"))
    assert run("train", "--resume", str(moved), monkeypatch=monkeypatch) == 2
    assert "belongs to another job" in capsys.readouterr().err
    configuration.write_text(text)
    assert run("train", "--resume", str(moved), monkeypatch=monkeypatch) == 0
    assert summary_of(moved)["completed_rounds"] == 8
    assert not folder.exists()


def test_an_error_in_the_middle_leaves_a_run_that_can_go_on(tmp_path, monkeypatch, capsys):
    folder, told = tmp_path / "run", recorder.Recorder.round_finished
    job = ["clients=6", "clients_per_round=6", "rounds=3", "release=none", f"output={folder}"]

    def failing(self, progress):
        told(self, progress)
        if progress.report.round_number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "round_finished", failing)
        assert run("train", *job, monkeypatch=patch) == 130
    assert summary_of(folder)["stopped"] == "interrupted"
    assert run("train", "--resume", str(folder), monkeypatch=monkeypatch) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["completed_rounds"], summary["stopped"]) == (3, None)
    assert len(rounds_of(folder)) == 3
