import json
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.codec import Clip, Delta, Dense, Hadamard, NoRotation, Quantize, RandomK
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.pipeline import (
    AdaptiveClip,
    Bonawitz,
    Buffer,
    ByClass,
    ByExamples,
    Layer,
    Modular,
    NoSecAgg,
    PerLayerClip,
    RoundPlan,
    RunPlan,
    Uniform,
)
from fedcore.privacy import DistributedGaussian, DistributedSkellam, NoPrivacy
from tests.fedcore.pipeline.rounds import private_plan, round_plan

CLASSES = ByClass(widths=(0.5, 1.0), steps=(1.0, 1.0))
GAUSSIAN = DistributedGaussian(noise_multiplier=1.0, delta=1e-5)

# A legal change of every field, from a plan that has room for it.
CHANGED_RUN = {
    "clip": Clip(2.0),
    "sparsify": RandomK(0.5),
    "rotate": NoRotation(),
    "quantize": Modular(20),
    "privacy": GAUSSIAN,
    "secagg": NoSecAgg(),
    "weighting": ByExamples(),
    "downlink": Delta(4),
    "shares": CLASSES,
    "error_feedback": True,
    "dropout": 0.2,
    "metric_slots": 3,
    "attempts": 5,
    "stage_seconds": 7.0,
    "seed": 1,
}
CHANGED_ROUND = {
    "run_id": "other",
    "round_number": 2,
    "attempt": 2,
    "clients": 6,
    "dim": 13,
    "model_digest": "cd" * 32,
    "roster": "ef" * 32,
    "support": "AAAA",
}
# What some clips need beside them, so that no other plan has it.
STATES = [
    (RunPlan(clip=AdaptiveClip()), [{"clip_norm": 1.0}, {"clip_norm": 1.5}]),
    (
        RunPlan(clip=PerLayerClip()),
        [
            {"layers": (Layer("a", 6), Layer("b", 6))},
            {"layers": (Layer("a", 5), Layer("b", 7))},
            {"layers": (Layer("b", 6), Layer("a", 6))},
        ],
    ),
    (
        RunPlan(weighting=Uniform()),
        [
            {"model_digest": "11" * 32, "buffer": buffer}
            for buffer in (
                Buffer(versions=("11" * 32,), staleness=(0,) * 5),
                Buffer(versions=("11" * 32, "22" * 32), staleness=(0,) * 5),
                Buffer(versions=("11" * 32, "33" * 32), staleness=(0,) * 5),
                Buffer(versions=("11" * 32, "22" * 32), staleness=(0, 0, 0, 0, 1)),
                Buffer(versions=("11" * 32, "22" * 32), staleness=(0, 0, 0, 1, 0)),
                Buffer(versions=("11" * 32,), staleness=(0,) * 5, exponent=1.0),
            )
        ],
    ),
]
INNER = [
    (RunPlan(sparsify=RandomK(0.5)), {"sparsify": RandomK(0.25)}),
    (RunPlan(sparsify=RandomK(0.5)), {"sparsify": RandomK(0.5, unbiased=True)}),
    (RunPlan(), {"quantize": Modular(32, tails=5.0)}),
    (RunPlan(quantize=Quantize(8)), {"quantize": Quantize(9)}),
    (RunPlan(), {"weighting": ByExamples(7)}),
    (RunPlan(), {"secagg": Bonawitz(corrupt=0.2)}),
    (RunPlan(), {"secagg": Bonawitz(security_bits=41)}),
    (RunPlan(), {"secagg": Bonawitz(correctness_bits=31)}),
    *(
        (RunPlan(weighting=Uniform(), shares=CLASSES), {"shares": replace(CLASSES, **change)})
        for change in (
            {"widths": (0.25, 1.0)},
            {"steps": (0.5, 1.0)},
            {"structure": "nested"},
            {"normalise": True},
            {"least_trainers": 3},
        )
    ),
    (private_plan(), {"privacy": replace(GAUSSIAN, noise_multiplier=2.0)}),
    (private_plan(), {"privacy": replace(GAUSSIAN, delta=1e-6)}),
    (private_plan(), {"privacy": replace(GAUSSIAN, epsilon_budget=3.0)}),
    (private_plan(), {"privacy": replace(GAUSSIAN, colluders=0.1)}),
    (private_plan(), {"privacy": DistributedSkellam(noise_multiplier=1.0, delta=1e-5)}),
]

