"""The choice of a clip: its parameters, its step, its price, its point of rest."""

from dataclasses import replace
from math import exp, inf, nan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.codec import Clip
from fedcore.errors import ConfigurationError
from fedcore.pipeline import (
    AdaptiveClip,
    Layer,
    PerLayerClip,
    RunPlan,
    first_norm,
    layers_of,
)
from fedcore.vectors import Entry, Layout
from tests.fedcore.pipeline.rounds import round_plan

LAYERS = (Layer("a.weight", 8), Layer("a.bias", 2), Layer("b.weight", 2))


@given(norm=st.floats(1e-3, 1e3), fraction=st.floats(-1e6, 1e6), quantile=st.floats(0.01, 0.99))
def test_a_step_is_bounded_monotone_and_stays_in_range(norm, fraction, quantile):
    clip = AdaptiveClip(quantile=quantile)
    after = clip.next(norm, fraction)
    assert clip.lowest <= after <= clip.highest
    assert exp(-0.2) * (1 - 1e-12) <= after / norm <= exp(0.2) * (1 + 1e-12)
    if fraction > quantile:
        assert after <= norm
    if fraction < quantile:
        assert after >= norm


def test_a_step_is_that_of_the_paper():
    clip = AdaptiveClip(quantile=0.3, learning_rate=0.1)
    assert clip.next(2.0, 0.3) == 2.0
    assert clip.next(2.0, 0.8) == pytest.approx(2.0 * exp(-0.05))
    assert clip.next(2.0, -0.1) == pytest.approx(2.0 * exp(0.04))


@given(noise=st.floats(0.01, 5), clients=st.integers(20, 10_000), share=st.floats(0.2, 0.9))
def test_the_price_of_the_answers_is_the_papers_trade(noise, clients, share):
    beta = AdaptiveClip(fraction_noise=share).weight(noise, clients)
    on_update = noise * sqrt(1 + beta**2)
    sigma_b = on_update / (2 * beta)  # noise of the sum of bits, by what one bit is worth
    assert sigma_b == pytest.approx(share * clients)
    # [ATMR21, Theorem 1]
    assert on_update == pytest.approx((noise**-2 - (2 * sigma_b) ** -2) ** -0.5)


def test_answers_that_would_more_than_double_the_noise_are_refused_with_the_repair():
    clip = AdaptiveClip(fraction_noise=0.05)
    with pytest.raises(ConfigurationError, match=r"at least 0\.0578 for 20 clients") as caught:
        clip.weight(2.0, 20)
    needed = float(str(caught.value).split("at least ")[1].split()[0])
    assert replace(clip, fraction_noise=needed).weight(2.0, 20) == pytest.approx(sqrt(3), rel=1e-2)


@pytest.mark.parametrize("start", [0.02, 2.0])
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_clip_comes_to_rest_at_the_quantile_of_the_norms(start, quantile):
    rng = np.random.default_rng(5)
    clip, norm, path = AdaptiveClip(quantile=quantile), start, []
    for _ in range(400):
        norms = rng.lognormal(-1.5, 0.6, size=50)
        told = np.mean(norms <= norm) + rng.normal(0, 0.05)
        norm = clip.next(norm, told)
        path.append(norm)
    settled = np.array(path[200:])
    truth = np.quantile(rng.lognormal(-1.5, 0.6, size=200_000), quantile)
    # Steps move the clip by a few percent about it; their mean is far closer.
    assert np.exp(np.log(settled).mean()) == pytest.approx(truth, rel=0.05)
    assert 0.7 < (settled / truth).min() <= (settled / truth).max() < 1.4


def test_a_start_ten_times_off_is_made_up_for_in_the_stated_rounds():
    clip = AdaptiveClip(initial=0.1, quantile=0.5)
    norm, rounds = 0.1, 0
    while norm < 1:
        norm, rounds = clip.next(norm, 0.0), rounds + 1
    assert rounds == pytest.approx(np.log(10) / (0.2 * 0.5), abs=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"initial": 0.0}, "clip.initial must be in"),
        ({"initial": 1e4}, "clip.initial must be in"),
        ({"initial": nan}, "clip.initial must be in"),
        ({"highest": inf}, "clip.initial must be in"),
        ({"lowest": 0.0}, "clip.lowest must be"),
        ({"quantile": 0.0}, "clip.quantile must be"),
        ({"quantile": 1.0}, "clip.quantile must be"),
        ({"learning_rate": 0.0}, "clip.learning_rate must be"),
        ({"learning_rate": inf}, "clip.learning_rate must be"),
        ({"fraction_noise": 0.0}, "clip.fraction_noise must be"),
        ({"fraction_noise": 1.0}, "clip.fraction_noise must be"),
    ],
)
def test_an_adaptive_clip_out_of_range_is_refused(changes, named):
    with pytest.raises(ConfigurationError, match=named):
        AdaptiveClip(**changes)


