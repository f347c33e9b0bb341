"""Distributed differential privacy: mechanisms, samplers, calibration, accounting, ledger."""

from fedcore.privacy.accounting import (
    epsilon,
    noise_multiplier_for,
    sampling_delta,
    zcdp_epsilon,
)
from fedcore.privacy.calibration import Calibration, calibrate
from fedcore.privacy.ledger import PrivacyLedger
from fedcore.privacy.matrix import CorrelatedNoise, MatrixGaussian, stream_name
from fedcore.privacy.mechanisms import (
    Central,
    CentralGaussian,
    DiscreteGaussianNoise,
    Distributed,
    DistributedGaussian,
    DistributedSkellam,
    Mechanism,
    NoPrivacy,
    SkellamNoise,
    colluding,
    stated_noise,
)
from fedcore.privacy.releases import Release, epsilon_of
from fedcore.privacy.samplers import (
    IntegerTable,
    discrete_gaussian_table,
    sample,
    skellam_table,
)
from fedcore.privacy.sampling import Drawn, Sampling
from fedcore.privacy.target import Found, least_noise

__all__ = [
    "Calibration",
    "Central",
    "CentralGaussian",
    "CorrelatedNoise",
    "DiscreteGaussianNoise",
    "Distributed",
    "DistributedGaussian",
    "DistributedSkellam",
    "Drawn",
    "Found",
    "IntegerTable",
    "MatrixGaussian",
    "Mechanism",
    "NoPrivacy",
    "PrivacyLedger",
    "Release",
    "Sampling",
    "SkellamNoise",
    "calibrate",
    "colluding",
    "discrete_gaussian_table",
    "epsilon",
    "epsilon_of",
    "least_noise",
    "noise_multiplier_for",
    "sample",
    "sampling_delta",
    "skellam_table",
    "stated_noise",
    "stream_name",
    "zcdp_epsilon",
]
