import json
from dataclasses import fields, replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fedcore.codec import (
    Clip,
    Delta,
    Dense,
    Full,
    Hadamard,
    NoRotation,
    PublicTopK,
    Qsgd,
    Quantize,
    RandomK,
    Sketch,
    SparseTernary,
    TopK,
)
from fedcore.data import Digits, Dirichlet, HubDataset, Iid, Natural, NpzFile, Shards
from fedcore.engine import AtOnce, DropScript, HeavyTailed
from fedcore.errors import ConfigurationError
from fedcore.job import (
    Buffered,
    DeviceClass,
    Equal,
    Everyone,
    ExponentialBackOff,
    FedAvg,
    FedAvgM,
    FedOpt,
    FedProx,
    FixedSize,
    Int8Aware,
    Job,
    LocalHelper,
    Mixed,
    NoBackOff,
    NoClip,
    NoDistillation,
    NoFaults,
    NoQat,
    NoQuantize,
    Poisson,
    ReleaseTeacher,
    RemoteHelper,
    Robust,
    Rounds,
    explain,
)
from fedcore.models import Cnn, Cnn1d, LeNet, Logistic, Mlp, NoPruning, Structured, TwoNN
from fedcore.pipeline import (
    AdaptiveClip,
    Bonawitz,
    ByExamples,
    Modular,
    NoSecAgg,
    PerLayerClip,
    RunPlan,
    SeedHelper,
    Uniform,
)
from fedcore.privacy import DistributedGaussian, DistributedSkellam, NoPrivacy
from fedcore.training import ExampleLevelPrivacy, LocalTraining

KEY = "0123456789abcdef" * 4
NOISE = {"noise_multiplier": 1.0, "delta": 1e-5}
PLAIN = {"clip": NoClip(), "quantize": NoQuantize(), "secagg": NoSecAgg()}
UNIFORM = {"weighting": Uniform()}

