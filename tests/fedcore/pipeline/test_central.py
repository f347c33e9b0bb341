"""The coordinator's noise: what is published is the sum and one draw, exactly."""

from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedcore.codec import Clip
from fedcore.codec.rotate import rotate
from fedcore.crypto import ReplayedEntropy, SystemEntropy
from fedcore.errors import ConfigurationError, LocalProtocolError
from fedcore.pipeline import FreshNoise, Modular, NoSecAgg, RunPlan, decode_sum
from fedcore.pipeline.central import add_noise
from fedcore.privacy import (
    CentralGaussian,
    PrivacyLedger,
    Release,
    calibrate,
    discrete_gaussian_table,
    sample,
)
from fedcore.privacy.samplers import MAX_SIGMA
from tests.fedcore.pipeline.rounds import bound_round, local, private_plan, upload_all

NOISE = FreshNoise(ReplayedEntropy(b"coordinator"))


def central_plan(noise=1.0, **changes) -> RunPlan:
    privacy = CentralGaussian(noise_multiplier=noise, delta=1e-5)
    return private_plan(**({"privacy": privacy, "quantize": Modular(20)} | changes))


def exact_pmf(sigma, reach):
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def test_the_released_noise_has_the_exact_distribution():
    # A narrow ring: sigma is some thirty integer units, and every value has its own bin.
    bounds = [
        bound_round(central_plan(0.25, quantize=Modular(8)), clients=10, dim=4096, attempt=attempt)
        for attempt in range(1, 51)
    ]
    sigma = bounds[0].calibration.sigma_local
    assert 20 < sigma < 40
    released = np.concatenate(
        [bound.ring.lift(add_noise(bound, bound.ring.zeros(4096), NOISE)) for bound in bounds]
    )
    reach = int(3 * sigma)
    expected = exact_pmf(sigma, int(12 * sigma))
    middle = expected[len(expected) // 2 - reach : len(expected) // 2 + reach + 1]
    found = np.array([(released == value).sum() for value in range(-reach, reach + 1)])
    rest = 1 - middle.sum()
    counts = [*found, len(released) - found.sum()]
    assert chisquare(counts, [*(middle * len(released)), rest * len(released)]).pvalue > 1e-4


def test_what_is_decoded_is_the_rounded_sum_and_the_one_draw():
    bound = bound_round(central_plan(), clients=4, dim=1024)
    zeros, uploads = upload_all(bound, [local(np.zeros(1024)) for _ in range(4)])
    assert not zeros.any()  # the devices add nothing of their own
    mean = decode_sum(bound, zeros, 4, [()] * 4, NOISE)
    seed = bound.plan.stage_seed("rotation")
    integers = rotate(mean.delta * 4.0, seed) * bound.calibration.scale
    source = NOISE.entropy.child("round=1/attempt=1")
    table = discrete_gaussian_table(bound.calibration.sigma_local)
    np.testing.assert_allclose(integers, sample(table, source.draw("noise", 32), 1024), atol=1e-2)
    assert [upload.metric_names for upload in uploads] == [()] * 4


@pytest.mark.parametrize("survivors", [3, 4, 5])
def test_the_noise_is_the_same_whoever_survives(survivors):
    bound = bound_round(
        central_plan(0.8, clip=Clip(2.0), dropout=0.4, secagg=NoSecAgg()), clients=5, dim=20_000
    )
    mean = decode_sum(bound, bound.ring.zeros(20_000), survivors, [()], NOISE)
    assert mean.delta.std() * survivors == pytest.approx(0.8 * 2.0, rel=0.03)
    assert bound.calibration.noise_multiplier_at(survivors) == pytest.approx(0.8, rel=1e-12)


@given(
    total=st.lists(st.integers(0, 2**20 - 1), min_size=12, max_size=12),
    own=st.lists(st.integers(-(2**19), 2**19), min_size=12, max_size=12),
)
def test_a_device_moves_the_released_sum_by_its_vector_also_where_it_wraps_around(total, own):
    bound = bound_round(central_plan())
    without = bound.ring.reduce(np.array(total))
    vector = bound.ring.reduce(np.array(own))
    moved = add_noise(bound, bound.ring.reduce(without + vector), NOISE)
    difference = bound.ring.reduce(moved - add_noise(bound, without, NOISE))
    np.testing.assert_array_equal(difference, vector)


def test_attempts_and_rounds_draw_anew():
    plan = central_plan(secagg=NoSecAgg())
    bounds = [
        bound_round(plan, dim=64, round_number=number, attempt=attempt)
        for number in (1, 2)
        for attempt in (1, 2)
    ]
    assert len({NOISE.draw(bound).tobytes() for bound in bounds}) == 4
    system = FreshNoise(SystemEntropy())
    assert system.draw(bounds[0]).tobytes() != system.draw(bounds[0]).tobytes()


def test_without_noise_nothing_is_decoded():
    bound = bound_round(central_plan())
    total, _ = upload_all(bound, [local(np.zeros(12)) for _ in range(5)])
    with pytest.raises(LocalProtocolError, match="publishes a sum with the coordinator's noise"):
        decode_sum(bound, total, 5, [()])
    with pytest.raises(LocalProtocolError, match="for calibrated rounds of"):
        NOISE.draw(replace(bound, calibration=None))


def test_the_ledger_counts_one_gaussian_a_round():
    bound = bound_round(central_plan(2.0), clients=5)
    release = bound.release(4)
    assert release.mechanism == "central_gaussian"
    assert release.sigma_local == bound.calibration.sigma_local
    assert release.sigma_local == pytest.approx(2.0 * release.norm, rel=1e-12)
    accountant = dp_accounting.rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(2.0), 30)
    ours = PrivacyLedger(delta=1e-5).projected_epsilon(release, 30)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    restored = PrivacyLedger.from_json(PrivacyLedger(delta=1e-5).record(release).to_json())
    assert restored.releases == (release,)


