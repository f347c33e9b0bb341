"""The account of a run: append-only, within its budget, readable by nobody else's parser."""

import json
from dataclasses import FrozenInstanceError, asdict, replace
from math import exp
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import BudgetExhaustedError, ConfigurationError
from fedcore.privacy import (
    DistributedGaussian,
    DistributedSkellam,
    NoPrivacy,
    PrivacyLedger,
    Release,
    calibrate,
    discrete_gaussian_table,
    epsilon,
    epsilon_of,
    skellam_table,
)
from fedcore.privacy.accounting import fixed_size_gaussian, gaussian, poisson_gaussian

DELTA = 1e-5
CALIBRATION = calibrate(
    clip=0.5,
    dim=4096,
    peak=1 / 64,
    clients=100,
    minimum_survivors=80,
    noise_multiplier=4.0,
    ring_bits=20,
    colluders=5,
)
MECHANISMS = {
    "none": NoPrivacy(),
    "distributed_gaussian": DistributedGaussian(noise_multiplier=4.0, delta=DELTA),
    "distributed_skellam": DistributedSkellam(noise_multiplier=4.0, delta=DELTA),
}
every_mechanism = pytest.mark.parametrize("kind", ["distributed_gaussian", "distributed_skellam"])


def of_sum(round_number=1, kind="distributed_gaussian", survivors=90):
    return Release.of_sum(round_number, MECHANISMS[kind], CALIBRATION, survivors=survivors)


def dp_sgd(round_number=1, steps=100):
    return Release(
        round_number=round_number,
        unit="example",
        mechanism="gaussian",
        noise_multiplier=1.1,
        sampling="poisson",
        sampling_rate=0.01,
        amplification_claimed=True,
        steps=steps,
    )


def ledger_of(*releases, budget=None):
    return PrivacyLedger(DELTA, budget, releases)


def test_an_empty_ledger_has_spent_nothing():
    assert PrivacyLedger(DELTA).epsilon == 0


def test_a_release_without_noise_shows_an_infinite_epsilon():
    ledger = PrivacyLedger(DELTA).record(of_sum(1)).record(of_sum(2, "none"))
    assert ledger.epsilon == float("inf")
    assert ledger.releases[1].noise_multiplier == 0


@every_mechanism
def test_a_fine_ring_makes_the_cost_that_of_the_central_gaussian(kind):
    ledger = ledger_of(*(of_sum(i, kind) for i in range(1, 21)))
    assert ledger.epsilon == pytest.approx(epsilon(20 * gaussian(4.0), DELTA), rel=1e-3)


def test_the_cost_does_not_depend_on_how_many_beyond_the_minimum_survive():
    assert ledger_of(of_sum(survivors=80)).epsilon == ledger_of(of_sum(survivors=100)).epsilon


def test_recording_returns_a_new_ledger_and_leaves_the_old_one_alone():
    empty = PrivacyLedger(DELTA)
    one = empty.record(of_sum(1))
    assert (len(empty.releases), len(one.releases)) == (0, 1)
    assert empty.epsilon == 0 < one.epsilon
    with pytest.raises(FrozenInstanceError):
        one.releases = ()
    with pytest.raises(ValueError, match="read-only"):
        one.releases[0].curve[0] = 0


@given(rounds=st.integers(1, 30), kind=st.sampled_from(["distributed_gaussian", "none"]))
def test_recording_one_by_one_costs_what_all_cost_together(rounds, kind):
    releases = [of_sum(i, kind) for i in range(1, rounds + 1)]
    ledger = PrivacyLedger(DELTA)
    for release in releases:
        ledger = ledger.record(release)
    assert ledger == ledger_of(*releases)
    assert ledger.epsilon == pytest.approx(epsilon_of(releases, DELTA), rel=1e-12)
    assert ledger.epsilon == pytest.approx(
        PrivacyLedger(DELTA).projected_epsilon(releases[0], rounds), rel=1e-12
    )