# Every kind of every choice, in a job that can have it.
KINDS = {
    "data": [
        Digits(test_fraction=0.3),
        NpzFile(path="a.npz", clients_key="w"),
        HubDataset(name="ylecun/mnist"),
    ],
    "partition": [Iid(), Dirichlet(alpha=0.1), Shards(shards_per_client=3), Natural()],
    "model": [Logistic(), Mlp(hidden=(8, 9)), TwoNN(), Cnn(), LeNet(), Cnn1d(kernel=3)],
    "training": [LocalTraining(epochs=3, momentum=0.5)],
    "strategy": [
        FedAvg(),
        FedAvgM(server_momentum=0.5),
        FedProx(proximal_mu=1.0),
        *map(FedOpt, ("fedadam", "fedyogi")),
    ],
    "clip": [
        Clip(3.5),
        AdaptiveClip(initial=0.2),
        PerLayerClip(2.0, 0.5, (("*.bias", 0.5), ("*", 2.0))),
    ],
    "sparsify": [
        Dense(),
        RandomK(0.5, dense_below=100),
        Sketch(0.2, dense_below=100),
        PublicTopK(0.2, 0.5, dense_below=100),
    ],
    "rotate": [Hadamard()],
    "quantize": [Modular(16), Quantize(9)],
    "privacy": [NoPrivacy()],
    "secagg": [
        Bonawitz(corrupt=0.2),
        Bonawitz(authority=KEY),
        SeedHelper(),
        SeedHelper(KEY, KEY),
        NoSecAgg(),
    ],
    "weighting": [ByExamples(7), Uniform()],
    "sampling": [FixedSize(), Poisson()],
    "backoff": [NoBackOff(), ExponentialBackOff(after=3, first=2, most=9)],
    "devices": [Equal()],
    "pruning": [Structured(0.3, after_round=1), NoPruning()],
    "distillation": [ReleaseTeacher(path="model", key="key.pub"), NoDistillation()],
    "qat": [Int8Aware(rounds=1), NoQat()],
    "downlink": [Full(), Delta(4)],
    "schedule": [Rounds()],
    "pace": [HeavyTailed(median_seconds=3.0, lapse=0.1), AtOnce()],
    "faults": [DropScript(stages=("share", "upload", "endorse")), NoFaults()],
    "helper": [LocalHelper(), RemoteHelper("host:1", KEY, "ca.pem", "own.pem", "own.key")],
}
COMBINED = [
    UNIFORM | {"privacy": DistributedGaussian(**NOISE, epsilon_budget=3.0)},
    UNIFORM | {"privacy": DistributedSkellam(**NOISE, colluders=0.1)},
    UNIFORM | {"privacy": ExampleLevelPrivacy(ghost=True)},
    PLAIN | UNIFORM | {"privacy": ExampleLevelPrivacy()},
    PLAIN | {"strategy": Robust("krum", malicious=1)},
    PLAIN | {"strategy": Robust("fedtrimmedavg", beta=0.1)},
    PLAIN | {"strategy": FedOpt("fedadagrad")},
    {"quantize": Quantize(8), "rotate": NoRotation()},
    {"error_feedback": True, "sparsify": RandomK(0.1)},
    *({"quantize": by, "secagg": NoSecAgg()} for by in (TopK(), SparseTernary(), Qsgd())),
    {"sampling": Everyone(), "clients_per_round": 12},
    UNIFORM | {"schedule": Buffered(concurrency=12, max_staleness=3, same_model=1)},
    {"sampling": FixedSize(over_selection=1.2), "dropout": 0.3},
    UNIFORM
    | {"devices": Mixed(classes=(DeviceClass(name="small", width=0.5), DeviceClass(name="l")))},
    UNIFORM | {"sampling": Poisson(), "privacy": DistributedGaussian(**NOISE, amplification=True)},
]
SCALARS = {
    "name": "other", "seed": 5, "rounds": 3, "clients": 12, "clients_per_round": 4, "classes": 10,
    "evaluate_every": 2, "error_feedback": True, "dropout": 0.2, "metric_slots": 2, "attempts": 3,
    "stage_seconds": 5.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "choices",
    [{name: value} for name, values in KINDS.items() for value in values]
    + COMBINED
    + [{name: value} for name, value in SCALARS.items()],
)
def test_a_job_survives_its_json(choices):
    job = replace(Job(), **({"clients": 12} | choices))
    assert Job.from_json(job.to_json()) == job
    assert "\n" not in job.to_json()


@pytest.mark.parametrize("sampling", [FixedSize(), Everyone()])
def test_amplification_is_refused_where_everybody_can_tell_who_takes_part(sampling):
    privacy = DistributedGaussian(**NOISE, amplification=True)
    with pytest.raises(ConfigurationError, match=f"sampling={sampling.kind} is public"):
        Job(privacy=privacy, weighting=Uniform(), sampling=sampling)


def test_everyone_means_all_clients():
    with pytest.raises(ConfigurationError, match="invites all clients=10: set clients_per_round"):
        Job(sampling=Everyone(), clients_per_round=9)


def test_every_field_was_tried():
    assert {*KINDS, *SCALARS} == {field.name for field in fields(Job)}


def test_an_empty_object_is_the_default_job():
    assert Job.from_json("{}") == Job()


def test_equal_jobs_have_equal_text():
    assert Job(clip=Clip(10), dropout=0).to_json() == Job(clip=Clip(10.0), dropout=0.0).to_json()
    shuffled = dict(reversed(json.loads(Job().to_json()).items()))
    assert Job.from_json(json.dumps(shuffled, indent=2)).to_json() == Job().to_json()


