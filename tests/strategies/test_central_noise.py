"""Whole runs in which the coordinator adds the noise."""

import numpy as np
import pytest

from clients import DevicePolicy
from fedcore.codec import Clip
from fedcore.crypto import ReplayedEntropy
from fedcore.engine import FaultyGrid
from fedcore.errors import BudgetExhaustedError
from fedcore.pipeline import FreshNoise, Modular, Uniform
from fedcore.privacy import CentralGaussian, DistributedGaussian, PrivacyLedger
from tests.fedcore.pipeline.rounds import bound_round, private_plan
from tests.strategies.federation import OPEN, ROOMY, client_app, losing, play
from tests.strategies.jobs import CLEAR, run_job

NOISE = {"noise_multiplier": 0.3, "delta": 1e-5}
CENTRAL = {"privacy": CentralGaussian(**NOISE), "weighting": Uniform(), "clip": Clip(1.0)}
SHARED = CENTRAL | {"privacy": DistributedGaussian(**NOISE)}


def plan_with(noise=2.0, budget=None, **changes):
    privacy = CentralGaussian(noise_multiplier=noise, delta=1e-5, epsilon_budget=budget)
    return private_plan(privacy=privacy, **changes)


def replayed(seed):
    return FreshNoise(ReplayedEntropy(seed))


def test_masked_and_unmasked_runs_publish_the_same_bits():
    masked, clear = run_job(**CENTRAL), run_job(**CENTRAL, **CLEAR)
    assert masked.model == clear.model
    assert masked.reports[0].neighbours > 0
    assert clear.reports[0].neighbours == 0
    assert masked.last.ledger.epsilon == clear.last.ledger.epsilon < np.inf


def test_a_run_learns_as_well_as_with_shares_of_noise_on_the_devices():
    central, shared = run_job(rounds=8, **CENTRAL), run_job(rounds=8, **SHARED)
    assert central.accuracy > 0.75
    assert central.accuracy > shared.accuracy - 0.03
    assert central.last.ledger.epsilon == pytest.approx(shared.last.ledger.epsilon, rel=1e-6)


def test_what_is_published_differs_from_the_sum_by_noise_alone():
    plan = plan_with(quantize=Modular(24), clip=Clip(1.0))
    one, two = (
        play(client_app(seed=1), plan, noise=replayed(seed)).arrays for seed in (b"1", b"2")
    )
    apart = np.concatenate([(one[name] - two[name]).ravel() for name in one]) * 10
    # Two independent draws of z * clip in a sum of ten; 43 weights.
    assert apart.std() == pytest.approx(2.0 * 2**0.5, rel=0.35)


def test_by_default_the_noise_is_the_operating_systems():
    runs = [play(client_app(seed=1), plan_with()).arrays["w"].tobytes() for _ in range(2)]
    assert runs[0] != runs[1]


def test_a_round_that_was_given_up_publishes_nothing_and_costs_nothing():
    plan = plan_with(dropout=0.3, secagg=ROOMY.secagg)

    def script(message):
        late = message.metadata.group_id == "1"
        return losing(range(5), "upload")(message) if late else None

    played = play(client_app(seed=1), plan, rounds=2, wrap=lambda grid: FaultyGrid(grid, script))
    assert [report.survivors for report in played.reports] == [0, 10]
    assert played.reports[0].epsilon == 0.0
    assert [release.round_number for release in played.grid.ledger.releases] == [2]
    release = bound_round(plan, clients=10, dim=43).release(10)
    once = PrivacyLedger(delta=1e-5).projected_epsilon(release, 1)
    assert played.grid.ledger.epsilon == pytest.approx(once)


def test_drawn_noise_is_what_stands_between_the_sum_and_the_strategy():
    drawn = []

    class Noted:
        def draw(self, bound, /):
            drawn.append((bound.plan.round_number, bound.plan.attempt))
            return np.full(bound.update_dim, 5, np.int64)

    plan = plan_with(quantize=Modular(20), clip=Clip(100.0))
    played = play(client_app(seed=1), plan, rounds=3, noise=Noted())
    assert drawn == [(1, 1), (2, 1), (3, 1)]
    assert len(played.grid.ledger.releases) == 3


def test_the_budget_holds_before_anything_is_sent():
    release = bound_round(plan_with(), clients=10, dim=43).release(10)
    cost = PrivacyLedger(delta=1e-5).projected_epsilon(release, 1)
    played = play(client_app(seed=1), plan_with(budget=cost * 1.01))
    assert played.grid.ledger.epsilon == pytest.approx(cost)
    with pytest.raises(BudgetExhaustedError, match="round 1 would raise epsilon from 0"):
        play(client_app(seed=1), plan_with(budget=cost * 0.99))


def test_devices_that_demand_noise_of_their_own_do_not_take_part():
    strict = client_app(seed=1, policy=DevicePolicy(minimum_noise_multiplier=0.5))
    refused = play(strict, plan_with(2.0))
    assert refused.reports[0].survivors == 0
    assert refused.grid.ledger.releases == ()
    assert play(client_app(seed=1, policy=OPEN), plan_with(2.0)).reports[0].survivors == 10