@given(
    norm=st.floats(1e-3, 1e3),
    power=st.floats(0, 1),
    share=st.floats(1e-3, 1e3),
    sizes=st.lists(st.integers(1, 10**6), min_size=2, max_size=6),
)
def test_the_squares_of_the_bounds_add_up_to_that_of_the_norm(norm, power, share, sizes):
    layers = tuple(Layer(f"layer{number}", size) for number, size in enumerate(sizes))
    bounds = PerLayerClip(norm, power, (("layer0", share),)).bounds(layers)
    assert np.linalg.norm(bounds) == pytest.approx(norm)
    expected = share * (sizes[0] / sizes[1]) ** power
    assert bounds[0] / bounds[1] == pytest.approx(expected)


def test_layers_are_bounded_alike_by_their_size_or_as_told():
    assert PerLayerClip(3.0).bounds(LAYERS) == pytest.approx([sqrt(3)] * 3)
    assert PerLayerClip(sqrt(12), size_power=0.5).bounds(LAYERS) == pytest.approx(
        [sqrt(8), sqrt(2), sqrt(2)]
    )
    told = PerLayerClip(3.0, shares=(("*.bias", 2.0), ("a.*", 1.0), ("*", 2.0)))
    assert told.bounds(LAYERS) == pytest.approx([1.0, 2.0, 2.0])


def test_a_pattern_without_a_layer_is_refused():
    with pytest.raises(ConfigurationError, match=r"'c\.\*' must match a layer, found a.weight"):
        PerLayerClip(shares=(("c.*", 2.0),)).bounds(LAYERS)


@pytest.mark.parametrize(
    "changes",
    [{"norm": 0.0}, {"norm": inf}, {"size_power": -1.0}, {"size_power": 2.0},
     {"shares": (("*", 0.0),)}, {"shares": (("*", nan),)}],
)  # fmt: skip
def test_a_clip_for_each_layer_out_of_range_is_refused(changes):
    with pytest.raises(ConfigurationError, match=r"clip\."):
        PerLayerClip(**changes)


@pytest.mark.parametrize(
    ("clip", "changes", "named"),
    [
        (AdaptiveClip(), {}, r"clip_norm must be in \[0.001, 1000.0\], got None"),
        (AdaptiveClip(), {"clip_norm": 1e4}, "clip_norm must be in"),
        (AdaptiveClip(), {"clip_norm": nan}, "clip_norm must be in"),
        (Clip(1.0), {"clip_norm": 1.0}, "clip_norm belongs to clip=adaptive"),
        (Clip(1.0), {"layers": LAYERS}, "layers belong to clip=per_layer"),
        (PerLayerClip(), {}, "add up to dim=12, got 0 layers"),
        (PerLayerClip(), {"layers": LAYERS[:2]}, "add up to dim=12, got 2 layers of 10"),
        (PerLayerClip(), {"layers": (*LAYERS, Layer("c", 0))}, "each have an element"),
        (PerLayerClip(), {"layers": (Layer("a", 13), Layer("b", -1))}, "each have an element"),
    ],
)
def test_a_round_states_the_norm_or_the_layers_that_its_clip_needs(clip, changes, named):
    with pytest.raises(ConfigurationError, match=named):
        round_plan(RunPlan(clip=clip), **changes)


def test_the_norm_of_a_round_is_that_of_its_clip():
    assert round_plan(RunPlan(clip=Clip(3.0))).norm == 3.0
    assert round_plan(RunPlan(clip=AdaptiveClip()), clip_norm=0.7).norm == 0.7
    assert round_plan(RunPlan(clip=PerLayerClip(2.0)), layers=LAYERS).norm == 2.0


def test_only_the_clip_that_needs_it_has_a_first_norm_or_layers():
    layout = Layout((Entry("w", (2, 3), "float32"), Entry("b", (3,), "float32")))
    adaptive, per_layer = AdaptiveClip(initial=0.3), PerLayerClip()
    assert [first_norm(clip) for clip in (Clip(), adaptive, per_layer)] == [None, 0.3, None]
    assert [layers_of(RunPlan(clip=clip), layout) for clip in (Clip(), adaptive)] == [(), ()]
    assert layers_of(RunPlan(clip=per_layer), layout) == (Layer("w", 6), Layer("b", 3))


def test_error_feedback_would_feed_the_norms_that_an_adaptive_clip_measures():
    with pytest.raises(ConfigurationError, match="error_feedback=false, or clip=norm"):
        RunPlan(clip=AdaptiveClip(), error_feedback=True)
    assert RunPlan(clip=PerLayerClip(), error_feedback=True).error_feedback
