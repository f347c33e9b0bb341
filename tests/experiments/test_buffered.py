"""Asynchronous runs from the command line, and the benchmark that compares them with rounds."""

import re
from dataclasses import replace

import pytest

from experiments import bench_buffered
from experiments.bench_buffered import Course, column, measure_buffered, summed_up
from experiments.plots_buffered import accuracy_over_time
from experiments.staleness import run_words
from fedcore.errors import ConfigurationError
from fedcore.models import Logistic
from fedcore.telemetry import BufferReport
from fedcore.training import LocalTraining
from tests.experiments.commands import rounds_of, run, summary_of

SMALL = ["experiment=buffered", "clients=16", "clients_per_round=4", "schedule.concurrency=8"]
FAST = ["model=logistic", "training.epochs=1", "rounds=4"]


@pytest.fixture(scope="module")
def buffered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "buffered"
    with pytest.MonkeyPatch.context() as patch:
        assert run("train", *SMALL, *FAST, f"output={folder}", monkeypatch=patch) == 0
    return folder


def test_files_say_of_every_buffer_how_old_its_updates_were(buffered):
    rounds = rounds_of(buffered)
    assert [entry["survivors"] for entry in rounds] == [4] * 4
    assert rounds[0]["buffer"]["staleness_max"] == 0
    oldest = max(entry["buffer"]["staleness_max"] for entry in rounds)
    assert oldest >= 1
    summary = summary_of(buffered)
    assert summary["buffer"]["staleness_max"] == oldest
    mean = sum(entry["buffer"]["staleness_mean"] for entry in rounds) / 4
    assert summary["buffer"]["staleness_mean"] == pytest.approx(mean, abs=1e-3)
    assert summary["buffer"].keys() == {"staleness_mean", "staleness_max", "dropped"}
    seconds = [entry["seconds"] for entry in rounds]
    assert seconds == sorted(seconds)
    assert summary["seconds_total"] == seconds[-1] > 30  # of the fleet


def test_the_report_has_a_column_for_the_age_of_updates(buffered):
    text = (buffered / "report.html").read_text()
    assert "Versions old: mean, most" in text
    shown = rounds_of(buffered)[1]["buffer"]
    cell = f"<td>{shown['staleness_mean']:.2f}, {shown['staleness_max']:d}</td>"
    assert cell in re.sub(r"\s*\n\s*", "", text)


def test_the_same_experiment_in_rounds_has_no_buffers(tmp_path, monkeypatch):
    folder = tmp_path / "rounds"
    overrides = ["experiment=buffered", "clients=6", "clients_per_round=4", "schedule=rounds"]
    assert run("train", *overrides, *FAST, f"output={folder}", monkeypatch=monkeypatch) == 0
    assert [entry["buffer"] for entry in rounds_of(folder)] == [None] * 4
    assert summary_of(folder)["buffer"] is None
    assert "Versions old" not in (folder / "report.html").read_text()


def test_a_combination_that_cannot_be_is_one_line(capsys, monkeypatch):
    assert (
        run("train", *SMALL, "error_feedback=true", "output=unused", monkeypatch=monkeypatch) == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "schedule=buffered: what error feedback puts aside" in error


def test_words_of_nothing_are_null():
    assert run_words([]) is None
    assert run_words([BufferReport(dropped=3)]) == {
        "staleness_mean": 0.0,
        "staleness_max": 0,
        "dropped": 3,
    }


def test_the_benchmark_has_a_row_for_each_schedule_and_a_picture(monkeypatch):
    monkeypatch.setattr(bench_buffered, "ACCURACIES", (0.15, 0.999))
    small = {"rounds": 2, "clients": 12, "clients_per_round": 4, "model": Logistic()}
    small["training"] = LocalTraining(epochs=1, learning_rate=0.3)
    chosen = {}
    for name in ("rounds, 10 train", "buffered, 30 train"):
        job = bench_buffered.SCHEDULES[name]
        schedule = job.schedule
        if name.startswith("buffered"):
            schedule = replace(schedule, concurrency=6)
        chosen[name] = replace(job, schedule=schedule, **small)
    monkeypatch.setattr(bench_buffered, "SCHEDULES", chosen)
    rows = measure_buffered()
    assert [row["schedule"] for row in rows] == list(chosen)
    for row in rows:
        assert row[column(0.999)] == "never"
        assert row["added"] == 8
    assert rows[0]["trained"] == 8 <= rows[1]["trained"]
    assert isinstance(rows[0][column(0.15)], int)
    assert bench_buffered.draw_buffered(rows).startswith(b"\x89PNG")


def test_an_accuracy_is_reached_with_the_first_test_as_good_in_every_run():
    one, two = (Course(points=[(5.0, 0.5), (9.0, best), (12.0, 0.9)]) for best in (0.94, 0.96))
    assert one.reached(0.93) == 9.0
    assert one.reached(0.95) is None
    row = summed_up("some", [two, two])
    assert row[column(0.95)] == row[column(0.93)] == 9
    assert summed_up("some", [one, two])[column(0.95)] == "never"


def test_a_benchmark_of_another_size_is_refused():
    with pytest.raises(ConfigurationError, match="size must be quick or full, got 'huge'"):
        measure_buffered("huge")


def test_a_picture_can_have_schedules_that_reached_nothing():
    picture = accuracy_over_time({"slow": [], "fast": [(60.0, 0.9), (120.0, 0.95)]})
    assert picture.startswith(b"\x89PNG")
