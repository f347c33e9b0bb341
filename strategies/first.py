"""What a run begins with, before anything was released: its ledger, and its noise."""

from __future__ import annotations

from fedcore.crypto import SystemEntropy
from fedcore.pipeline import CoordinatorNoise, FreshNoise, RunPlan
from fedcore.privacy import MatrixGaussian, NoPrivacy, PrivacyLedger
from strategies.matrix_run import MatrixRun

NO_DELTA = 1e-5
"""Shown beside an infinite epsilon, where it means nothing."""


def noise_of(plan: RunPlan) -> CoordinatorNoise:
    """Return the noise of a real coordinator whose run ends with its process."""
    if isinstance(plan.privacy, MatrixGaussian):
        return MatrixRun.start(plan.privacy, SystemEntropy())
    return FreshNoise(SystemEntropy())


def empty_ledger(plan: RunPlan) -> PrivacyLedger:
    """Return the ledger of a run that has released nothing yet."""
    if isinstance(plan.privacy, NoPrivacy):
        return PrivacyLedger(delta=NO_DELTA)
    return PrivacyLedger(delta=plan.privacy.delta, epsilon_budget=plan.privacy.epsilon_budget)
