"""Every YAML composes, and says exactly what the library's types say."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir

from clients.simulated import simulated_root
from experiments.schema import Experiment, to_experiment
from fedcore.errors import ConfigurationError

CONF = Path(__file__).parents[2] / "conf"
WHOLE = ("experiment", "scheme")  # groups whose options choose those of others
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in WHOLE)
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SCHEMES = sorted(path.stem for path in (CONF / "scheme").glob("*.yaml"))
# What an option needs beside it, because the types refuse it alone.
PLAIN = ["clip=none", "rotate=none", "quantize=none", "secagg=none"]
COMPANIONS = {
    ("data", "npz"): ["data.path=some.npz"],
    ("data", "hub"): ["data.name=some/set"],
    ("helper", "remote"): [
        *("helper.address=host:1", f"helper.public_key={'ab' * 32}", "helper.authority=ca.pem"),
        *("helper.certificate=own.pem", "helper.private_key=own.key"),
    ],
    ("distillation", "release"): ["distillation.path=model", "distillation.key=some.pub"],
    ("clip", "none"): PLAIN,
    ("quantize", "none"): PLAIN,
    ("rotate", "none"): ["quantize=uniform"],
    ("quantize", "top_k"): ["secagg=none"],
    ("quantize", "sparse_ternary"): ["secagg=none"],
    ("quantize", "qsgd"): ["secagg=none"],
    ("privacy", "distributed_gaussian"): ["weighting=uniform"],
    ("privacy", "distributed_skellam"): ["weighting=uniform"],
    ("privacy", "central_gaussian"): ["weighting=uniform"],
    ("privacy", "matrix_gaussian"): ["weighting=uniform"],
    ("privacy", "example_level"): ["weighting=uniform"],
    ("privacy", "both_levels"): ["weighting=uniform"],
    ("schedule", "buffered"): ["weighting=uniform"],
    ("schedule", "buffered_30"): ["weighting=uniform", "clients=30"],
    ("devices", "mixed"): ["weighting=uniform"],
    ("devices", "large_only"): ["weighting=uniform", "clients_per_round=5"],
    ("devices", "fewer_steps"): ["weighting=uniform", "training.epochs=2"],
    ("strategy", "krum"): PLAIN,
    ("strategy", "fedmedian"): PLAIN,
    ("strategy", "fedtrimmedavg"): PLAIN,
}


def composed(*overrides: str) -> Experiment:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_experiment(compose("train", [*overrides, "output=unused"]))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_into_a_valid_experiment(group, option):
    experiment = composed(f"{group}={option}", *COMPANIONS.get((group, option), []))
    chosen = getattr(experiment, group)
    written = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    assert chosen.kind == written["kind"]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_spells_out_every_field_of_its_type(group, option):
    experiment = composed(f"{group}={option}", *COMPANIONS.get((group, option), []))
    chosen = getattr(experiment, group)
    assert is_dataclass(chosen)
    written = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    # An option may be put together from others, which spell out their own fields.
    others = [entry for entry in written.pop("defaults", []) if isinstance(entry, dict)]
    keys = written.keys() | {key.partition("@")[2] for entry in others for key in entry}
    assert keys == {field.name for field in fields(chosen)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_fits_an_experiment_and_has_the_numbers_of_a_sweep(scheme):
    experiment = composed("experiment=pareto", f"scheme={scheme}", "sweep.support=0.03")
    assert experiment.quantize.kind != "modular" or experiment.sparsify.kind == scheme
    assert experiment.error_feedback == (scheme != "float32")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_names_itself(name):
    experiment = composed(f"experiment={name}", *(["data.path=x.npz"] if "mnist" in name else []))
    assert experiment.name == name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_first_comment_of_an_experiment_is_the_command_to_run_it(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python -m experiments.train experiment={name}")


def test_the_root_file_and_the_type_have_the_same_keys():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        keys = set(compose("train", []))
    assert keys == {field.name for field in fields(Experiment)}


@pytest.mark.parametrize("group", GROUPS)
def test_every_kind_of_every_union_has_a_file(group):
    hint = get_type_hints(Experiment)[group]
    members = get_args(hint) or (hint,)
    kinds = {kind for member in members for kind in get_args(get_type_hints(member)["kind"])}
    files = (yaml.safe_load(path.read_text()) for path in (CONF / group).glob("*.yaml"))
    assert kinds == {file["kind"] for file in files}


def test_devices_that_take_their_time_are_not_simulated_on_ray():
    with pytest.raises(ConfigurationError, match="choose engine=in_process, or pace=at_once"):
        composed("pace=heavy_tailed", "engine=ray")


@pytest.mark.parametrize("secagg", ["bonawitz", "seed_helper"])
def test_a_signed_simulation_names_the_root_of_its_seed(secagg):
    signed, other = (
        composed("signed=true", f"secagg={secagg}", f"seed={seed}").job for seed in (4, 5)
    )
    unsigned = composed(f"secagg={secagg}", "seed=4").job
    assert signed.secagg.authority == simulated_root(4).public.raw.hex()
    assert signed.secagg.authority != other.secagg.authority
    assert unsigned.secagg.authority is None
    assert replace(signed, secagg=unsigned.secagg) == unsigned


def test_nothing_is_signed_in_the_clear():
    with pytest.raises(ConfigurationError, match="choose secagg=bonawitz or seed_helper"):
        _ = composed("signed=true", "secagg=none").job


@pytest.mark.parametrize(
    ("key", "default"), [("distributed_gaussian", 2.0), ("distributed_skellam", 2.0),
    ("example_level", 1.0)],
)  # fmt: skip
def test_the_default_noise_stands_back_for_a_target(key, default):
    chosen = [f"privacy={key}", "weighting=uniform"]
    given = composed(*chosen).privacy
    target = composed(*chosen, "privacy.epsilon=4").privacy
    assert (given.noise_multiplier, given.epsilon) == (default, None)
    assert (target.noise_multiplier, target.epsilon) == (None, 4.0)
    with pytest.raises(ConfigurationError, match=r"exactly one of .* got 3.0 and 4.0"):
        composed(*chosen, "privacy.epsilon=4", "privacy.noise_multiplier=3")


def test_both_levels_are_put_together_from_the_options_for_one():
    both = composed(
        "privacy=both_levels", "weighting=uniform", "privacy@privacy.device=distributed_skellam",
        "privacy.device.epsilon=4", "privacy.example.epsilon=8", "privacy.example.ghost=true",
    ).privacy  # fmt: skip
    assert (both.device.kind, both.device.epsilon) == ("distributed_skellam", 4.0)
    assert (both.example.epsilon, both.example.ghost) == (8.0, True)
    assert both.device.noise_multiplier is both.example.noise_multiplier is None


def test_a_missing_value_is_named():
    with pytest.raises(ConfigurationError, match=r"^data\.path: a value is missing"):
        composed("data=npz")


def test_the_order_of_stages_is_not_configurable():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        text = str(compose("train", []))
    assert "_target_" not in text
    assert "order" not in text