BAD_VALUES = [
    # key, value, what the message names
    ("rounds", 0, "rounds must be at least 1, got 0"),
    ("rounds", "many", "rounds"),
    ("rounds", 1.5, "rounds"),
    ("rounds", None, "rounds"),
    ("clients", 0, "clients must be at least 1"),
    ("clients_per_round", 0, "clients_per_round must be at least 1"),
    ("clients_per_round", 11, "clients_per_round must be at most clients=10, got 11"),
    ("evaluate_every", 0, "evaluate_every must be at least 1"),
    ("seed", -1, "seed must be in"),
    ("seed", 1 << 62, "seed must be in"),
    ("seed", [], "seed"),
    ("name", 3, "name"),
    ("classes", "ten", "classes"),
    ("error_feedback", "perhaps", "error_feedback"),
    ("dropout", 1.0, "dropout must be in"),
    ("dropout", -0.1, "dropout must be in"),
    ("dropout", "a tenth", "dropout"),
    ("metric_slots", 65, "metric_slots must be in"),
    ("attempts", 11, "attempts must be in"),
    ("stage_seconds", 0, "stage_seconds must be in"),
    ("data", {"kind": "mnist"}, "data"),
    ("data", "digits", "data"),
    ("data", {}, "data"),
    ("data", {"kind": "npz"}, "data.path"),
    ("data", {"kind": "npz", "path": "x", "clients_path": "y"}, "data.clients_path"),
    ("data", {"kind": "hub"}, "data.name"),
    ("data", {"kind": "digits", "test_fraction": 0.95}, "data.test_fraction must be in"),
    ("data", {"kind": "digits", "split": 1}, "data.split: unknown key"),
    ("partition", {"kind": "dirichlet", "alpha": 0}, "partition.alpha must be in"),
    ("partition", {"kind": "dirichlet", "min_examples": 0}, "partition.min_examples"),
    ("partition", {"kind": "shards", "shards_per_client": 0}, "partition.shards_per_client"),
    ("partition", {"kind": "iid", "alpha": 1}, "partition.alpha: unknown key"),
    ("model", {"kind": "mlp", "hidden": []}, "model.hidden must be"),
    ("model", {"kind": "mlp", "hidden": ["wide"]}, "model.hidden.0"),
    ("model", {"kind": "mlp", "hidden": 128}, "model.hidden"),
    ("model", {"kind": "cnn1d", "kernel": 4}, "model.kernel must be"),
    ("model", {"kind": "cnn1d", "channels": 0}, "model.channels must be"),
    ("model", {"kind": "resnet"}, "model: expected kind to be one of"),
    ("training", {"epochs": 0}, "training.epochs must be"),
    ("training", {"batch_size": -1}, "training.batch_size must be"),
    ("training", {"learning_rate": 0}, "training.learning_rate must be"),
    ("training", {"momentum": 1}, "training.momentum must be"),
    ("training", {"weight_decay": -1}, "training.weight_decay must be"),
    ("training", {"kind": "adam"}, "training.kind"),
    ("training", {"lr": 0.1}, "training.lr: unknown key"),
    ("strategy", {"kind": "fedsgd"}, "strategy: expected kind to be one of"),
    ("strategy", {"kind": "fedavgm", "server_momentum": 1}, "strategy.server_momentum must be"),
    ("strategy", {"kind": "fedavgm", "server_learning_rate": 0}, "strategy.server_learning_rate"),
    ("strategy", {"kind": "fedprox", "proximal_mu": -1}, "strategy.proximal_mu must be"),
    ("strategy", {"kind": "fedadam", "eta": 0}, "strategy.eta must be"),
    ("strategy", {"kind": "fedyogi", "tau": 0}, "strategy.tau must be"),
    ("strategy", {"kind": "fedadam", "beta_1": 1}, "strategy.beta_1 must be"),
    ("strategy", {"kind": "fedadagrad", "beta_2": 1}, "strategy.beta_2 must be"),
    ("strategy", {"kind": "krum", "malicious": -1}, "strategy.malicious must be"),
    ("strategy", {"kind": "fedtrimmedavg", "beta": 0.5}, "strategy.beta must be"),
    ("strategy", {"kind": "krum"}, "strategy=krum compares single updates"),
    ("strategy", {"kind": "fedmedian"}, "strategy=fedmedian compares single updates"),
    ("strategy", {"kind": "fedtrimmedavg"}, "strategy=fedtrimmedavg compares single updates"),
    ("clip", {"kind": "none"}, "choose clip=norm, or quantize=none"),
    ("clip", {"kind": "norm", "norm": 0}, "clip.norm must be"),
    ("clip", {"kind": "norm", "bound": 1}, "clip.bound: unknown key"),
    ("clip", {"kind": "adaptive", "quantile": 1.0}, "clip.quantile must be"),
    ("clip", {"kind": "adaptive", "norm": 1.0}, "clip.norm: unknown key"),
    ("clip", {"kind": "per_layer", "size_power": 3}, "clip.size_power must be"),
    ("clip", {"kind": "per_layer", "shares": [["*"]]}, "clip.shares"),
    ("sparsify", {"kind": "random_k", "fraction": 0}, "sparsify.fraction must be"),
    ("sparsify", {"kind": "top_k"}, "sparsify: expected kind to be one of"),
    ("rotate", {"kind": "none"}, "choose rotate=hadamard or quantize=uniform"),
    ("rotate", {"kind": "fft"}, "rotate: expected kind to be one of"),
    ("quantize", {"kind": "modular", "bits": 3}, "quantize.bits must be"),
    ("quantize", {"kind": "modular", "bits": 33}, "quantize.bits must be"),
    ("quantize", {"kind": "modular", "bits": "8b"}, "quantize.bits"),
    ("quantize", {"kind": "modular", "tails": 0.1}, "quantize.tails must be"),
    ("quantize", {"kind": "uniform", "bits": 1}, "quantize.bits must be"),
    ("quantize", {"kind": "none"}, "quantize=none sends plain float32, which leaves clip, secagg"),
    ("privacy", {"kind": "distributed_gaussian"}, "privacy.delta"),
    ("privacy", {"kind": "distributed_gaussian", "delta": 1e-5},
     "exactly one of privacy.noise_multiplier and privacy.epsilon must be given"),
    ("privacy", {"kind": "distributed_gaussian", **NOISE, "epsilon": 4},
     "exactly one of privacy.noise_multiplier and privacy.epsilon must be given, got 1.0 and 4"),
    ("privacy", {"kind": "distributed_skellam", "delta": 1e-5, "epsilon": inf},
     "privacy.epsilon must be a finite number"),
    ("privacy", {"kind": "distributed_gaussian", **NOISE, "max_inflation": 1},
     "privacy.max_inflation must be above 1"),
    ("privacy", {"kind": "example_level", "epsilon": 4}, "exactly one of"),
    ("privacy", {"kind": "example_level", "noise_multiplier": None, "epsilon": inf},
     "privacy.epsilon must be a finite number"),
    ("privacy", {"kind": "example_level", "epsilon_budget": 0}, "privacy.epsilon_budget must be"),
    ("privacy", {"kind": "both_levels", "example": {}, "device":
     {"kind": "distributed_gaussian", **NOISE}}, "choose weighting=uniform"),
    ("privacy", {"kind": "distributed_gaussian", **NOISE}, "weighting=uniform"),
    ("privacy", {"kind": "distributed_gaussian", **NOISE, "delta": 1}, "privacy.delta must be"),
    ("privacy", {"kind": "distributed_skellam", **NOISE, "noise_multiplier": 0},
     "privacy.noise_multiplier must be"),
    ("privacy", {"kind": "distributed_skellam", **NOISE, "epsilon_budget": 0},
     "privacy.epsilon_budget must be"),
    ("privacy", {"kind": "distributed_skellam", **NOISE, "colluders": 1}, "privacy.colluders"),
    ("privacy", {"kind": "example_level"}, "choose weighting=uniform"),
    ("privacy", {"kind": "example_level", "max_grad_norm": 0}, "privacy.max_grad_norm must be"),
    ("privacy", {"kind": "example_level", "noise_multiplier": -1}, "privacy.noise_multiplier"),
    ("privacy", {"kind": "local"}, "privacy: expected kind to be one of"),
    ("secagg", {"kind": "bonawitz", "corrupt": 0.5}, "secagg.corrupt must be"),
    ("secagg", {"kind": "bonawitz", "security_bits": 5}, "secagg.security_bits must be"),
    ("secagg", {"kind": "bonawitz", "authority": "00"}, "secagg.authority must be 64"),
    ("secagg", {"kind": "bonawitz", "authority": KEY.upper()}, "secagg.authority must be 64"),
    ("secagg", {"kind": "seed_helper", "public_key": KEY[1:]}, "secagg.public_key must be 64"),
    ("secagg", {"kind": "seed_helper", "authority": KEY + "0"}, "secagg.authority must be 64"),
    ("secagg", {"kind": "seed_helper", "corrupt": 0.1}, "secagg.corrupt: unknown key"),
    ("helper", {"kind": "remote"}, "helper.address"),
    ("helper", {"kind": "local", "address": "x"}, "helper.address: unknown key"),
    ("helper", {"kind": "enclave"}, "helper: expected kind to be one of"),
    ("secagg", {"kind": "secaggplus"}, "secagg: expected kind to be one of"),
    ("weighting", {"kind": "examples", "max_examples": 0}, "weighting.max_examples must be"),
    ("weighting", {"kind": "loss"}, "weighting: expected kind to be one of"),
    ("faults", {"kind": "drop", "per_round": -1}, "faults.per_round must be"),
    ("faults", {"kind": "drop", "stages": []}, "faults.stages must"),
    ("faults", {"kind": "drop", "stages": ["unmask"]}, "faults.stages"),
    ("faults", {"kind": "drop", "stages": [3]}, "faults.stages.0"),
    ("speed", 3, "speed: unknown key; remove it or check its spelling"),
    ("engine", {"kind": "ray"}, "engine: unknown key"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "named"), BAD_VALUES)
