"""Losing clients never lowers the noise of a completed round below what it was sold for."""

from math import sqrt

from hypothesis import assume, given
from hypothesis import strategies as st

from fedcore.codec import Clip
from fedcore.errors import ConfigurationError
from fedcore.pipeline import Modular, NoSecAgg, RunPlan, Uniform
from fedcore.privacy import (
    DistributedGaussian,
    DistributedSkellam,
    discrete_gaussian_table,
    skellam_table,
)
from tests.fedcore.pipeline.rounds import bound_round
from tests.fedcore.privacy.test_accounting import probabilities

mechanisms = st.sampled_from([DistributedGaussian, DistributedSkellam])


@given(
    mechanism=mechanisms,
    clients=st.integers(1, 400),
    dropout=st.floats(0.0, 0.95),
    colluders=st.floats(0.0, 0.9),
    noise=st.floats(0.3, 20.0),
    bits=st.integers(16, 28),
    lost=st.floats(0.0, 1.0),
)
def test_losing_clients_never_lowers_the_noise_below_the_calibrated_level(
    mechanism, clients, dropout, colluders, noise, bits, lost
):
    run = RunPlan(
        clip=Clip(1.0),
        quantize=Modular(bits),
        privacy=mechanism(noise_multiplier=noise, delta=1e-5, colluders=colluders),
        weighting=Uniform(),
        secagg=NoSecAgg(),
        dropout=dropout,
        metric_slots=0,
    )
    try:
        bound = bound_round(run, clients=clients, dim=64)
    except ConfigurationError:
        assume(False)
    calibration, least = bound.calibration, bound.minimum_survivors
    # Any number of survivors with which the round is not aborted.
    survivors = least + round(lost * (clients - least))
    honest = survivors - calibration.colluders
    assert honest >= 1
    added = sqrt(honest) * calibration.sigma_local
    assert added >= noise * calibration.rounded_norm * (1 - 1e-9)
    # The ledger charges what was calibrated, however many survived, and accepts the release.
    release = bound.release(survivors)
    assert release.noise_multiplier == noise
    assert release.curve.tolist() == bound.release(clients).curve.tolist()


@given(mechanism=mechanisms, sigma=st.floats(0.5, 60.0))
def test_a_share_has_the_variance_that_the_calibration_counts_on(mechanism, sigma):
    table = (
        discrete_gaussian_table(sigma)
        if mechanism is DistributedGaussian
        else skellam_table(sigma**2)
    )
    values = range(table.lowest, table.highest + 1)
    variance = sum(p * x * x for p, x in zip(probabilities(table), values, strict=True))
    # A discrete Gaussian has at most the variance of its parameter, and nearly that from
    # sigma = 1 on; [KLS21, Proposition 14] is stated for the parameter.
    low = 1 - 1e-6 if sigma > 1 or mechanism is DistributedSkellam else 0.6
    assert low * sigma**2 <= variance <= (1 + 1e-9) * sigma**2
