"""The table and the picture of the codec benchmark."""

import json

import numpy as np
import pytest

from experiments import bench_codec
from experiments.codec_cases import WIDTHS, cases
from fedcore.ring import packed_size
from tests.experiments.commands import run


@pytest.fixture
def short(monkeypatch):
    """Measure vectors of at most 64 coordinates, each once."""
    monkeypatch.setattr(bench_codec, "SIZES", {"quick": (16, 64)})
    monkeypatch.setattr(bench_codec, "_BEST_OF", 1)
    monkeypatch.setattr(bench_codec, "_SECONDS", 0.0)


@pytest.mark.usefixtures("short")
def test_the_suite_has_a_row_for_both_halves_of_every_stage_and_draws_them(
    tmp_path, monkeypatch, capsys
):
    assert run("benchmark", "suite=codec", f"output={tmp_path}", monkeypatch=monkeypatch) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    named = {(row["group"], row["stage"], row["operation"]) for row in rows}
    assert len(named) == len(rows) / 2
    for stage in ("random_k", "sketch", "public_top_k", "hadamard", "modular", "embed, 20 bits"):
        assert {("stage", stage, "encode"), ("stage", stage, "decode")} <= named
    assert ("stage", "clip", "encode") in named
    for group, stages in (
        ("packing", [f"{bits} bits" for bits in WIDTHS]),
        ("lossless", ["10% nonzero", "golomb_rice"]),
        ("compressor", ["top_k, 1 %", "sparse_ternary, 1 %", "qsgd, 4 levels"]),
        ("downlink", ["delta, 4 bits", "delta, 8 bits"]),
    ):
        for stage in stages:
            assert {(group, stage, "encode"), (group, stage, "decode")} <= named
    assert all(row["nanoseconds"] > 0 and row["copy"] > 0 for row in rows)
    assert str(tmp_path / "results.jsonl") in capsys.readouterr().out
    assert (tmp_path / "nanoseconds.png").read_bytes().startswith(b"\x89PNG")


def test_a_case_names_the_bytes_that_go_in_and_come_out():
    dim = 1000
    found = {(case.group, case.stage, case.operation): case for case in cases(dim)}
    for bits, width in ((8, 1), (12, 2), (16, 2), (20, 4)):
        for operation in ("encode", "decode"):
            case = found["packing", f"{bits} bits", operation]
            assert (case.plain, case.coded) == (width * dim, packed_size(dim, bits))
    assert len(found["packing", "12 bits", "encode"].work()) == packed_size(dim, 12)
    clip = found["stage", "clip", "encode"]
    assert (clip.plain, clip.coded) == (4 * dim, 8 * dim)
    for key in (("compressor", "top_k, 1 %", "encode"), ("downlink", "delta, 8 bits", "encode")):
        assert len(found[key].work()) == found[key].coded
    delta = found["downlink", "delta, 8 bits", "decode"].work()
    assert delta.nbytes == found["downlink", "delta, 8 bits", "decode"].plain


def test_what_is_derived_is_derived_anew_in_every_call():
    found = {(case.stage, case.operation): case for case in cases(256)}
    one, other = found["random_k", "derive"].work(), found["random_k", "derive"].work()
    assert not np.array_equal(one, other)


@pytest.mark.usefixtures("short")
def test_an_unknown_size_is_refused(tmp_path, monkeypatch, capsys):
    arguments = ["suite=codec", "size=huge", f"output={tmp_path}"]
    assert run("benchmark", *arguments, monkeypatch=monkeypatch) == 2
    assert "size must be one of quick, got 'huge'" in capsys.readouterr().err