@given(budget=st.floats(0.5, 20.0), kind=st.sampled_from(list(MECHANISMS)))
def test_the_budget_is_never_exceeded_and_is_used_up(budget, kind):
    ledger, following = PrivacyLedger(DELTA, budget), of_sum(1, kind)
    while ledger.projected_epsilon(following, 1) <= budget:
        ledger = ledger.record(following)
        following = of_sum(len(ledger.releases) + 1, kind)
    assert ledger.epsilon <= budget
    with pytest.raises(BudgetExhaustedError, match="stop here"):
        ledger.record(following)


def test_the_refusal_names_the_round_what_is_spent_and_the_budget():
    ledger = ledger_of(of_sum(1), budget=1.2)
    with pytest.raises(BudgetExhaustedError) as refusal:
        ledger.record(of_sum(2))
    assert str(refusal.value) == (
        f"round 2 would raise epsilon from {ledger.epsilon:.6g} to "
        f"{ledger.projected_epsilon(of_sum(2), 1):.6g}, but the budget is 1.2: stop here, or "
        "raise privacy.epsilon_budget"
    )


def test_projecting_counts_what_is_spent_already():
    ledger = ledger_of(of_sum(1), of_sum(2))
    assert ledger.projected_epsilon(of_sum(3), 0) == ledger.epsilon
    assert ledger.projected_epsilon(of_sum(3), 2) == pytest.approx(
        epsilon_of([of_sum(i) for i in range(4)[1:]] + [of_sum(4)], DELTA), rel=1e-12
    )


def test_replacing_the_releases_recounts_them():
    spent = ledger_of(*(of_sum(i) for i in range(1, 6)))
    assert replace(spent, releases=()).epsilon == 0
    assert replace(spent, epsilon_budget=100.0).epsilon == spent.epsilon


def test_a_ledger_that_exceeds_its_budget_cannot_be_built():
    with pytest.raises(ConfigurationError, match="epsilon must be at most the budget"):
        ledger_of(of_sum(1), budget=0.1)


def test_rounds_of_dp_sgd_compose_per_example():
    ledger = ledger_of(dp_sgd(1, steps=100)).record(dp_sgd(2, steps=300))
    assert ledger.epsilon == pytest.approx(epsilon(400 * poisson_gaussian(1.1, 0.01), DELTA))


def test_devices_and_examples_are_never_added_up():
    with pytest.raises(ConfigurationError, match="keep one ledger for each"):
        ledger_of(of_sum(1)).record(dp_sgd(2))


@every_mechanism
def test_claiming_amplification_lowers_the_cost_of_a_poisson_cohort(kind):
    plain = replace(
        of_sum(1, kind, survivors=100), sampling="poisson", sampling_rate=0.05, population=2000
    )
    claimed = replace(plain, amplification_claimed=True)
    assert ledger_of(claimed).epsilon < 0.5 * ledger_of(plain).epsilon
    assert ledger_of(plain).epsilon == ledger_of(of_sum(1, kind)).epsilon


@pytest.mark.parametrize("sampling", ["all", "fixed_size_without_replacement", "unknown"])
def test_amplification_is_refused_for_a_cohort_that_is_no_poisson_sample(sampling):
    with pytest.raises(ConfigurationError, match="amplification must not be claimed"):
        replace(
            of_sum(1, survivors=100), sampling=sampling, population=2000, amplification_claimed=True
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"survivors": 99}, "99 survivors out of 100 devices drawn"),
        ({"population": 0}, "unknown population"),
        ({"population": 99}, "population must be at least clients=100, got 99"),
    ],
)
def test_amplification_is_refused_for_what_is_no_uniform_choice(change, message):
    drawn = replace(of_sum(1, survivors=100), sampling="poisson", population=2000)
    with pytest.raises(ConfigurationError, match=message):
        replace(drawn, amplification_claimed=True, **change)