def test_a_bad_value_is_refused_in_one_line_that_names_its_key(key, value, named):
    with pytest.raises(ConfigurationError) as caught:
        Job.from_json(json.dumps({key: value}))
    text = str(caught.value)
    assert named in text
    assert "\n" not in text
    assert "pydantic" not in text
    assert "Value error" not in text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"job"', "{'rounds': 1}", "\ud7ff"])
def test_text_that_is_no_object_is_refused_in_one_line(text):
    with pytest.raises(ConfigurationError, match="job: ") as caught:
        Job.from_json(text)
    assert "\n" not in str(caught.value)


def test_several_faults_are_counted():
    with pytest.raises(ConfigurationError, match=r"\(and 2 more\)"):
        Job.from_json('{"rounds": "a", "seed": "b", "speed": 1}')


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "bits", "norm", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*KINDS, *SCALARS, "other"]), values, max_size=3))
def test_any_json_is_a_job_or_one_line(document):
    try:
        job = Job.from_json(json.dumps(document))
    except ConfigurationError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert Job.from_json(job.to_json()) == job
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("off", "named"),
    [
        ({"clip": Clip(1.0)}, "clip"),
        ({"secagg": Bonawitz()}, "secagg"),
        ({"secagg": SeedHelper()}, "secagg"),
        ({"sparsify": RandomK(0.1)}, "sparsify"),
        ({"privacy": DistributedGaussian(**NOISE)}, "privacy"),
        ({"error_feedback": True}, "error_feedback"),
    ],
)
def test_plain_float32_refuses_stages_that_it_would_leave_out(off, named):
    with pytest.raises(ConfigurationError, match=f"leaves {named} without effect"):
        Job(**(PLAIN | off))


def test_the_plan_of_a_job_takes_its_stages_and_its_seed():
    job = Job(seed=4, clip=Clip(2.0), quantize=Modular(12), attempts=3, dropout=0.25)
    assert job.plan == RunPlan(
        seed=4, clip=Clip(2.0), quantize=Modular(12), attempts=3, dropout=0.25, metric_slots=4
    )
    assert Job(**PLAIN).plan is None


def test_noise_in_local_training_leaves_the_sum_without_noise():
    plan = Job(privacy=ExampleLevelPrivacy(), **UNIFORM).plan
    assert plan.privacy == NoPrivacy()


def test_a_job_is_checked_when_it_is_built_in_python_too():
    with pytest.raises(ConfigurationError, match="clients_per_round"):
        Job(clients=3, clients_per_round=4)
    with pytest.raises(ConfigurationError, match=r"plan\.dropout"):
        Job(dropout=2.0)


def test_an_explanation_without_a_place_is_about_the_job():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("x")
    assert explain(caught.value).startswith("job: ")
