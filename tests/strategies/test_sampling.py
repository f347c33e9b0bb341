"""Who is drawn, who is really asked, and what the ledger says of it."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from fedcore.codec import Clip
from fedcore.crypto import ReplayedEntropy, SystemEntropy
from fedcore.engine import DropScript, InProcessGrid
from fedcore.job import Everyone, FixedSize, Poisson
from fedcore.pipeline import Modular, Uniform
from fedcore.privacy import CentralGaussian, DistributedGaussian, Drawn, PrivacyLedger
from fedcore.vectors import Entry, Layout
from strategies.cohort import CohortGrid
from strategies.factory import build_strategy
from strategies.sampling import Cohorts, draw_poisson, refused_size
from tests.strategies.federation import RecordingGrid, initial, plain_app
from tests.strategies.jobs import JOB, run_job

SMALL = Layout((Entry("weights", (100,), "float32"),))
LABELS = {1000 + n: f"device-{n}" for n in range(40)}
NOISE = {
    "clip": Clip(1.0),
    "quantize": Modular(20),
    "weighting": Uniform(),
    "clients": 12,
    "clients_per_round": 6,
    "sampling": Poisson(),
    "privacy": DistributedGaussian(noise_multiplier=8.0, delta=1e-3, amplification=True),
}


def cohorts(sampling, labels=LABELS, size=10, **changes):
    values = {"devices": len(labels), "seed": 1, "entropy": ReplayedEntropy(b"x")} | changes
    return Cohorts(labels, sampling, size=size, **values)


@given(rate=st.floats(1e-6, 1.0), seed=st.binary(max_size=8))
def test_a_poisson_draw_is_a_subset_and_does_not_depend_on_the_order_of_connecting(rate, seed):
    labels = list(LABELS.values())
    drawn = draw_poisson(labels, rate, ReplayedEntropy(seed))
    assert set(drawn) <= set(labels)
    assert len(set(drawn)) == len(drawn)
    assert drawn == draw_poisson(reversed(labels), rate, ReplayedEntropy(seed))


def test_everybody_is_drawn_at_rate_one_and_hardly_anybody_at_a_tiny_one():
    labels = list(LABELS.values())
    assert draw_poisson(labels, 1.0, SystemEntropy()) == sorted(labels)
    assert draw_poisson(labels, 1e-15, ReplayedEntropy(b"x")) == []


def test_devices_are_drawn_at_the_rate_and_independently_of_each_other():
    rounds = 4000
    sampled = cohorts(Poisson())
    chosen, pairs, sizes = Counter(), 0, []
    for _ in range(rounds):
        cohort = sampled.current()
        chosen.update(cohort)
        pairs += 1000 in cohort and 1001 in cohort
        sizes.append(len(cohort))
        sampled.finish()
    # Five standard deviations of a binomial variable each.
    assert all(abs(chosen[node] - rounds / 4) < 5 * (rounds * 3 / 16) ** 0.5 for node in LABELS)
    assert abs(pairs - rounds / 16) < 5 * (rounds * 15 / 256) ** 0.5
    mean = sum(sizes) / rounds
    variance = sum((size - mean) ** 2 for size in sizes) / (rounds - 1)
    assert abs(mean - 10) < 5 * (7.5 / rounds) ** 0.5
    assert abs(variance - 7.5) < 5 * 7.5 * (2 / rounds) ** 0.5


def test_a_second_look_is_not_a_second_draw():
    secret = cohorts(Poisson(), entropy=SystemEntropy())
    first = secret.current()
    assert all(secret.current() == first for _ in range(5))
    secret.finish()
    later = []
    for _ in range(5):
        later.append(secret.current())
        secret.finish()
    assert any(one != other for one, other in pairwise([first, *later]))


def test_what_was_executed_is_what_was_configured_if_exactly_the_draw_is_invited():
    poisson = cohorts(Poisson())
    assert poisson.executed(poisson.current()) == Drawn("poisson", 0.25, 40)
    fixed = cohorts(FixedSize())
    assert fixed.executed(reversed(fixed.current())) == Drawn(
        "fixed_size_without_replacement", 0.25, 40
    )
    everyone = cohorts(Everyone(), size=40)
    assert everyone.executed(everyone.current()) == Drawn("all", 1.0, 40)


@pytest.mark.parametrize("sampling", [Poisson(), FixedSize(), Everyone()])
def test_nothing_is_known_once_anybody_else_chose_too(sampling):
    drawn = cohorts(sampling, size=40 if sampling == Everyone() else 10)
    assert drawn.executed([]) == Drawn()  # before the draw
    nodes = drawn.current()
    assert drawn.executed(nodes[1:]) == Drawn()
    assert drawn.executed([*nodes, 7]) == Drawn()


def test_an_unmodified_strategy_trains_the_poisson_samples_and_skips_those_too_small():
    labels = {1000 + n: str(n) for n in range(6)}
    skipped = []
    with InProcessGrid(plain_app(), [{}] * 6, {}) as nodes:
        wire = RecordingGrid(nodes)
        grid = CohortGrid(
            wire,
            cohorts(Poisson(), labels, size=2),
            refusal=lambda size: "too few" if size < 2 else None,
            on_skip=lambda size, reason: skipped.append((size, reason)),
        )
        strategy = build_strategy(JOB.strategy, cohort=0)
        strategy.start(grid=grid, initial_arrays=initial(), num_rounds=30)
    replayed, expected = cohorts(Poisson(), labels, size=2), []
    for _ in range(30):
        expected.append(replayed.current())
        replayed.finish()
    held = [node for cohort in expected if len(cohort) >= 2 for node in sorted(cohort)]
    trained = [message.metadata.dst_node_id for message in wire.sent]
    assert Counter(trained) == Counter(held)
    assert [size for size, _ in skipped] == [len(c) for c in expected if len(c) < 2]
    assert dict(skipped) == {
        0: "nobody was drawn: raise clients_per_round",
        1: "the draw has a size (1) with which no round can be held: too few",
    }


def test_an_empty_evaluation_is_no_round():
    with InProcessGrid(plain_app(), [{}] * 40, {}) as nodes:
        drawn = cohorts(Poisson())
        grid = CohortGrid(nodes, drawn)
        first = grid.get_node_ids()
        content = RecordDict({"arrays": initial()})
        assert list(grid.send_and_receive([])) == []
        assert grid.get_node_ids() == first
        list(grid.send_and_receive([Message(content, node, "train") for node in first]))
        assert list(grid.send_and_receive([])) == []
        assert drawn.executed(first) == Drawn()  # the round is over, nobody asked for the next


def test_a_cohort_that_is_always_the_same_size_is_never_skipped():
    with InProcessGrid(plain_app(), [{}] * 40, {}) as nodes:
        grid = CohortGrid(nodes, cohorts(FixedSize(), size=3), refusal=lambda _: "never")
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
        assert strategy.start(grid=grid, initial_arrays=initial(), num_rounds=2).arrays is not None


@pytest.mark.parametrize("mechanism", [DistributedGaussian, CentralGaussian])
def test_the_ledger_says_how_the_devices_were_drawn_and_counts_it(mechanism):
    privacy = mechanism(noise_multiplier=8.0, delta=1e-3, amplification=True)
    noise = NOISE | {"privacy": privacy}
    run = run_job(**noise)
    ledger = run.last.ledger
    assert [release.sampling for release in ledger.releases] == ["poisson"] * 3
    assert len({release.clients for release in ledger.releases}) > 1
    assert {(r.sampling_rate, r.population) for r in ledger.releases} == {(0.5, 12)}
    assert all(release.amplification_claimed for release in ledger.releases)
    # The same noise, whatever the size of the cohort.
    assert {release.noise_multiplier for release in ledger.releases} == {8.0}
    unclaimed = run_job(**noise | {"privacy": replace(privacy, amplification=False)})
    assert [release.sampling for release in unclaimed.last.ledger.releases] == ["poisson"] * 3
    assert ledger.epsilon <= unclaimed.last.ledger.epsilon
    assert PrivacyLedger.from_json(ledger.to_json()) == ledger


def test_the_same_seed_draws_the_same_cohorts_and_another_seed_others():
    def sizes(seed):
        return [report.invited for report in run_job(seed=seed, rounds=4, **NOISE).reports]

    assert sizes(0) == sizes(0)
    assert sizes(0) != sizes(1)


def test_with_a_lost_device_the_sampling_is_unknown_and_nothing_is_claimed():
    faults = DropScript(per_round=1, stages=("upload",))
    many = {"clients": 20, "clients_per_round": 15}
    ledger = run_job(**NOISE | many, faults=faults, dropout=0.3).last.ledger
    assert [release.sampling for release in ledger.releases] == ["unknown"] * 3
    assert all(release.survivors == release.clients - 1 for release in ledger.releases)
    assert not any(release.amplification_claimed for release in ledger.releases)


@pytest.mark.parametrize(
    ("sampling", "size", "expected"),
    [
        (FixedSize(), 6, ("fixed_size_without_replacement", 0.75, 8)),
        (Everyone(), 8, ("all", 1.0, 8)),
    ],
)
def test_other_ways_to_choose_are_recorded_as_executed(sampling, size, expected):
    release = run_job(sampling=sampling, clients_per_round=size).last.ledger.releases[-1]
    assert (release.sampling, release.sampling_rate, release.population) == expected


def test_a_draw_that_is_too_small_for_masks_is_a_round_without_a_release():
    run = run_job(sampling=Poisson(), clients_per_round=2, rounds=12, seed=3)
    held = [report for report in run.reports if report.survivors]
    skipped = [report for report in run.reports if not report.survivors]
    assert skipped
    assert all("draw" in report.aborted[0] for report in skipped)
    assert all(report.attempts == 0 and not report.traffic.uploads for report in skipped)
    assert len(run.last.ledger.releases) == len(held)
    # Rounds are numbered through, held or not.
    assert [report.round_number for report in run.reports] == list(range(1, len(run.reports) + 1))
    assert [r.round_number for r in run.last.ledger.releases] == [r.round_number for r in held]


def test_the_reason_why_a_size_does_not_fit_is_given():
    assert refused_size(JOB.plan, [SMALL], 6) is None
    assert "fewer than 2 clients" in refused_size(JOB.plan, [SMALL], 1)