@every_mechanism
def test_amplification_counts_the_size_that_shows_and_twice_the_sensitivity(kind):
    drawn = replace(of_sum(1, kind, survivors=100), sampling="poisson", sampling_rate=0.9)
    few = replace(drawn, population=1000, amplification_claimed=True)
    # The rate of the draw does not matter once the size of the sample is known.
    assert few.curve.tolist() == replace(few, sampling_rate=0.1).curve.tolist()
    expected = fixed_size_gaussian(CALIBRATION.noise_multiplier, 100, 1000)
    # dp-accounting's bound is for the Gaussian alone, and a little sharper.
    small = slice(10, 40)
    assert (few.curve[small] > 0.9 * expected[small]).all()
    assert (few.curve[small] < 1.3 * expected[small]).all()
    # Half of the population: sampling helps less than replacing costs.
    half = replace(drawn, population=200, amplification_claimed=True)
    assert half.curve.tolist() == drawn.curve.tolist()


@every_mechanism
def test_the_distance_of_the_noise_tables_is_charged_to_delta(kind):
    release = of_sum(1, kind)
    table = (
        discrete_gaussian_table(CALIBRATION.sigma_local)
        if kind == "distributed_gaussian"
        else skellam_table(CALIBRATION.sigma_local**2)
    )
    assert release.distance == pytest.approx(100 * 4096 * table.distance, rel=1e-12)
    ledger = ledger_of(release, of_sum(2, kind))
    expected = (1 + exp(ledger.epsilon)) * 2 * release.distance
    assert ledger.sampler_delta == pytest.approx(expected, rel=1e-12)
    assert 0 < ledger.sampler_delta < 1e-20
    assert ledger_of().sampler_delta == 0


def test_nothing_is_charged_where_no_table_is_used_or_nothing_is_promised():
    assert ledger_of(dp_sgd()).sampler_delta == 0
    assert ledger_of(of_sum(1, "none")).sampler_delta == 0
    loud = ledger_of(replace(of_sum(1), noise_multiplier=0.02))
    assert loud.epsilon > 700
    assert loud.sampler_delta == 1


def test_noise_that_the_survivors_cannot_have_added_is_refused():
    of_sum(survivors=75)  # without colluders, exactly the calibrated noise
    with pytest.raises(ConfigurationError, match=r"74 survivors with sigma_local=.* add at most"):
        of_sum(survivors=74)


@pytest.mark.parametrize(
    "change",
    [
        {"round_number": 0},
        {"unit": "server"},
        {"mechanism": "laplace"},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"norm": 0.0},
        {"norm": float("inf")},
        {"sigma_local": -1.0},
        {"scale": 1e300},
        {"dim": 0},
        {"dim": 2**60},
        {"clients": 0},
        {"survivors": 101},
        {"sampling": "often"},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"steps": 0},
    ],
)
def test_a_release_out_of_range_is_refused_by_name(change):
    (name,) = change
    with pytest.raises(ConfigurationError, match=name):
        replace(of_sum(), **change)


@pytest.mark.parametrize(
    ("delta", "budget"), [(0.0, None), (1.0, None), (DELTA, 0.0), (DELTA, float("inf"))]
)
def test_a_ledger_out_of_range_is_refused(delta, budget):
    with pytest.raises(ConfigurationError, match=r"privacy\.(delta|epsilon_budget) must be in"):
        PrivacyLedger(delta, budget)


@given(
    delta=st.floats(1e-12, 0.5),
    budget=st.none() | st.floats(1e6, 1e9),
    kinds=st.lists(st.sampled_from(["distributed_gaussian", "distributed_skellam"]), max_size=5),
    survivors=st.integers(80, 100),
)
def test_json_brings_back_the_same_ledger(delta, budget, kinds, survivors):
    releases = tuple(of_sum(i, kind, survivors) for i, kind in enumerate(kinds, start=1))
    ledger = PrivacyLedger(delta, budget, releases)
    restored = PrivacyLedger.from_json(ledger.to_json())
    assert restored == ledger
    assert restored.epsilon == ledger.epsilon
    assert restored.to_json() == ledger.to_json()
    assert PrivacyLedger.from_json(ledger.to_json().encode()) == ledger


