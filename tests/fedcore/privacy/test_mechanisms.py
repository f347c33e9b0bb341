"""Mechanism descriptions, and the codec stages that add a share of noise."""

import numpy as np
import pytest
from pydantic import TypeAdapter

from fedcore.codec import Clip, Discretize, Embed, Hadamard, Integers, Reals, chain
from fedcore.crypto.entropy import ReplayedEntropy
from fedcore.errors import ConfigurationError
from fedcore.privacy import (
    DiscreteGaussianNoise,
    DistributedGaussian,
    DistributedSkellam,
    Mechanism,
    NoPrivacy,
    SkellamNoise,
    calibrate,
    colluding,
    discrete_gaussian_table,
    sample,
    skellam_table,
)

ENTROPY = ReplayedEntropy(b"mechanisms")
STAGES = [DiscreteGaussianNoise(5.0, clients=16), SkellamNoise(25.0, clients=16)]
every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
DISTRIBUTED = [DistributedGaussian, DistributedSkellam]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "none"}, NoPrivacy()),
        (
            {"kind": "distributed_gaussian", "noise_multiplier": 1.1, "delta": 1e-5},
            DistributedGaussian(noise_multiplier=1.1, delta=1e-5),
        ),
        (
            {
                "kind": "distributed_skellam",
                "noise_multiplier": 2.0,
                "delta": 1e-6,
                "epsilon_budget": 8.0,
                "colluders": 0.1,
            },
            DistributedSkellam(noise_multiplier=2.0, delta=1e-6, epsilon_budget=8.0, colluders=0.1),
        ),
    ],
)
def test_configuration_chooses_the_mechanism_by_kind(values, expected):
    assert TypeAdapter(Mechanism).validate_python(values, extra="forbid") == expected


@pytest.mark.parametrize("mechanism", DISTRIBUTED)
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"epsilon_budget": 0.0}, "epsilon_budget"),
        ({"epsilon_budget": float("inf")}, "epsilon_budget"),
        ({"colluders": 1.0}, "colluders"),
        ({"colluders": -0.1}, "colluders"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(mechanism, change, field):
    with pytest.raises(ConfigurationError, match=rf"privacy\.{field} must be in .*, got .*: "):
        mechanism(**{"noise_multiplier": 1.0, "delta": 1e-5, **change})


@pytest.mark.parametrize(
    ("fraction", "clients", "expected"), [(0.0, 10, 0), (0.1, 30, 3), (0.1, 31, 4), (0.99, 10, 10)]
)
def test_colluders_are_counted_up_to_the_next_client(fraction, clients, expected):
    mechanism = DistributedGaussian(noise_multiplier=1.0, delta=1e-5, colluders=fraction)
    assert colluding(mechanism, clients) == expected


def test_without_privacy_nobody_colludes():
    assert colluding(NoPrivacy(), 1000) == 0


def test_each_mechanism_builds_its_own_stage_with_the_same_variance():
    gaussian, skellam = (m(noise_multiplier=1.0, delta=1e-5).noise(6.0, 9) for m in DISTRIBUTED)
    assert gaussian == DiscreteGaussianNoise(sigma=6.0, clients=9)
    assert skellam == SkellamNoise(variance=36.0, clients=9)


@every_stage
def test_binding_widens_the_spread_and_keeps_the_rest(stage):
    source = Integers(dim=7, magnitude=100, norm=120.0, spread=15.0, scale=3.0)
    bound = stage.bind(source)
    assert bound.source == source
    assert bound.target == Integers(dim=7, magnitude=100, norm=120.0, spread=25.0, scale=3.0)


@every_stage
def test_noise_is_added_to_integers_only(stage):
    with pytest.raises(ConfigurationError, match="quantize first"):
        stage.bind(Reals(dim=7))


@every_stage
def test_encoding_adds_the_share_drawn_for_noise_and_decoding_changes_nothing(stage):
    table = (
        discrete_gaussian_table(5.0)
        if isinstance(stage, DiscreteGaussianNoise)
        else skellam_table(25.0)
    )
    bound = stage.bind(Integers(dim=1000, magnitude=1000))
    x = np.arange(1000)
    encoded = bound.encode(x, ENTROPY)
    np.testing.assert_array_equal(encoded - x, sample(table, ENTROPY.draw("noise", 32), 1000))
    assert encoded.dtype == np.int64
    np.testing.assert_array_equal(bound.decode(encoded), encoded)


@every_stage
def test_the_sum_of_encodings_is_the_sum_plus_noise_of_the_stated_spread(stage):
    bound = stage.bind(Integers(dim=50_000, magnitude=0))
    zeros = np.zeros(50_000, dtype=np.int64)
    total = sum(bound.encode(zeros, ENTROPY.child(f"client={i}")) for i in range(16))
    assert bound.decode(total).std() == pytest.approx(bound.target.spread, rel=0.02)


@pytest.mark.parametrize("mechanism", DISTRIBUTED)
def test_a_calibrated_codec_fits_its_ring_and_returns_the_sum_with_the_calibrated_noise(mechanism):
    dim, clients = 4096, 20
    found = calibrate(
        clip=1.0,
        dim=dim,
        peak=dim**-0.5,
        clients=clients,
        minimum_survivors=16,
        noise_multiplier=0.5,
        ring_bits=16,
    )
    codec = chain(
        Reals(dim),
        Clip(found.clip),
        Hadamard(),
        Discretize(found.scale, found.rounded_norm, found.signal_spread),
        mechanism(noise_multiplier=0.5, delta=1e-5).noise(found.sigma_local, clients),
        Embed(found.ring_bits, clients),
    )
    vectors = np.random.default_rng(0).standard_normal((clients, dim)) / np.sqrt(dim) / 1.1
    total = sum(
        codec.encode(x, ENTROPY.child(f"client={i}")).astype(np.uint64)
        for i, x in enumerate(vectors)
    )
    error = codec.decode((total % 2**16).astype(np.uint16)) - vectors.sum(axis=0)
    noise = found.noise_multiplier_at(clients) * found.rounded_norm / found.scale
    assert np.std(error) == pytest.approx(noise, rel=0.05)


@pytest.mark.parametrize("sigma", [0.49, 2e4, float("nan")])
def test_a_gaussian_share_outside_the_theorem_or_the_tables_is_refused(sigma):
    with pytest.raises(ConfigurationError, match=r"sigma must be in \[0.5, 16384\]"):
        DiscreteGaussianNoise(sigma, clients=10)


@pytest.mark.parametrize("variance", [0.0, -1.0, 1e9, float("nan")])
def test_a_skellam_share_outside_the_tables_is_refused(variance):
    with pytest.raises(ConfigurationError, match=r"variance must be in \(0, "):
        SkellamNoise(variance, clients=10)


@pytest.mark.parametrize("build", [DiscreteGaussianNoise, SkellamNoise])
def test_a_sum_over_nobody_is_refused(build):
    with pytest.raises(ConfigurationError, match="clients must be at least 1, got 0"):
        build(1.0, 0)
