"""An adaptive clip over the rounds of a real federation, under masks."""

from dataclasses import replace

import numpy as np
import pytest

from clients import DevicePolicy
from fedcore.codec import Clip
from fedcore.engine import FaultyGrid
from fedcore.errors import ConfigurationError
from fedcore.pipeline import AdaptiveClip, Modular, NoSecAgg, PerLayerClip, RunPlan, Uniform
from tests.fedcore.pipeline.rounds import private_plan
from tests.strategies.federation import (
    OPEN,
    ROOMY,
    SHAPES,
    client_app,
    initial,
    losing,
    play,
    target_of,
)

CLIP = AdaptiveClip(initial=0.5, quantile=0.6, learning_rate=0.5)
EXACT = replace(ROOMY, clip=CLIP, weighting=Uniform())


def norms_of_the_first_round():
    """How far each of ten clients pulls the model."""
    return sorted(
        0.5
        * np.linalg.norm(
            np.concatenate(
                [(target_of(c)[n] - array.numpy()).ravel() for n, array in initial().items()]
            )
        )
        for c in range(10)
    )


def test_the_clip_of_each_round_follows_from_the_last_and_from_the_fraction_it_revealed():
    played = play(plan=EXACT, rounds=6)
    norm = 0.5
    for report in played.reports:
        assert report.clip_norm == norm
        assert report.unclipped == 1 - report.clipped / 10
        norm = CLIP.next(norm, report.unclipped)
    assert played.grid.clip_norm == norm
    assert len({report.clip_norm for report in played.reports}) == 6


def test_the_reported_fraction_is_that_of_the_norms():
    norms = norms_of_the_first_round()
    start = (norms[3] + norms[4]) / 2
    (report,) = play(plan=replace(EXACT, clip=replace(CLIP, initial=float(start)))).reports
    assert report.unclipped == 0.4


def test_a_run_goes_on_where_an_earlier_one_reported_its_clip():
    whole = play(plan=EXACT, rounds=4)
    first = play(plan=EXACT, rounds=2)
    rest = play(
        plan=EXACT, rounds=2, model=first.result.arrays, ledger=first.grid.ledger,
        clip_norm=first.grid.clip_norm,
    )  # fmt: skip
    assert [report.clip_norm for report in (*first.reports, *rest.reports)] == [
        report.clip_norm for report in whole.reports
    ]
    assert rest.grid.clip_norm == whole.grid.clip_norm


def test_a_round_that_is_aborted_leaves_the_clip_as_it_was():
    plan = replace(EXACT, attempts=1)
    gone = losing(range(5), "upload")
    played = play(plan=plan, rounds=2, wrap=lambda grid: FaultyGrid(grid, gone))
    assert [report.survivors for report in played.reports] == [0, 0]
    assert [report.clip_norm for report in played.reports] == [0.5, 0.5]
    assert [report.unclipped for report in played.reports] == [None, None]
    assert played.grid.clip_norm == 0.5


def test_under_noise_the_clip_moves_by_an_estimate_and_the_ledger_states_the_same_noise():
    clip = replace(CLIP, fraction_noise=0.3)
    plan = private_plan(1.0, clip=clip, quantize=Modular(20))
    played = play(plan=plan, rounds=8)
    fixed = play(plan=replace(plan, clip=Clip(0.5)), rounds=8)
    norm = 0.5
    for report in played.reports:
        assert report.clip_norm == norm
        assert report.clipped is None
        norm = clip.next(norm, report.unclipped)
    releases = played.grid.ledger.releases
    assert {release.noise_multiplier for release in releases} == {1.0}
    assert {release.dim for release in releases} == {44}
    assert played.grid.ledger.epsilon == pytest.approx(fixed.grid.ledger.epsilon, rel=1e-3)


@pytest.mark.parametrize("run", [EXACT, private_plan(clip=replace(CLIP, fraction_noise=0.3))])
def test_masks_change_neither_model_nor_clip(run):
    open_ = play(client_app(policy=OPEN, seed=1), replace(run, secagg=NoSecAgg()), rounds=3)
    masked = play(client_app(seed=1), run, rounds=3)
    assert [r.clip_norm for r in open_.reports] == [r.clip_norm for r in masked.reports]
    assert [r.unclipped for r in open_.reports] == [r.unclipped for r in masked.reports]
    for name, array in open_.arrays.items():
        assert array.tobytes() == masked.arrays[name].tobytes()


def test_devices_refuse_the_round_in_which_the_clip_outgrows_their_policy():
    app = client_app(policy=DevicePolicy(largest_clip=0.6), seed=1)
    played = play(app, replace(EXACT, attempts=1), rounds=4)
    allowed = [report.clip_norm <= 0.6 for report in played.reports]
    assert allowed == [True, False, False, False]
    assert [report.survivors for report in played.reports] == [10, 0, 0, 0]


def test_a_clip_to_go_on_from_is_for_adaptive_clips_only():
    with pytest.raises(ConfigurationError, match="clip_norm belongs to clip=adaptive"):
        play(clip_norm=1.0)


def test_every_layer_moves_by_its_own_bound_at_most():
    clip = PerLayerClip(0.5, shares=(("b", 0.75), ("w", 1.0)))
    played = play(plan=RunPlan(clip=clip, weighting=Uniform()))
    start = {name: array.numpy() for name, array in initial().items()}
    for (name, array), bound in zip(played.arrays.items(), (0.4, 0.3), strict=True):
        pulls = [0.5 * (target_of(c)[name] - start[name]) for c in range(10)]
        lengths = [np.linalg.norm(pull) for pull in pulls]
        clipped = [p * min(1, bound / n) for p, n in zip(pulls, lengths, strict=True)]
        np.testing.assert_allclose(array - start[name], np.mean(clipped, axis=0), atol=1e-6)
    assert list(played.arrays) == list(SHAPES)
    (report,) = played.reports
    assert (report.clip_norm, report.clipped) == (0.5, 10)