def test_more_noise_than_the_coordinator_adds_cannot_be_claimed():
    values = {"round_number": 1, "unit": "device", "mechanism": "central_gaussian", "norm": 10.0}
    many = {"clients": 100, "survivors": 100}
    assert Release(**values, **many, noise_multiplier=2.0, sigma_local=20.0).noise_multiplier == 2
    with pytest.raises(ConfigurationError, match="a noise of 20 is claimed"):
        Release(**values, **many, noise_multiplier=2.0, sigma_local=19.9)


def test_central_noise_never_costs_more_than_shares_do():
    shared = bound_round(private_plan(quantize=Modular(12), dropout=0.3), clients=10, dim=4096)
    central = bound_round(central_plan(quantize=Modular(12), dropout=0.3), clients=10, dim=4096)
    assert central.calibration.inflation <= shared.calibration.inflation
    # Shares cover those that may be missing; the coordinator is not.
    ours, theirs = (
        bound.calibration.central_sigma(10) / bound.calibration.scale for bound in (central, shared)
    )
    assert ours < theirs * (1 - 0.3) ** 0.5 * 1.001


@given(
    bits=st.integers(8, 32), noise=st.floats(0.1, 8.0), clients=st.integers(2, 500),
    dim=st.integers(1, 10**6),
)  # fmt: skip
def test_signal_and_central_noise_fit_the_ring_and_the_sampler(bits, noise, clients, dim):
    try:
        found = calibrate(
            clip=1.0, dim=dim, peak=dim**-0.5, clients=clients, minimum_survivors=1,
            noise_multiplier=noise, ring_bits=bits, central=True,
        )  # fmt: skip
    except ConfigurationError:
        return
    assert found.sigma_local == pytest.approx(noise * found.rounded_norm, rel=1e-12)
    assert found.sigma_local <= MAX_SIGMA
    assert 2 * 4.0 * found.spread <= 2**bits * (1 + 1e-9)
    assert found.spread > found.sigma_local


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"delta": 1.0}, "delta"),
        ({"epsilon_budget": 0.0}, "epsilon_budget"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change, field):
    with pytest.raises(ConfigurationError, match=rf"privacy\.{field} must be in .*, got .*: "):
        CentralGaussian(**{"noise_multiplier": 1.0, "delta": 1e-5, **change})
