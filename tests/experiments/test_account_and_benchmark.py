"""The commands beside training."""

import io
import json
import sys

import pytest

from experiments import bench_secagg
from experiments.apart import Memory, apart
from experiments.bench_coordinator import Cohort
from experiments.benchmark import _suite, table
from fedcore.secagg import Threat, make_plan, run_round
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


def test_account_names_the_noise_that_a_target_needs(tmp_path, monkeypatch, capsys):
    arguments = ["experiment=quickstart", "privacy.epsilon=8", f"output={tmp_path}"]
    assert run("account", *arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "noise multiplier 4.0284 found for epsilon 8, 1.016 times the central" in printed
    assert ["60", "8.000"] in [line.split() for line in printed.splitlines()]
    assert ["12", "1.0161"] in [line.split() for line in printed.splitlines()]


def test_account_of_given_sizes_reads_no_data(tmp_path, monkeypatch, capsys):
    arguments = [
        "experiment=mnist_cnn", "data.path=nowhere.npz", "privacy=both_levels",
        "weighting=uniform", "privacy.device.delta=0.01", "sizes.parameters=1663370",
        "sizes.examples=600", f"output={tmp_path}",
    ]  # fmt: skip
    assert run("account", *arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "1,663,370 weights" in printed
    assert "one device: noise multiplier 2," in printed
    assert "one example: noise multiplier 1;" in printed
    assert "warning: privacy.delta=0.01 is not below 1/200" in printed


@pytest.mark.parametrize(
    "sizes", [["sizes.parameters=10"], ["sizes.parameters=0", "sizes.examples=1"]]
)
def test_sizes_that_are_no_sizes_are_refused(sizes, tmp_path, monkeypatch, capsys):
    arguments = ["experiment=quickstart", *sizes, f"output={tmp_path}"]
    assert run("account", *arguments, monkeypatch=monkeypatch) == 2
    assert "sizes." in capsys.readouterr().err


def test_a_target_that_does_not_fit_the_ring_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    arguments = ["experiment=quickstart", "privacy.epsilon=0.1", f"output={tmp_path / 'none'}"]
    assert run("account", *arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "raise quantize.bits to" in error
    assert not (tmp_path / "none").exists()


TINY = bench_secagg.Size(
    mask_dims=(1000, 2000),
    dims=(1000,),
    clients=(10,),
    lost=(0.0, 0.1),
    largest_dim=3000,
    flower_work=1e5,
    flower_rounds=((5, 1000, 0.2),),
)


@pytest.fixture
def beside(monkeypatch):
    """Measure in this process: starting others takes seconds."""

    def apart(function, *args):
        return function(*args)

    monkeypatch.setattr(bench_secagg, "apart", apart)
    monkeypatch.setattr(bench_secagg, "SIZES", {"quick": TINY})


@pytest.mark.usefixtures("beside")
def test_the_benchmark_keeps_its_rows_and_draws_them(tmp_path, monkeypatch, capsys):
    arguments = ["suite=secagg", "rounds=1", f"output={tmp_path}"]
    assert run("benchmark", *arguments, monkeypatch=monkeypatch) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["what"], row["who"], row["dim"], row["lost"]) for row in rows] == [
        *(("mask", who, dim, 0) for dim in (1000, 2000) for who in ("limit", "fedcore", "flower")),
        *(("client", who, 1000, 0) for who in ("limit", "fedcore", "flower")),
        *(("client", who, 3000, 0) for who in ("limit", "fedcore")),
        *(
            ("coordinator", who, 1000, lost)
            for lost in (0, 0.1)
            for who in ("limit, one core", "fedcore")
        ),
        ("round", "fedcore", 1000, 0.2),
        ("round", "flower", 1000, 0.2),
        ("coordinator", "flower", 1000, 0.2),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    (client,) = (r for r in rows if (r["what"], r["who"], r["dim"]) == ("client", "fedcore", 1000))
    assert 2000 < 1e6 * client["megabytes"] < 20_000
    assert str(tmp_path / "results.jsonl") in capsys.readouterr().out
    assert (tmp_path / "seconds.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_size_is_refused(tmp_path, monkeypatch, capsys):
    arguments = ["suite=secagg", "size=huge", f"output={tmp_path}"]
    assert run("benchmark", *arguments, monkeypatch=monkeypatch) == 2
    assert "size must be one of quick, full, got 'huge'" in capsys.readouterr().err


def test_the_simulated_cohort_is_what_the_coordinator_of_a_whole_round_sees():
    cohort = Cohort(make_plan(12, 50, 12, threat=Threat(dropout=0.25)), lost=0.2)
    assert cohort.absent == {0, 6}
    uploads = list(cohort.uploads())
    assert len(uploads) == len(cohort.survivors) == 10
    assert cohort.masks_to_remove() == 10 + 2 * 10
    # Whole rounds send as much: the masks that are left out cost nothing on the wire.
    x = cohort.plan.ring.zeros(50)
    real = run_round(dict.fromkeys(range(12), x), cohort.plan, {0: "upload", 6: "upload"})
    keys_and_boxes = 4 + 64 + 4 + 32 + 4 + 11 * (4 + 36 + 36 + 16)
    reveals = list(cohort.reveals())
    assert len(uploads[0]) + len(reveals[0]) + keys_and_boxes == real.sent_bytes[1]


def test_a_function_runs_apart_and_its_memory_is_counted():
    assert apart(grow, 50_000_000) > 45_000_000
    assert apart(grow, 0) < 25_000_000


def test_a_function_that_fails_apart_is_named():
    with pytest.raises(RuntimeError, match="fail ended with exit status 1"):
        apart(fail)


def grow(size):
    """Return by how much this process grew when it touched `size` bytes."""
    before = Memory.now()
    assert len(b"1" * size) == size
    return before.growth()


def fail():
    """Fail without a traceback on the console."""
    sys.stderr = io.StringIO()
    raise ValueError


def test_an_unknown_suite_is_refused(tmp_path, monkeypatch, capsys):
    assert run("benchmark", "suite=magic", f"output={tmp_path}", monkeypatch=monkeypatch) == 2
    assert (
        "suite must be engine, workers, secagg, dme, noise, codec, deployment or buffered"
        in capsys.readouterr().err
    )


def test_a_table_aligns_its_columns():
    assert table([{"a": 1, "bb": "x"}, {"a": 100, "bb": "y"}]) == "  a  bb\n  1   x\n100   y"


@pytest.mark.parametrize("suite", ["engine", "workers", "secagg", "dme", "noise", "codec"])
def test_every_suite_exists(suite):
    assert callable(_suite(suite))
