"""What a job costs either unit of privacy, and the noise found for what it may cost."""

import re
from dataclasses import replace
from math import inf

import pytest

from fedcore.data import Iid
from fedcore.errors import ConfigurationError
from fedcore.job import BothLevels, Job, NoClip, NoQuantize, assess, check
from fedcore.models import Logistic
from fedcore.pipeline import Modular, NoSecAgg, Uniform
from fedcore.privacy import DistributedGaussian, DistributedSkellam, PrivacyLedger
from fedcore.training import ExampleLevelPrivacy

JOB = Job(
    model=Logistic(), partition=Iid(), clients=8, clients_per_round=8, weighting=Uniform(),
    quantize=Modular(16),
)  # fmt: skip
SIZES = {"parameters": 650, "fewest_examples": 179}
DEVICE = DistributedGaussian(epsilon=6.0, delta=1e-5)
EXAMPLE = ExampleLevelPrivacy(noise_multiplier=None, epsilon=3.0)
BOTH = BothLevels(device=DEVICE, example=EXAMPLE)


def assessed(privacy, **changes):
    return assess(replace(JOB, privacy=privacy, **changes), **SIZES)


@pytest.mark.parametrize("rounds", [1, 20])
@pytest.mark.parametrize("target", [0.5, 3.0, 20.0])
def test_the_noise_of_local_training_meets_its_target_and_a_thousandth_less_does_not(
    target, rounds
):
    found = assessed(replace(EXAMPLE, epsilon=target), rounds=rounds)
    assert found.example.target == found.job.privacy.epsilon_budget == target
    assert found.example.epsilon <= target
    less = replace(found.example_release, noise_multiplier=0.999 * found.example.noise_multiplier)
    assert PrivacyLedger(delta=1e-5).projected_epsilon(less, rounds) > target


def test_local_training_reaches_any_target_but_nothing():
    with pytest.raises(ConfigurationError, match=r"must be positive, got -1: .* any positive one"):
        assessed(replace(EXAMPLE, epsilon=-1.0))
    assert 0 < assessed(replace(EXAMPLE, epsilon=0.1)).example.epsilon <= 0.1


def test_both_levels_have_two_costs_that_are_those_of_one_level_each():
    both = assessed(BOTH)
    assert both.device == assessed(DEVICE).device
    assert both.example == assessed(EXAMPLE).example
    assert (both.device.unit, both.example.unit) == ("device", "example")
    assert both.job.privacy.device.noise_multiplier == both.device.noise_multiplier
    assert both.job.privacy.example.noise_multiplier == both.example.noise_multiplier
    assert assessed(DEVICE).example is assessed(EXAMPLE).device is None


def test_a_resolved_job_travels_as_json_and_is_resolved_again_to_itself():
    job = assessed(BOTH).job
    assert Job.from_json(job.to_json()) == job
    assert assess(job, **SIZES).job == job
    assert '"epsilon":null' in job.to_json()
    assert '"epsilon_budget":6' in job.to_json()


def test_a_check_with_data_finds_the_same_noise_as_an_assessment_with_its_sizes():
    preflight = check(replace(JOB, privacy=BOTH))
    expected = assessed(BOTH)
    assert preflight.job == expected.job
    assert preflight.privacy.device == expected.device
    assert preflight.privacy.example == expected.example
    assert (preflight.epsilon, preflight.delta) == (preflight.privacy.device.epsilon, 1e-5)


def test_the_inflation_by_rounding_is_reported():
    coarse = assessed(DEVICE, quantize=Modular(10)).device
    fine = assessed(DEVICE, quantize=Modular(24)).device
    assert coarse.inflation > fine.inflation >= 1
    assert (coarse.ring_bits, fine.ring_bits) == (10, 24)


@pytest.mark.parametrize("mechanism", [DistributedGaussian, DistributedSkellam])
def test_a_delta_of_one_over_the_devices_is_warned_of(mechanism):
    quiet = mechanism(noise_multiplier=1.0, delta=0.12)
    loud = mechanism(noise_multiplier=1.0, delta=0.125)
    assert assessed(quiet).warnings == ()
    (warning,) = assessed(loud).warnings
    assert re.match(r"privacy.delta=0.125 is not below 1/8, .* choose at most 0.01$", warning)


def test_a_delta_of_one_over_the_examples_is_warned_of():
    assert assessed(ExampleLevelPrivacy(delta=1 / 180)).warnings == ()
    (warning,) = assessed(ExampleLevelPrivacy(delta=1 / 179)).warnings
    assert "examples on the smallest device" in warning
    both = replace(BOTH, device=replace(DEVICE, delta=0.5), example=replace(EXAMPLE, delta=0.5))
    assert len(assessed(both).warnings) == 2


def test_a_budget_for_local_training_that_is_too_small_is_refused():
    privacy = ExampleLevelPrivacy(noise_multiplier=2.0)
    full = assessed(privacy, rounds=10).example.epsilon
    seven = assessed(privacy, rounds=7).example.epsilon
    with pytest.raises(ConfigurationError, match="it lasts for 7 rounds") as caught:
        assessed(replace(privacy, epsilon_budget=seven * 1.001), rounds=10)
    named = float(re.search(r"must be at least ([\d.]+)", str(caught.value))[1])
    assert full <= named <= full * 1.001
    assessed(replace(privacy, epsilon_budget=named), rounds=10)


def test_clipping_without_noise_promises_nothing():
    assert assessed(ExampleLevelPrivacy(noise_multiplier=0.0)).example.epsilon == inf


def test_noise_in_the_sum_needs_a_sum_also_beside_local_training():
    plain = {"quantize": NoQuantize(), "clip": NoClip(), "secagg": NoSecAgg()}
    assert assessed(EXAMPLE, **plain).bound is None
    with pytest.raises(ConfigurationError, match="which leaves privacy without effect"):
        assessed(BOTH, **plain)


def test_a_target_without_a_stated_noise_does_not_train():
    with pytest.raises(ConfigurationError, match=r"privacy.epsilon=3 is for all rounds together"):
        _ = EXAMPLE.stated_noise
