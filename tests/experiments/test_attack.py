"""The audit from the command line: what it writes, what it refuses."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments.audit.run import plain
from experiments.audit.settings import (
    SUITES,
    Audit,
    CanarySettings,
    InversionSettings,
    MembershipSettings,
    to_audit,
)
from tests.experiments.commands import run

CONF = Path(__file__).parents[2] / "conf"
SMALL = [
    *("model=logistic", "clients=6", "clients_per_round=6", "rounds=2", "dropout=0.34"),
    *("privacy=distributed_gaussian", "weighting=uniform", "clip=tight", "quantize.bits=16"),
    *("canary.candidates=16", "membership.shadows=4", "inversion.cohort=4", "inversion.steps=5"),
]


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack") / "all"
    with pytest.MonkeyPatch.context() as patch:
        assert run("attack", *SMALL, f"output={folder}", monkeypatch=patch) == 0
    return folder


def test_an_audit_writes_its_figures_a_page_and_a_picture_for_each_suite(audited):
    names = {path.name for path in audited.iterdir()}
    assert names == {".hydra", "attack.json", "attack.html", *(f"{suite}.png" for suite in SUITES)}
    for suite in SUITES:
        assert (audited / f"{suite}.png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_stands_beside_its_settings_and_the_ledger(audited):
    found = json.loads((audited / "attack.json").read_text())
    assert found["settings"]["canary"] == {"candidates": 16, "every_round": False, "seed": 0}
    assert found["job"]["rounds"] == 2
    assert set(found["results"]) == set(SUITES)
    canary, membership, inversion = (found["results"][suite] for suite in SUITES)
    assert 0 < canary["epsilon"] < 100
    assert canary["delta"] == membership["delta"] == 1e-3
    assert [seen["observer"] for seen in canary["observations"]] == [
        *("final model", "every model", "its rounds"),
    ]
    for seen in canary["observations"]:
        assert len(seen["statistics"]) == len(canary["coins"]) == 16
        shift = seen["estimates"]["shift"]
        assert shift["low"] <= shift["high"]
    assert membership["unit"] == "device"
    assert membership["members"] + membership["strangers"] == 4 * 6
    assert [view["name"] for view in inversion["views"]] == [
        *("one update", "sum", "one noisy update", "noisy sum", "nothing"),
    ]
    assert all(len(view["recovered"]["correlation"]) == 4 for view in inversion["views"])


def test_the_page_holds_every_picture_and_loads_nothing(audited):
    page = (audited / "attack.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_tables_are_printed_with_the_ledger_beside_the_estimate(tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "suite=canary", "privacy=none", f"output={tmp_path / 'open'}"]
    assert run("attack", *arguments, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    header = next(line for line in lines if line[:2] == ["observer", "estimate"])
    assert header[-2:] == ["proved", "ledger"]
    assert [line[-1] for line in lines if line[:2] == ["final", "model"]] == ["inf"]
    found = json.loads((tmp_path / "open" / "attack.json").read_text())
    assert found["results"]["canary"]["epsilon"] == "inf"


BAD = [
    (["suite=magic"], "suite: Input should be 'canary', 'membership', 'inversion' or 'all'"),
    (["canary.candidates=3"], "canary.candidates must be in 16..4096, got 3"),
    (["canary.candidate=3"], "Could not override 'canary.candidate'"),
    (["membership.shadows=1"], "membership.shadows must be in 4..1024, got 1"),
    (["inversion.steps=0"], "inversion.steps must be in 1..100000, got 0"),
    (["rounds=0"], "rounds must be at least 1, got 0"),
    (["data=npz"], "data.path: a value is missing"),
    (["engine=ray"], "choose engine=in_process"),
    (
        ["privacy=example_level", "weighting=uniform"],
        "privacy=example_level bounds single examples",
    ),
    (
        ["suite=inversion", "clip=none", "quantize=none", "secagg=none", "rotate=none"],
        "quantize=none sends plain float32",
    ),
    (["suite=inversion", "inversion.cohort=1000", "inversion.examples=9"], "must be at most 1438"),
    (
        [*SMALL, "privacy.epsilon_budget=1"],
        "privacy.epsilon_budget must be at least",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_what_cannot_be_audited_is_one_line_before_any_work(
    overrides, message, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "never"
    assert run("attack", *overrides, f"output={folder}", monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not folder.exists()


def test_a_folder_in_use_is_left_alone(audited, monkeypatch, capsys):
    before = (audited / "attack.json").read_bytes()
    assert run("attack", *SMALL, f"output={audited}", monkeypatch=monkeypatch) == 2
    assert "output must be a new or empty folder" in capsys.readouterr().err
    assert (audited / "attack.json").read_bytes() == before


def test_the_configuration_spells_out_every_field_of_every_suite():
    written = yaml.safe_load((CONF / "attack.yaml").read_text())
    for name, kind in (
        ("canary", CanarySettings),
        ("membership", MembershipSettings),
        ("inversion", InversionSettings),
    ):
        assert written[name].keys() == {field.name for field in fields(kind)}
        assert kind(**written[name]) == kind()  # the defaults are the library's


@pytest.mark.parametrize("experiment", ["quickstart", "mnist_cnn"])
def test_an_audit_composes_with_the_experiments_of_training(experiment):
    overrides = [f"experiment={experiment}", "suite=canary", "output=unused"]
    overrides += ["data.path=some.npz"] if experiment == "mnist_cnn" else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found, audit = to_audit(compose("attack", overrides))
    assert found.name == experiment
    assert audit == Audit("canary", CanarySettings(), MembershipSettings(), InversionSettings())
    assert audit.suites == ("canary",)


def test_infinity_is_a_word_and_not_a_number_in_json():
    assert plain([float("inf"), float("nan"), (1.5, {"a": True})]) == [
        "inf",
        None,
        [1.5, {"a": True}],
    ]
