import pytest

from fedcore.engine import FaultyGrid
from fedcore.errors import BudgetExhaustedError
from fedcore.pipeline import RunPlan
from fedcore.privacy import DistributedGaussian, PrivacyLedger
from strategies.first import NO_DELTA, empty_ledger
from tests.fedcore.pipeline.rounds import bound_round, private_plan
from tests.strategies.federation import ROOMY, client_app, losing, play, stage_of


def plan_with(budget, noise=2.0, **changes):
    privacy = DistributedGaussian(noise_multiplier=noise, delta=1e-5, epsilon_budget=budget)
    return private_plan(privacy=privacy, **changes)


def cost_of(rounds, noise=2.0, **changes):
    bound = bound_round(plan_with(None, noise, **changes), clients=10, dim=43)
    return PrivacyLedger(delta=1e-5).projected_epsilon(bound.release(10), rounds)


def test_the_round_that_would_exceed_the_budget_is_never_sent():
    wires = []

    def keep(wire):
        wires.append(wire)
        return wire

    budget = (cost_of(2) + cost_of(3)) / 2
    with pytest.raises(
        BudgetExhaustedError, match=r"round 3 would raise epsilon.*privacy.epsilon_budget"
    ):
        play(plan=plan_with(budget), rounds=5, wrap=keep)
    rounds = {message.metadata.group_id for message in wires[0].sent}
    assert rounds == {"1", "2"}
    assert sum(stage_of(message) == "upload" for message in wires[0].sent) == 20


def test_a_budget_below_one_round_sends_nothing():
    wires = []

    def keep(wire):
        wires.append(wire)
        return wire

    with pytest.raises(BudgetExhaustedError, match="round 1 would raise epsilon from 0"):
        play(plan=plan_with(cost_of(1) * 0.99), wrap=keep)
    assert wires[0].crossed == []


def test_the_report_shows_what_was_spent_so_far():
    played = play(plan=plan_with(100.0), rounds=3)
    spent = [report.epsilon for report in played.reports]
    assert spent == pytest.approx([cost_of(1), cost_of(2), cost_of(3)])
    assert played.grid.ledger.epsilon == spent[-1]
    assert played.grid.ledger.epsilon_budget == 100.0
    assert [release.mechanism for release in played.grid.ledger.releases] == [
        "distributed_gaussian"
    ] * 3


def test_a_round_that_was_given_up_costs_nothing():
    plan = plan_with(cost_of(1) * 1.01, dropout=0.3, secagg=ROOMY.secagg)

    def script(message):
        late = message.metadata.group_id == "1"
        return losing(range(5), "upload")(message) if late else None

    played = play(client_app(seed=1), plan, rounds=2, wrap=lambda grid: FaultyGrid(grid, script))
    assert [report.survivors for report in played.reports] == [0, 10]
    assert [report.epsilon for report in played.reports] == [0.0, played.grid.ledger.epsilon]
    assert [release.round_number for release in played.grid.ledger.releases] == [2]


def test_survivors_cost_the_same_as_everybody():
    plan = plan_with(None, dropout=0.3, secagg=ROOMY.secagg)
    everybody = play(plan=plan)
    fewer = play(plan=plan, wrap=lambda grid: FaultyGrid(grid, losing(range(3), "upload")))
    assert fewer.reports[0].survivors == 7
    assert fewer.reports[0].epsilon == everybody.reports[0].epsilon


def test_a_second_run_on_the_same_ledger_continues_the_account():
    budget = cost_of(3) * 1.01
    first = play(plan=plan_with(budget), rounds=2)
    second = play(plan=plan_with(budget), ledger=first.grid.ledger)
    assert second.reports[0].epsilon == pytest.approx(cost_of(3))
    with pytest.raises(BudgetExhaustedError):
        play(plan=plan_with(budget), ledger=second.grid.ledger)


def test_more_clients_under_the_same_noise_cost_no_more():
    assert cost_of(1, noise=2.0) < cost_of(1, noise=1.0)
    assert cost_of(1) < cost_of(2) < 2 * cost_of(1)


def test_the_empty_ledger_has_the_plans_delta_and_budget():
    assert empty_ledger(RunPlan()) == PrivacyLedger(delta=NO_DELTA)
    assert empty_ledger(plan_with(3.0)) == PrivacyLedger(delta=1e-5, epsilon_budget=3.0)