numbers = st.floats(0.01, 10.0) | st.integers(1, 10)
run_plans = st.builds(
    RunPlan,
    clip=st.builds(Clip, numbers),
    sparsify=st.just(Dense()) | st.builds(RandomK, st.floats(0.01, 1.0)),
    rotate=st.just(Hadamard()),
    quantize=st.builds(Modular, st.integers(4, 32), numbers.filter(lambda tails: tails >= 1)),
    privacy=st.just(NoPrivacy())
    | st.builds(
        DistributedSkellam,
        noise_multiplier=numbers,
        delta=st.floats(1e-9, 0.5),
        epsilon_budget=st.none() | numbers,
    ),
    secagg=st.builds(Bonawitz, st.floats(0, 0.4)) | st.just(NoSecAgg()),
    weighting=st.just(Uniform()),
    error_feedback=st.booleans(),
    dropout=st.just(0) | st.floats(0, 0.9),
    stage_seconds=numbers,
    seed=st.integers(-(2**70), 2**70),
)


@given(run=run_plans, run_id=st.text(max_size=20), clients=st.integers(1, 10**6))
def test_a_plan_survives_the_wire_and_its_bytes_are_canonical(run, run_id, clients):
    plan = round_plan(run, run_id=run_id, clients=clients)
    received = RoundPlan.from_bytes(plan.to_bytes())
    assert received == plan
    assert received.to_bytes() == plan.to_bytes()
    assert received.digest() == plan.digest()


@pytest.mark.parametrize(
    ("whole", "fractional"),
    [
        (RunPlan(clip=Clip(10)), RunPlan(clip=Clip(10.0))),
        (RunPlan(dropout=0), RunPlan(dropout=0.0)),
        (RunPlan(stage_seconds=30), RunPlan(stage_seconds=30.0)),
        (RunPlan(quantize=Modular(16, tails=4)), RunPlan(quantize=Modular(16, tails=4.0))),
        (private_plan(noise=1), private_plan(noise=1.0)),
    ],
)
def test_a_number_written_as_an_integer_gives_the_same_plan(whole, fractional):
    assert round_plan(whole).to_bytes() == round_plan(fractional).to_bytes()
    assert RoundPlan.from_bytes(round_plan(whole).to_bytes()) == round_plan(fractional)


def test_every_field_of_a_plan_is_in_its_digest():
    assert CHANGED_RUN.keys() == {field.name for field in fields(RunPlan)}
    stated = {name for _, changes in STATES for change in changes for name in change}
    assert {"run", *CHANGED_ROUND} | stated == {field.name for field in fields(RoundPlan)}
    base = RunPlan(weighting=Uniform())
    digests = {round_plan(base).digest()}
    for name, value in CHANGED_RUN.items():
        start = replace(base, quantize=Quantize()) if name == "rotate" else base
        digests |= {
            round_plan(start).digest(),
            round_plan(replace(start, **{name: value})).digest(),
        }
    for name, value in CHANGED_ROUND.items():
        digests.add(round_plan(base, **{name: value}).digest())
    for start, changes in STATES:
        digests |= {round_plan(start, **change).digest() for change in changes}
    states = sum(len(changes) for _, changes in STATES)
    assert len(digests) == 2 + len(CHANGED_RUN) + len(CHANGED_ROUND) + states


@pytest.mark.parametrize(("run", "change"), INNER)
def test_every_parameter_of_a_choice_is_in_the_digest(run, change):
    changed = replace(run, **change)
    assert changed != run
    assert round_plan(changed).digest() != round_plan(run).digest()


