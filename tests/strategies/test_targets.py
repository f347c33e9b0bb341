"""Runs whose noise is found for a target, of devices, of examples and of both."""

from dataclasses import replace

import pytest

from clients.client_app import build_client_app, replayed_entropy
from fedcore.engine import run_in_process
from fedcore.errors import ConfigurationError
from fedcore.job import BothLevels, check
from fedcore.pipeline import Modular, RunPlan, Uniform, resolve
from fedcore.privacy import DistributedGaussian, DistributedSkellam
from fedcore.training import ExampleLevelPrivacy
from strategies import SecureGrid
from strategies.server_app import build_server_app
from tests.strategies.federation import play
from tests.strategies.jobs import JOB, OPEN, Recorder, run_job

DEVICE = DistributedGaussian(epsilon=9.0, delta=1e-5)
EXAMPLE = ExampleLevelPrivacy(noise_multiplier=None, epsilon=5.0)
BOTH = BothLevels(device=DistributedSkellam(epsilon=9.0, delta=1e-5), example=EXAMPLE)
RUN = {"weighting": Uniform(), "quantize": Modular(16)}


def run_as_deployed(job, preflight=None):
    """Run a job whose devices read the very text that the operator wrote."""
    recorder = Recorder()
    run_in_process(
        build_server_app(recorder, preflight),
        build_client_app(OPEN, entropy=replayed_entropy(0)),
        num_nodes=8,
        run_config={"job": job.to_json()},
    )
    return recorder


@pytest.mark.parametrize("privacy", [DEVICE, BOTH.device])
def test_a_run_spends_its_target_and_no_more(privacy):
    recorder = run_as_deployed(replace(JOB, privacy=privacy, **RUN))
    assert recorder.reasons == []
    assert len(recorder.last.ledger.releases) == JOB.rounds
    assert recorder.last.ledger.epsilon_budget == 9.0
    assert 9.0 * 0.999 < recorder.last.ledger.epsilon <= 9.0


def test_devices_train_with_the_noise_that_the_coordinator_found():
    job = replace(JOB, privacy=EXAMPLE, **RUN)
    deployed = run_as_deployed(job)
    resolved = check(job).job
    assert resolved.privacy.noise_multiplier is not None
    assert deployed.model == run_as_deployed(resolved).model
    assert 5.0 * 0.999 < deployed.last.ledger.epsilon <= 5.0
    assert deployed.last.examples is None


def test_both_levels_keep_two_ledgers_that_do_not_add_up():
    recorder = run_as_deployed(replace(JOB, privacy=BOTH, **RUN))
    devices, examples = recorder.last.ledger, recorder.last.examples
    assert {release.unit for release in devices.releases} == {"device"}
    assert {release.unit for release in examples.releases} == {"example"}
    assert len(devices.releases) == len(examples.releases) == JOB.rounds
    assert 9.0 * 0.999 < devices.epsilon <= 9.0
    assert 5.0 * 0.999 < examples.epsilon <= 5.0
    assert recorder.reports[-1].epsilon == devices.epsilon
    assert recorder.reports[-1].metrics == {}


def test_both_noises_are_in_the_model():
    noises = BothLevels(
        device=DistributedGaussian(noise_multiplier=0.3, delta=1e-5),
        example=ExampleLevelPrivacy(noise_multiplier=0.3),
    )
    runs = [run_job(rounds=1, privacy=privacy, **RUN).model
            for privacy in (noises, noises.device, noises.example)]  # fmt: skip
    assert len(set(runs)) == 3


def test_local_training_stops_before_the_round_that_exceeds_its_budget():
    """A preflight of another job stands for a budget that somebody raised too late."""
    privacy = ExampleLevelPrivacy(noise_multiplier=2.0)
    enough = check(replace(JOB, privacy=privacy, **RUN))
    budget = check(replace(JOB, rounds=2, privacy=privacy, **RUN)).epsilon * 1.001
    tight = replace(JOB, privacy=replace(privacy, epsilon_budget=budget), **RUN)
    recorder = run_as_deployed(tight, enough)
    assert [report.survivors for report in recorder.reports] == [6, 6]
    assert "round 3 would raise epsilon" in recorder.reasons[0]


def test_a_grid_refuses_a_target_and_says_how_to_find_its_noise():
    plan = RunPlan(privacy=DEVICE, weighting=Uniform())
    with pytest.raises(ConfigurationError, match=r"resolve\(plan, rounds=..., clients=..., dim="):
        SecureGrid(None, plan)
    found = resolve(plan, rounds=2, clients=10, dim=43)
    played = play(plan=found, rounds=2)
    assert 9.0 * 0.999 < played.grid.ledger.epsilon <= 9.0
