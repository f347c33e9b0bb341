"""Canaries through the real pipeline: seen without noise, within the ledger with it."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest

from experiments.audit.canary import audit_canaries, check_canary, random_cosines
from experiments.audit.planted import (
    Canary,
    Fleet,
    Silent,
    increments,
    planted_fleet,
    rounds_of,
    run_fleet,
)
from experiments.audit.settings import CanarySettings
from fedcore.codec import RandomK
from fedcore.errors import ConfigurationError
from fedcore.job import FedAvgM, Job, NoClip, NoQuantize, check
from fedcore.pipeline import Bonawitz, ByExamples, SeedHelper
from fedcore.training import ExampleLevelPrivacy
from tests.experiments.audit.jobs import JOB, noisy


def audited(job: Job, *, every_round: bool = True, seed: int = 0, candidates: int = 32):
    settings = CanarySettings(candidates, every_round, seed)
    return audit_canaries(job, check(job), settings, quiet=True)


@pytest.fixture(scope="module")
def open_audit():
    return audited(JOB)


def test_without_noise_every_observer_sees_the_canaries(open_audit):
    assert open_audit.epsilon == inf
    for seen in open_audit.observations:
        assert seen.estimates.shift.low > 50
        assert seen.estimates.fit.low > 50
        assert seen.bound.epsilon == seen.bound.ceiling > 1


def test_a_silent_candidate_leaves_no_trace(open_audit):
    seen = open_audit.observations[0]
    quiet = seen.statistics[~open_audit.coins]
    assert np.abs(quiet / seen.null.std).max() < 4
    assert np.abs(quiet.mean() / seen.null.std) < 1


def test_masks_change_no_figure_of_the_audit(open_audit):
    masked = audited(replace(JOB, secagg=Bonawitz()))
    for ours, theirs in zip(masked.observations, open_audit.observations, strict=True):
        np.testing.assert_array_equal(ours.statistics, theirs.statistics)
        assert ours.estimates == theirs.estimates


@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_with_noise_nothing_contradicts_the_ledger_where_everybody_is_in_every_round(noise):
    # The ledger is nearly tight here: an estimate lies on either side of it, by its interval.
    found = audited(noisy(JOB, noise))
    assert (found.participations == JOB.rounds).all()
    for seen in found.observations:
        assert seen.estimates.shift.low < found.epsilon < inf
        assert seen.bound.epsilon < found.epsilon


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_with_noise_no_estimate_exceeds_the_ledger_in_drawn_cohorts(noise):
    found = audited(noisy(JOB, noise, rounds=8), every_round=False)
    assert found.participations.sum() < 8 * 4
    for seen in found.observations:
        assert seen.estimates.shift.epsilon < found.epsilon < inf
        assert seen.bound.epsilon < found.epsilon


@pytest.mark.slow
def test_the_estimate_of_the_strongest_observer_comes_near_the_ledger():
    # 256 candidates in every round: the mean is known to a twelfth of the noise.
    found = audited(noisy(JOB, 2.0, rounds=5), candidates=256)
    near = found.observations[-1].estimates.shift
    assert 0.6 * found.epsilon < near.epsilon < found.epsilon * 1.05
    assert near.low < found.epsilon


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"secagg": Bonawitz()},
        {"secagg": SeedHelper()},
        {"weighting": ByExamples(64)},
        {"sparsify": RandomK(fraction=0.2, unbiased=False)},
    ],
    ids=["clear", "masks", "helper", "by examples", "sparse"],
)
def test_a_canary_moves_the_sum_by_its_direction_times_the_clip_norm(changes):
    job = replace(JOB, rounds=1, **changes)
    canary = Canary(seed=5, index=0)
    fleet = Fleet(job, job, check(job), {0: canary, 1: Silent(), 2: Silent(), 3: Silent()})
    trace = run_fleet(fleet, signed=False, quiet=True)
    moved = trace.models[-1] - trace.models[0]
    direction = canary.direction(len(moved))
    if "sparsify" in changes:
        kept = moved != 0
        assert 0.19 < kept.mean() < 0.21
        direction = direction * kept / np.linalg.norm(direction[kept])
    share = 1.0 if "weighting" in changes else 1 / 4  # the others weigh nothing by examples
    np.testing.assert_allclose(moved, share * 0.1 * direction, atol=1e-4)


def test_candidates_join_behind_the_devices_and_leave_their_data_alone():
    preflight = check(JOB)
    fleet = planted_fleet(JOB, preflight, [Silent(), Canary(0, 1)], every_round=False)
    assert fleet.job.clients == 6
    assert fleet.job.clients_per_round == 4
    assert fleet.devices == JOB
    assert set(fleet.parts) == {4, 5}
    drawn = [rounds_of(fleet, index) for index in range(6)]
    assert sum(map(len, drawn)) == 4 * JOB.rounds
    everybody = planted_fleet(JOB, preflight, [Silent()], every_round=True)
    assert rounds_of(everybody, 4) == [1, 2, 3]


def test_random_cosines_are_those_of_random_directions():
    rng = np.random.default_rng(0)
    changes = rng.standard_normal((3, 40)) @ np.diag(np.linspace(1, 3, 40))
    changes[2] = changes[0] + 0.3 * changes[1]  # no basis of its own
    found = random_cosines(changes.astype(np.float32), 40_000, rng)
    units = changes / np.linalg.norm(changes, axis=1, keepdims=True)
    drawn = rng.standard_normal((40_000, 40))
    wanted = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)) @ units.T
    np.testing.assert_allclose(np.cov(found.T), np.cov(wanted.T), atol=1e-3)
    np.testing.assert_allclose(found.std(axis=0), 1 / np.sqrt(40), rtol=0.02)
    tails, expected = (np.quantile(x[:, 0], [0.001, 0.999]) for x in (found, wanted))
    np.testing.assert_allclose(tails, expected, rtol=0.08)


def test_momentum_is_undone_before_a_round_is_looked_at():
    means = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    models, momentum = [np.zeros(7, np.float32)], np.zeros(7, np.float32)
    for mean in means:
        momentum = 0.5 * momentum + mean
        models.append(models[-1] + momentum)
    job = replace(JOB, strategy=FedAvgM(server_momentum=0.5))
    np.testing.assert_allclose(increments(np.stack(models), job), means, atol=1e-5)
    np.testing.assert_allclose(increments(np.stack(models), JOB), np.diff(models, axis=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": NoClip(), "quantize": NoQuantize()}, "quantize=none sends them unclipped"),
        ({"privacy": ExampleLevelPrivacy()}, "example_level bounds single examples"),
    ],
    ids=["plain", "example level"],
)
def test_a_run_whose_ledger_bounds_no_device_is_refused(changes, message):
    job = replace(JOB, **changes)
    with pytest.raises(ConfigurationError, match=message):
        check_canary(job, check(job), CanarySettings())
