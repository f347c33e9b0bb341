"""Shadow models through the real pipeline, and the likelihood ratios of their scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from experiments.audit.membership import (
    audit_membership,
    confidences,
    curve,
    likelihood_ratios,
)
from experiments.audit.settings import MembershipSettings
from fedcore.codec import Clip
from tests.experiments.audit.jobs import SKEWED, noisy


@pytest.fixture(scope="module")
def open_audit():
    return audit_membership(SKEWED, MembershipSettings(12), quiet=True)


def test_without_noise_members_are_told_apart(open_audit):
    assert open_audit.auc > 0.75
    assert open_audit.auc - 3 * open_audit.auc_error > 0.5
    assert open_audit.balanced_accuracy > 0.7
    assert open_audit.members + open_audit.strangers == 12 * 16


def test_with_enough_noise_the_attack_guesses():
    found = audit_membership(noisy(SKEWED, 8.0, clip=Clip(1.0)), MembershipSettings(12), quiet=True)
    assert found.epsilon < 1
    assert abs(found.auc - 0.5) < 0.1
    assert found.bound.epsilon <= found.epsilon


def test_two_processes_find_what_one_finds():
    job = replace(SKEWED, rounds=1)
    one, two = (audit_membership(job, MembershipSettings(4, n), quiet=True) for n in (1, 2))
    assert one.auc == two.auc
    np.testing.assert_array_equal(one.hits, two.hits)


def test_scores_that_depend_on_membership_give_it_away():
    rng = np.random.default_rng(0)
    coins = rng.random((20, 200)) < 0.5
    level = 5 * rng.standard_normal(200)  # devices differ by far more than membership does
    scores = level + 2 * coins + rng.standard_normal(coins.shape)
    ratios = likelihood_ratios(scores, coins)
    assert roc_auc_score(coins.ravel(), ratios.ravel()) > 0.88
    assert roc_auc_score(coins.ravel(), scores.ravel()) < 0.65


def test_scores_without_a_signal_give_nothing_away():
    rng = np.random.default_rng(1)
    coins = rng.random((12, 2000)) < 0.5
    ratios = likelihood_ratios(rng.standard_normal(coins.shape), coins)
    assert abs(roc_auc_score(coins.ravel(), ratios.ravel()) - 0.5) < 0.02


def test_a_model_is_attacked_without_its_own_coins():
    rng = np.random.default_rng(2)
    coins = rng.random((6, 30)) < 0.5
    scores = rng.standard_normal(coins.shape)
    before = likelihood_ratios(scores, coins)[3]
    coins[3] = ~coins[3]
    np.testing.assert_array_equal(likelihood_ratios(scores, coins)[3], before)


def test_the_confidence_of_a_certain_model_does_not_overflow():
    model = torch.nn.Linear(1, 3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[500.0], [0.0], [-500.0]]))
        model.bias.zero_()
    x = np.ones((2, 1), np.float32)
    found = confidences(model, x, np.array([0, 2]))
    np.testing.assert_allclose(found, [500.0, -1000.0])


def test_the_curve_is_that_of_its_definition():
    scores, members = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, False, True, False])
    false_alarms, hits, area = curve(scores, members)
    np.testing.assert_allclose(false_alarms, [0, 0, 0.5, 0.5, 1])
    np.testing.assert_allclose(hits, [0, 0.5, 0.5, 1, 1])
    assert area == pytest.approx(0.75)
    assert np.isnan(curve(scores, np.ones(4, bool))[2])