def test_supports_and_rotations_are_fresh_in_every_round_and_the_same_in_every_attempt():
    seeds = {
        round_plan(RunPlan(seed=seed), round_number=number).stage_seed(stage)
        for seed in (0, 1)
        for number in (1, 2, 3)
        for stage in ("support", "rotation")
    }
    assert len(seeds) == 12
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert round_plan(attempt=2).stage_seed("support") == round_plan().stage_seed("support")


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"rotate": NoRotation()}, "quantize=modular.*rotate=hadamard"),
        ({"quantize": Quantize(), "privacy": GAUSSIAN, "weighting": Uniform()}, "quantize=uniform"),
        ({"privacy": GAUSSIAN}, "weighting=uniform, got weighting=examples"),
        (
            {"error_feedback": True, "sparsify": RandomK(0.1, unbiased=True)},
            "error_feedback.*sparsify.unbiased=false",
        ),
    ],
)
def test_choices_that_exclude_each_other_are_refused_by_name(choices, named):
    with pytest.raises(ConfigurationError, match=named):
        RunPlan(**choices)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RunPlan(dropout=1.0), "plan.dropout"),
        (lambda: RunPlan(dropout=float("nan")), "plan.dropout"),
        (lambda: RunPlan(metric_slots=65), "plan.metric_slots"),
        (lambda: RunPlan(attempts=0), "plan.attempts"),
        (lambda: RunPlan(stage_seconds=0), "plan.stage_seconds"),
        (lambda: RunPlan(stage_seconds=float("inf")), "plan.stage_seconds"),
        (lambda: Modular(3), "quantize.bits"),
        (lambda: Modular(33), "quantize.bits"),
        (lambda: Modular(16, tails=0.5), "quantize.tails"),
        (lambda: Modular(16, tails=float("nan")), "quantize.tails"),
        (lambda: ByExamples(0), "weighting.max_examples"),
        (lambda: ByExamples(1 << 24), "weighting.max_examples"),
        (lambda: Bonawitz(corrupt=0.5), "secagg.corrupt"),
        (lambda: Bonawitz(corrupt=float("nan")), "secagg.corrupt"),
        (lambda: Bonawitz(security_bits=9), "secagg.security_bits"),
        (lambda: Bonawitz(correctness_bits=129), "secagg.correctness_bits"),
        (lambda: round_plan(round_number=0), "round_number"),
        (lambda: round_plan(attempt=0), "attempt"),
        (lambda: round_plan(clients=0), "clients"),
        (lambda: round_plan(dim=1 << 48), "dim"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make, named):
    with pytest.raises(ConfigurationError, match=f"{named} must be in"):
        make()


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda text: text.replace(":", ": ", 1),
        lambda text: text + "\n",
        lambda text: text.replace('"attempt":1', '"attempt":1.0'),
        lambda text: text.replace('"attempt":1', '"attempt":"1"'),
        lambda text: text.replace('"attempt":1', '"attempt":true'),
        lambda text: text.replace('"attempt":1', '"attempt":1,"attempt":1'),
        lambda text: text.replace('"attempt":1', '"attempt":1,"extra":1'),
        lambda text: text.replace('"attempt":1,', ""),
        lambda text: text.replace('"run_id":"run"', '"run_id":"r\\u0075n"'),
        lambda text: text.replace('"kind":"norm"', '"kind":"l1"'),
        lambda text: text.replace('"kind":"norm"', '"kind":"norm","__class__":"os.system"'),
        lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")),
        lambda text: text[:-1],
        lambda text: "[" * 100_000,
        lambda text: "",
        lambda text: "null",
        lambda text: text.replace('"dim":12', f'"dim":{"9" * 5000}'),
        lambda text: text.replace('"seed":0', f'"seed":{"9" * 4000}'),
        lambda text: text.replace('"dropout":0.1', '"dropout":NaN'),
        lambda text: text.replace('"dropout":0.1', '"dropout":1e999'),
    ],
)
def test_there_is_one_way_to_write_a_plan(rewrite):
    text = round_plan().to_bytes().decode()
    changed = rewrite(text)
    assert changed != text
    if "9" * 4000 in changed and "9" * 5000 not in changed:
        # A long seed is canonical, if useless: it must come back as itself.
        assert RoundPlan.from_bytes(changed.encode()).to_bytes() == changed.encode()
        return
    with pytest.raises(PeerProtocolError) as caught:
        RoundPlan.from_bytes(changed.encode())
    assert "\n" not in str(caught.value)


@given(data=st.data())
def test_mutated_bytes_are_a_plan_or_a_protocol_error(data):
    raw = bytearray(round_plan(private_plan()).to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        cut = data.draw(st.integers(0, 8))
        raw[at : at + cut] = data.draw(st.binary(max_size=8))
    check_refused_or_canonical(bytes(raw))


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.text(max_size=4), st.integers(), max_size=2)
)


@given(value=leaves, data=st.data())
def test_any_value_in_any_place_is_a_plan_or_a_protocol_error(value, data):
    document = asdict(round_plan(private_plan()))
    place = document
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = value
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    check_refused_or_canonical(text.encode())


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(raw):
    with pytest.raises(PeerProtocolError):
        RoundPlan.from_bytes(raw)


def check_refused_or_canonical(raw):
    try:
        plan = RoundPlan.from_bytes(raw)
    except PeerProtocolError:
        return
    assert plan.to_bytes() == raw
