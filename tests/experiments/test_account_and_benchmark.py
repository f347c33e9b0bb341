"""The commands beside training."""

import json

import pytest

from experiments import bench_secagg
from experiments.benchmark import _suite, table
from tests.experiments.commands import run


def test_account_prints_the_epsilon_that_a_run_would_spend(tmp_path, monkeypatch, capsys):
    arguments = ["experiment=quickstart", f"output={tmp_path}"]
    assert run("account", *arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["60", "20.465"] in lines  # after 60 rounds
    assert ["2", "20.465"] in lines  # with a noise multiplier of 2
    assert (tmp_path / "epsilon.png").read_bytes().startswith(b"\x89PNG")


def test_account_of_a_run_without_noise_is_refused(tmp_path, monkeypatch, capsys):
    assert run("account", f"output={tmp_path / 'none'}", monkeypatch=monkeypatch) == 2
    assert "epsilon is infinite" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_more_noise_costs_less(tmp_path, monkeypatch, capsys):
    arguments = ["experiment=quickstart", "rounds=10", f"output={tmp_path}"]
    assert run("account", *arguments, monkeypatch=monkeypatch) == 0
    after = capsys.readouterr().out.partition("epsilon after")[2].splitlines()[1:10]
    costs = [float(line.split()[1]) for line in after]
    assert costs == sorted(costs, reverse=True)


def test_the_benchmark_keeps_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_secagg, "DIMS", (1000, 2000))
    arguments = ["suite=secagg", "nodes=10", "rounds=1", f"output={tmp_path}"]
    assert run("benchmark", *arguments, monkeypatch=monkeypatch) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["who"] for row in rows} == {"limit", "fedcore", "flower"}
    assert all(row["milliseconds"] > 0 for row in rows)
    assert str(tmp_path / "results.jsonl") in capsys.readouterr().out


def test_an_unknown_suite_is_refused(tmp_path, monkeypatch, capsys):
    assert run("benchmark", "suite=magic", f"output={tmp_path}", monkeypatch=monkeypatch) == 2
    assert "suite must be engine, workers or secagg" in capsys.readouterr().err


def test_a_table_aligns_its_columns():
    assert table([{"a": 1, "bb": "x"}, {"a": 100, "bb": "y"}]) == "  a  bb\n  1   x\n100   y"


@pytest.mark.parametrize("suite", ["engine", "workers", "secagg"])
def test_every_suite_exists(suite):
    assert callable(_suite(suite))
