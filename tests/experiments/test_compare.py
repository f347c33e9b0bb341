"""Runs side by side."""

import json
from math import inf

import pytest

from experiments import compare
from fedcore.errors import ConfigurationError
from fedcore.privacy import PrivacyLedger, Release


def a_run(folder, *, noise=0.0, accuracy=0.9, finished=True):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    release = Release(
        round_number=1,
        unit="device",
        mechanism="gaussian" if noise else "none",
        noise_multiplier=noise,
    )
    ledger = PrivacyLedger(delta=1e-3, releases=(release,))
    (folder / "ledger.json").write_text(ledger.to_json())
    summary = {
        "epsilon": ledger.epsilon if ledger.epsilon < inf else "inf",
        "accuracy": accuracy,
        "completed_rounds": 7,
        "uplink_bits_per_parameter": 16.0,
        "uplink_bytes_per_client_round": 51_234.5,
        "uplink_payload_bytes_per_client_round": 50_900.0,
        "downlink_bytes_per_client_round": 102_400.0,
        "downlink_payload_bytes_per_client_round": 101_800.0,
        "total_reduction": 1.3251,
    }
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return ledger.epsilon


def test_runs_stand_side_by_side_the_least_private_first(tmp_path, monkeypatch, capsys):
    epsilon = a_run(tmp_path / "loud", noise=2.0, accuracy=0.91)
    a_run(tmp_path / "deep" / "quiet", noise=8.0, accuracy=0.88)
    a_run(tmp_path / "bare")
    a_run(tmp_path / "half", finished=False)
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path)])
    compare.main()
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| bare", "| loud", "| deep/quiet"]
    assert rows[0][1:5] == ["nobody", "none", "0", "inf"]
    assert rows[1][1:7] == ["device", "gaussian", "2", f"{epsilon:.3g}", "0.001", "91.00%"]
    assert rows[1][9:] == ["51,234", "50,900", "102,400", "101,800", "1.33x |"]
    assert "not finished: half" in printed
    assert (tmp_path / "comparison.md").read_text().splitlines()[2:] == [
        " | ".join(row) for row in rows
    ]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_folders_without_a_finished_run_are_refused(tmp_path):
    a_run(tmp_path / "half", finished=False)
    with pytest.raises(ConfigurationError, match=r"no finished run below .*: train some"):
        compare.compare([tmp_path])


def test_a_summary_that_is_none_is_refused(tmp_path):
    a_run(tmp_path / "odd")
    (tmp_path / "odd" / "summary.json").write_text('{"epsilon": "inf"}')
    with pytest.raises(ConfigurationError, match="is no summary of a run"):
        compare.compare([tmp_path])
