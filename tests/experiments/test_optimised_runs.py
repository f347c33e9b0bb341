"""Pruning, a teacher and int8 training from the command line: what is written, what is refused."""

import json
from pathlib import Path

import pytest

from tests.experiments.commands import rounds_of, run, summary_of

SMALL = ["clients=6", "clients_per_round=6", "rounds=4", "dropout=0.34", "training.epochs=2"]
WIDE = "model.hidden=[32]"
"""2,410 weights, 2,368 of them multiplied; pruned, half of both."""
PRUNED = ["pruning=structured", "pruning.after_round=2", "qat=int8", "qat.rounds=1"]
PRIVATE = [
    *("sparsify=random_k", "privacy=distributed_gaussian", "weighting=uniform", "faults=drop"),
    *("quantize.bits=16", "clip.norm=0.5"),
]


def taught_by(folder):
    return [
        "distillation=release",
        f"distillation.path={folder / 'model'}",
        f"distillation.key={folder / 'signing.key.pub'}",
    ]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "large"
    with pytest.MonkeyPatch.context() as patch:
        assert run("train", *SMALL, f"output={folder}", monkeypatch=patch) == 0
    return folder


@pytest.fixture(scope="module")
def small(large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "small"
    arguments = [*SMALL, WIDE, *PRUNED, *taught_by(large), f"output={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        assert run("train", *arguments, monkeypatch=patch) == 0
    return folder


def test_the_released_model_stands_beside_what_it_came_from(small, large):
    release, teacher = summary_of(small)["release"], summary_of(large)["release"]
    assert (release["parameters"], release["macs"]) == (1210, 1184)
    before = release["unpruned"]
    assert (before["parameters"], before["macs"]) == (2410, 2368)
    assert release["onnx_bytes"] < before["onnx_bytes"]
    assert release["onnx_bytes"] == (small / "model" / "1" / "model.onnx").stat().st_size
    assert release["teacher"] == {
        "parameters": 9610,
        "macs": 9472,
        "onnx_bytes": teacher["onnx_bytes"],
        "accuracy": pytest.approx(teacher["int8_accuracy"]),
    }
    tested = rounds_of(small)[1]["accuracy"]
    assert before["accuracy"] == pytest.approx(tested, abs=0.02)


def test_a_run_without_them_compares_with_nothing(large):
    release = summary_of(large)["release"]
    assert (release["unpruned"], release["teacher"]) == (None, None)
    page = (large / "report.html").read_text()
    assert "the same in float32" in page
    assert "before pruning" not in page


def test_the_report_shows_all_four(small):
    page = (small / "report.html").read_text()
    for words in ("released, int8", "the same in float32", "right before pruning", "the teacher"):
        assert words in page
    for figure in ("1,210", "1,184", "2,410", "2,368", "9,610", "9,472"):
        assert f"<td>{figure}</td>" in page


def test_bits_are_counted_for_the_weights_that_were_there(small):
    summary = summary_of(small)
    assert summary["uplink_bits_per_parameter"] == 32
    sent = summary["uplink_payload_bytes_per_client_round"]
    assert sent == 4 * (2410 + 1210) / 2
    assert summary["uplink_payload_reduction"] == pytest.approx(4 * 2410 / sent, rel=1e-3)


def test_masked_and_unmasked_pruned_private_runs_release_the_same_bytes(tmp_path, monkeypatch):
    files = []
    for secagg in ("bonawitz", "none", "seed_helper"):
        folder = tmp_path / secagg
        arguments = [*SMALL, WIDE, *PRUNED, *PRIVATE, f"secagg={secagg}", f"output={folder}"]
        assert run("train", *arguments, monkeypatch=monkeypatch) == 0
        files.append((folder / "model" / "1" / "model.onnx").read_bytes())
        ledger = json.loads((folder / "ledger.json").read_text())
        assert len({release["dim"] for release in ledger["releases"]}) == 2
    assert files[0] == files[1] == files[2]


@pytest.mark.slow
def test_ray_and_in_process_release_the_same_pruned_bytes(large, tmp_path, monkeypatch):
    model = Path("model", "1", "model.onnx")
    taught = [*SMALL, WIDE, *PRUNED, *taught_by(large)]
    for engine in ("in_process", "ray"):
        arguments = [*taught, f"engine={engine}", f"output={tmp_path / engine}"]
        assert run("train", *arguments, monkeypatch=monkeypatch) == 0
    assert (tmp_path / "ray" / model).read_bytes() == (tmp_path / "in_process" / model).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["qat=int8", "qat.rounds=1", "release=none"], "qat=int8 trains for an int8 release"),
        (["qat=int8", "qat.rounds=5"], "qat.rounds must be at most rounds=4"),
        (["pruning=structured", "model=logistic"], "raise the ratio"),
        (["pruning=structured", "pruning.ratio=1"], "pruning.ratio must be in (0, 1)"),
        (
            ["pruning=structured", "pruning.after_round=1", "error_feedback=true"],
            "set error_feedback=false",
        ),
        (["distillation=release"], "distillation.path: a value is missing"),
        (
            ["distillation=release", "distillation.path=none", "distillation.key=none"],
            "distillation.key must be a readable PEM file",
        ),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    overrides, message, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "refused"
    assert run("train", *SMALL, *overrides, f"output={folder}", monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_an_audit_wants_models_of_one_size(tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "suite=canary", "pruning=structured", f"output={tmp_path / 'audit'}"]
    assert run("attack", *arguments, monkeypatch=monkeypatch) == 2
    assert "choose pruning=none" in capsys.readouterr().err