def test_json_holds_every_field_of_a_release():
    document = json.loads(ledger_of(dp_sgd(), budget=50.0).to_json())
    assert document == {
        "format": "fedcore/ledger/v2",
        "delta": DELTA,
        "epsilon_budget": 50.0,
        "releases": [asdict(dp_sgd())],
    }


DOCUMENT = json.loads(ledger_of(of_sum(1), budget=50.0).to_json())
RELEASE = DOCUMENT["releases"][0]


def changed(**change):
    return json.dumps({**DOCUMENT, **change})


def changed_release(**change):
    return changed(releases=[{**RELEASE, **change}])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "1",
        "\xff",
        b"\xff\xfe\xff",
        "[" * 100_000,
        "1" * 10_000,
        '{"a": 1, "a": 2}',
        changed().replace("{", '{"delta": 0.1, ', 1),
        changed(format="fedcore/ledger/v1"),
        changed(format="fedcore/ledger/v3"),
        changed(format=None),
        changed(delta="1e-5"),
        changed(delta=True),
        changed(delta=None),
        changed(delta=2),
        changed(epsilon_budget=float("nan")),
        changed(epsilon_budget=float("inf")),
        changed(epsilon_budget=-1),
        changed(epsilon_budget=1e-9),
        changed(releases=None),
        changed(releases={}),
        changed(releases=[1]),
        changed(releases=[RELEASE, {}]),
        changed(extra=1),
        json.dumps({"line\nbreak": 1}),
        changed_release(extra=1),
        changed_release(unit=1),
        changed_release(unit="line\nbreak"),
        changed_release(round_number=1.0),
        changed_release(round_number=True),
        changed_release(round_number=10**400),
        changed_release(norm=10**400),
        changed_release(norm="1"),
        changed_release(norm=None),
        changed_release(amplification_claimed=0),
        changed_release(amplification_claimed=True),
        changed_release(noise_multiplier=1e9),
        changed_release(sigma_local=0.1),
        changed_release(steps=-1),
        changed(epsilon_budget=50).replace("50", "1e999"),
    ],
    ids=lambda text: str(text[:40]),
)
def test_anything_but_a_ledger_is_refused_in_one_line(text):
    with pytest.raises(ConfigurationError) as refusal:
        PrivacyLedger.from_json(text)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_ledger_of_an_older_format_is_refused_by_its_format_and_not_by_its_fields():
    newer = {"participations", "separation", "stream", "population"}
    release = {name: value for name, value in RELEASE.items() if name not in newer}
    older = changed(format="fedcore/ledger/v1", releases=[release])
    with pytest.raises(ConfigurationError, match=r"format must be .*v2', got .*v1': read it with"):
        PrivacyLedger.from_json(older)


TEXT = ledger_of(of_sum(1), of_sum(2, "distributed_skellam"), budget=50.0).to_json()


@given(position=st.integers(0, len(TEXT) - 1), character=st.characters(codec="utf-8"))
def test_a_damaged_ledger_is_refused_or_still_a_ledger(position, character):
    damaged = TEXT[:position] + character + TEXT[position + 1 :]
    try:
        ledger = PrivacyLedger.from_json(damaged)
    except ConfigurationError:
        return
    assert ledger.epsilon <= ledger.epsilon_budget


def test_accounting_for_a_round_takes_milliseconds_however_many_came_before():
    ledger = PrivacyLedger(DELTA, 1e6).record(of_sum(1))
    start = perf_counter()
    for round_number in range(2, 402):
        ledger = ledger.record(of_sum(round_number))
        assert ledger.epsilon > 0
    assert (perf_counter() - start) / 400 < 0.005
