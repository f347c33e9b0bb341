"""A run from the command line: what it writes, what it refuses, how it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedcore.crypto.signatures import VerifyKey
from fedcore.device import open_release
from fedcore.privacy import PrivacyLedger
from tests.experiments.commands import rounds_of, run, summary_of

ROOT = Path(__file__).parents[2]
SMALL = ["clients=6", "clients_per_round=6", "rounds=2", "dropout=0.34"]
PRIVATE = [
    *SMALL,
    *("sparsify=random_k", "privacy=distributed_gaussian", "weighting=uniform", "faults=drop"),
    *("quantize.bits=16", "clip.norm=0.5"),
]
SUMMARY_KEYS = {
    *("experiment", "seed", "rounds", "clients", "clients_per_round", "parameters", "accuracy"),
    *("loss", "uplink_bytes_per_client_round", "uplink_payload_bytes_per_client_round"),
    *("uplink_bits_per_parameter", "uplink_reduction", "uplink_payload_reduction"),
    *("downlink_bytes_per_client_round", "downlink_reduction", "secagg", "epsilon", "delta"),
    *("seconds_total", "clients_per_second", "peak_memory_mb", "release"),
    *("uplink_overhead_bytes_per_client_round", "downlink_payload_bytes_per_client_round"),
    *("downlink_overhead_bytes_per_client_round", "total_bytes_per_client_round"),
    *("total_reduction", "total_payload_reduction", "traffic"),
}


@pytest.fixture(scope="module")
def private_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "private"
    with pytest.MonkeyPatch.context() as patch:
        assert run("train", *PRIVATE, f"output={folder}", monkeypatch=patch) == 0
    return folder


def test_a_run_writes_everything_that_the_readme_names(private_run):
    names = {path.name for path in private_run.iterdir()}
    assert {
        ".hydra",
        "metrics.jsonl",
        "ledger.json",
        "summary.json",
        "model",
        "report.html",
    } <= names
    assert (private_run / ".hydra" / "config.yaml").exists()
    assert "privacy=distributed_gaussian" in (private_run / ".hydra" / "overrides.yaml").read_text()


def test_the_summary_has_every_promised_key(private_run):
    summary = summary_of(private_run)
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["secagg"] == {
        "protocol": "bonawitz",
        "neighbours": 5,
        "threshold": 3,
        "dropped_clients": 2,
        "aborted_rounds": 0,
    }
    assert 0 < summary["epsilon"] < np.inf


def test_bytes_are_counted_from_the_messages(private_run):
    summary = summary_of(private_run)
    kept = round(0.1 * summary["parameters"])
    assert summary["uplink_payload_bytes_per_client_round"] == 2 * kept
    assert (
        summary["uplink_bytes_per_client_round"] > summary["uplink_payload_bytes_per_client_round"]
    )
    assert summary["uplink_payload_reduction"] == pytest.approx(
        4 * summary["parameters"] / (2 * kept), rel=1e-3
    )


def test_the_ledger_has_one_entry_for_each_round_and_gives_the_epsilon_shown(private_run):
    ledger = PrivacyLedger.from_json((private_run / "ledger.json").read_text())
    assert [release.round_number for release in ledger.releases] == [1, 2]
    assert ledger.epsilon == summary_of(private_run)["epsilon"]
    assert [entry["epsilon"] for entry in rounds_of(private_run)][-1] == ledger.epsilon


def test_the_release_is_signed_by_the_key_of_the_run(private_run):
    release = open_release(private_run / "model", _public_key(private_run))
    assert release.manifest.description.provenance.epsilon == summary_of(private_run)["epsilon"]
    assert len(release.model) == summary_of(private_run)["release"]["onnx_bytes"]


def _public_key(folder: Path):
    return VerifyKey.from_pem((folder / "signing.key.pub").read_bytes())


def test_the_signing_key_is_readable_by_its_owner_only(private_run):
    assert (private_run / "signing.key").stat().st_mode & 0o077 == 0


def test_masked_and_unmasked_runs_of_a_seed_release_the_same_bytes(
    private_run, tmp_path, monkeypatch
):
    clear = tmp_path / "clear"
    assert run("train", *PRIVATE, "secagg=none", f"output={clear}", monkeypatch=monkeypatch) == 0
    assert summary_of(clear)["secagg"] is None
    model = Path("model", "1", "model.onnx")
    assert (clear / model).read_bytes() == (private_run / model).read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [["signed=true"], ["secagg=seed_helper"], ["secagg=seed_helper", "signed=true"]],
    ids=" ".join,
)
def test_signatures_and_a_helper_release_the_same_bytes(
    overrides, private_run, tmp_path, monkeypatch
):
    folder = tmp_path / "other"
    assert run("train", *PRIVATE, *overrides, f"output={folder}", monkeypatch=monkeypatch) == 0
    model = Path("model", "1", "model.onnx")
    assert (folder / model).read_bytes() == (private_run / model).read_bytes()
    ledgers = [(path / "ledger.json").read_text() for path in (folder, private_run)]
    assert PrivacyLedger.from_json(ledgers[0]) == PrivacyLedger.from_json(ledgers[1])
    one, other = summary_of(folder), summary_of(private_run)
    assert (
        one["uplink_payload_bytes_per_client_round"]
        == (other["uplink_payload_bytes_per_client_round"])
    )
    sent = "uplink_bytes_per_client_round"
    if "secagg=seed_helper" in overrides:
        assert one[sent] < other[sent]
    else:
        assert one[sent] > other[sent]
        assert one["secagg"] == other["secagg"]


def test_a_run_without_noise_shows_an_infinite_epsilon(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "open"
    assert run("train", *SMALL, "release=none", f"output={folder}", monkeypatch=monkeypatch) == 0
    assert summary_of(folder)["epsilon"] == "inf"
    assert "epsilon inf" in capsys.readouterr().out


def test_both_levels_with_targets_leave_two_ledgers_and_one_report(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "both"
    overrides = [
        *SMALL, "privacy=both_levels", "weighting=uniform", "quantize.bits=16", "release=none",
        "privacy.device.epsilon=12", "privacy.device.delta=0.2", "privacy.example.epsilon=9",
    ]  # fmt: skip
    assert run("train", *overrides, f"output={folder}", monkeypatch=monkeypatch) == 0
    summary = summary_of(folder)
    devices, examples = (
        PrivacyLedger.from_json((folder / name).read_text())
        for name in ("ledger.json", "ledger_example.json")
    )
    assert 12 * 0.999 < devices.epsilon == summary["epsilon"] <= 12
    assert 9 * 0.999 < examples.epsilon == summary["epsilon_example"] <= 9
    assert (summary["epsilon_target"], summary["epsilon_target_example"]) == (12, 9)
    assert summary["noise_multiplier"] == devices.releases[0].noise_multiplier
    assert summary["noise_multiplier_example"] == examples.releases[0].noise_multiplier
    assert (summary["delta"], summary["delta_example"]) == (0.2, 1e-5)
    assert summary["noise_inflation"] >= 1
    assert [entry["epsilon_example"] for entry in rounds_of(folder)][-1] == examples.epsilon
    printed = capsys.readouterr().out
    assert "found for epsilon 12, " in printed
    assert "times the central Gaussian's for rounding into 16 bits" in printed
    assert "warning: privacy.delta=0.2 is not below 1/6" in printed
    page = (folder / "report.html").read_text()
    assert "The examples' own ledger" in page
    assert "And for each example" in page
    assert "is not below 1/6" in page
    assert "does not support" not in page


def test_a_folder_in_use_is_left_alone(private_run, monkeypatch, capsys):
    before = (private_run / "summary.json").read_bytes()
    assert run("train", *SMALL, f"output={private_run}", monkeypatch=monkeypatch) == 2
    assert "output must be a new or empty folder" in capsys.readouterr().err
    assert (private_run / "summary.json").read_bytes() == before


BAD = [
    (["rounds=many"], "rounds: Input should be a valid integer"),
    (["rounds=0"], "rounds must be at least 1, got 0"),
    (["roundz=3"], "Could not override 'roundz'. (Key 'roundz' is not in struct)"),
    (["clip.norm=-1"], "clip.norm must be positive and finite, got -1"),
    (["clip.nrm=1"], "Could not override 'clip.nrm'"),
    (["clip=round"], "Available options in 'clip': adaptive loose none norm per_layer tight"),
    (["sparsify=random_k", "sparsify.fraction=2"], "sparsify.fraction must be in (0, 1], got 2"),
    (["clients_per_round=20"], "clients_per_round must be at most clients=10, got 20"),
    (["data=npz"], "data.path: a value is missing"),
    (["data=npz", "data.path=nowhere.npz"], "nowhere.npz does not exist"),
    (["classes=7"], "classes must be 10"),
    (["model=cnn"], "model cnn needs images of at least 12x12"),
    (["privacy=distributed_gaussian"], "choose weighting=uniform"),
    (
        ["privacy=distributed_gaussian", "weighting=uniform", "quantize.bits=4"],
        "raise quantize.bits to",
    ),
    (
        ["privacy=distributed_gaussian", "weighting=uniform", "privacy.epsilon_budget=3"],
        "it lasts for 3 rounds",
    ),
    (
        ["privacy=distributed_gaussian", "weighting=uniform", "privacy.epsilon=0"],
        "privacy.epsilon must be positive, got 0: the smallest that this run reaches is",
    ),
    (
        [
            "privacy=distributed_skellam",
            "weighting=uniform",
            "privacy.epsilon=0.1",
            "quantize.bits=10",
        ],
        "raise privacy.epsilon to",
    ),
    (
        ["privacy=distributed_gaussian", "weighting=uniform", "privacy.delta=1"],
        "privacy.delta must be in (0, 1), got 1",
    ),
    (
        [
            "privacy=distributed_gaussian",
            "weighting=uniform",
            "quantize.bits=12",
            "privacy.noise_multiplier=8",
            "privacy.max_inflation=1.001",
        ],
        "raise quantize.bits to",
    ),
    (["strategy=krum"], "strategy=krum compares single updates"),
    (["secagg=none", "quantize=none"], "leaves clip without effect"),
    (["clients=1", "clients_per_round=1"], "a secure sum over fewer than 2 clients"),
    (["signed=true", "secagg=none"], "choose secagg=bonawitz or seed_helper"),
    (["helper=remote"], "helper.address: a value is missing"),
    (["secagg.authority=mine"], "secagg.authority must be 64 lower-case hexadecimal digits"),
    (["partition=natural"], "does not say who recorded its examples"),
    (["partition=dirichlet", "partition.min_examples=500"], "500"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_what_cannot_work_is_one_line_before_any_work(
    overrides, message, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "never"
    assert run("train", *overrides, f"output={folder}", monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not folder.exists()


def test_a_malformed_data_file_is_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "broken.npz"
    path.write_bytes(b"PK\x03\x04 this is no archive")
    folder = tmp_path / "never"
    arguments = ["data=npz", f"data.path={path}", f"output={folder}"]
    assert run("train", *arguments, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not folder.exists()


def test_a_run_on_a_local_file_trains(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 240)
    x = (np.eye(3)[labels] + 0.1 * rng.normal(size=(240, 3))).astype(np.float32)
    np.savez(
        tmp_path / "own.npz",
        x_train=x[:200],
        y_train=labels[:200],
        x_test=x[200:],
        y_test=labels[200:],
    )
    folder = tmp_path / "own"
    status = run(
        *("train", "data=npz", f"data.path={tmp_path / 'own.npz'}", "model=logistic"),
        *(
            "partition=iid",
            "rounds=10",
            "training.learning_rate=0.5",
            "release=none",
            f"output={folder}",
        ),
        monkeypatch=monkeypatch,
    )
    assert status == 0
    assert summary_of(folder)["accuracy"] > 0.9


@pytest.mark.slow
def test_an_interrupted_run_leaves_what_was_finished_readable(tmp_path):
    folder = tmp_path / "long"
    command = [sys.executable, "-m", "experiments.train", "rounds=5000", f"output={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in a shell's background inherits an ignored SIGINT, and so would this one.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - C only
    ) as process:
        deadline = time.monotonic() + 120
        lines = folder / "metrics.jsonl"
        while not (lines.exists() and lines.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "interrupted" in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped"] == "interrupted"
    assert summary["completed_rounds"] == len(rounds_of(folder)) >= 2
    assert (folder / "report.html").exists()
    assert len(PrivacyLedger.from_json((folder / "ledger.json").read_text()).releases) >= 2


@pytest.mark.slow
def test_ray_and_in_process_release_the_same_bytes(tmp_path, monkeypatch):
    model = Path("model", "1", "model.onnx")
    for engine in ("in_process", "ray"):
        arguments = [*PRIVATE, f"engine={engine}", f"output={tmp_path / engine}"]
        assert run("train", *arguments, monkeypatch=monkeypatch) == 0
    assert (tmp_path / "ray" / model).read_bytes() == (tmp_path / "in_process" / model).read_bytes()


@pytest.mark.slow
def test_the_quickstart_is_accurate_small_and_private(tmp_path, monkeypatch):
    folder = tmp_path / "quickstart"
    arguments = ["experiment=quickstart", f"output={folder}"]
    assert run("train", *arguments, monkeypatch=monkeypatch) == 0
    summary = summary_of(folder)
    assert summary["accuracy"] >= 0.93
    assert summary["uplink_payload_reduction"] >= 25
    assert summary["secagg"]["dropped_clients"] == summary["rounds"]
    assert summary["release"]["agreement"] >= 0.98
    assert summary["epsilon"] < 21


@pytest.mark.slow
def test_mnist_passes_97_percent_within_the_rounds_of_mcmahan_et_al(tmp_path, monkeypatch):
    data = ROOT.parent / "shared" / "data" / "mnist.npz"
    folder = tmp_path / "mnist"
    arguments = ["experiment=mnist_2nn", f"data.path={data}", "release=none", f"output={folder}"]
    assert run("train", *arguments, monkeypatch=monkeypatch) == 0
    assert max(entry["accuracy"] for entry in rounds_of(folder)) > 0.97


def test_a_run_in_which_nothing_gets_through_stops_and_says_why(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "stalled"
    arguments = ["clients=5", "clients_per_round=5", "rounds=50", "faults=drop", "dropout=0"]
    assert run("train", *arguments, f"output={folder}", monkeypatch=monkeypatch) == 0
    summary = summary_of(folder)
    assert summary["completed_rounds"] == summary["secagg"]["aborted_rounds"] == 3
    assert "needed 5 clients, found 4" in summary["stopped"]
    assert summary["accuracy"] == summary["initial_accuracy"]
    assert "3 rounds in a row were aborted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "override",
    ["privacy=none", "strategy=fedavg", "clip=norm", "quantize=modular", "sparsify=dense"],
)
def test_every_choice_of_the_quickstart_can_be_changed(override, tmp_path, monkeypatch):
    folder = tmp_path / "changed"
    arguments = ["experiment=quickstart", override, "rounds=1", "clients=8", "clients_per_round=8"]
    arguments += ["dropout=0.2", "quantize.bits=20", "release=none", f"output={folder}"]
    assert run("train", *arguments, monkeypatch=monkeypatch) == 0
    assert rounds_of(folder)[0]["survivors"] == 7
