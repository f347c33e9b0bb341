from math import inf

import pytest

from fedcore.codec import Clip, Quantize, RandomK
from fedcore.codec.sparsify import support
from fedcore.errors import ConfigurationError
from fedcore.pipeline import Bonawitz, ByExamples, Modular, NoSecAgg, RunPlan, bind_round
from fedcore.privacy import DistributedSkellam, PrivacyLedger
from fedcore.privacy.releases import epsilon_of
from tests.fedcore.pipeline.rounds import bound_round, private_plan, round_plan

CLEAR = NoSecAgg()


@pytest.mark.parametrize(
    ("run", "changes", "named"),
    [
        (private_plan(quantize=Modular(4)), {"dim": 1000}, "at least .* bits, got 4"),
        (private_plan(noise=1e4, quantize=Modular(16)), {}, "lower privacy.noise_multiplier"),
        (private_plan(noise=1e9, quantize=Modular(32)), {}, "lower privacy.noise_multiplier"),
        (RunPlan(quantize=Modular(4)), {"clients": 100}, "at least .* bits, got 4"),
        (RunPlan(quantize=Modular(5), metric_slots=1), {"clients": 32}, "no room to count over"),
        (RunPlan(), {"clients": 1}, "fewer than 2 clients reveals its input"),
        (RunPlan(dropout=0.5), {"clients": 2}, "fewer than 2 clients reveals its input"),
        (RunPlan(dropout=0.6), {"clients": 10}, "invite more clients, or lower"),
        (
            RunPlan(secagg=Bonawitz(corrupt=0.45), dropout=0.3),
            {"clients": 10},
            "invite more clients, or lower",
        ),
        (RunPlan(dropout=0.7, secagg=Bonawitz(corrupt=0.4)), {}, "below 1 - secagg.corrupt"),
        (RunPlan(), {"clients": 70_000}, "secagg.clients must be in"),
        (RunPlan(), {"clients": 1 << 47}, "no room to count over"),
        (private_plan(), {"clients": 1 << 47}, "ring for 140737488355328 clients"),
        (
            private_plan(secagg=CLEAR),
            {"clients": 1, "dim": 1 << 40},
            "needs at least|does not exist",
        ),
    ],
)
def test_a_round_that_cannot_work_is_refused_before_it_starts(run, changes, named):
    with pytest.raises(ConfigurationError, match=named):
        bind_round(round_plan(run, **changes))


@pytest.mark.parametrize(
    ("clients", "dropout", "fewest"),
    [(10, 0.1, 9), (10, 0.0, 10), (9, 0.1, 9), (100, 0.29, 71), (30, 0.3, 21), (3, 0.9, 1)],
)
def test_a_round_survives_the_stated_dropout_and_no_more(clients, dropout, fewest):
    bound = bound_round(RunPlan(dropout=dropout, secagg=CLEAR), clients=clients)
    assert bound.minimum_survivors == fewest


def test_one_client_may_report_in_the_clear_but_not_under_masks():
    assert bound_round(RunPlan(secagg=CLEAR), clients=1).minimum_survivors == 1
    assert bound_round(clients=2).secagg.minimum_survivors == 2


def test_the_masks_are_bound_to_the_whole_plan():
    plan = round_plan(RunPlan(dropout=0.2), clients=10)
    masks = bind_round(plan).secagg
    assert masks.context == plan.digest()
    assert (masks.clients, masks.minimum_survivors) == (10, 8)
    assert masks.dim == bind_round(plan).dim
    assert masks.ring_bits == bind_round(plan).ring.bits
    assert bound_round(RunPlan(secagg=CLEAR)).secagg is None


@pytest.mark.parametrize("bits", [4, 8, 16, 24, 32])
def test_a_modular_coordinate_takes_the_stated_bits(bits):
    bound = bound_round(RunPlan(quantize=Modular(bits), metric_slots=0), dim=100)
    assert bound.ring.bits == bits
    assert bound.update_dim == 100


@pytest.mark.parametrize(("bits", "clients", "ring"), [(8, 5, 11), (2, 3, 3), (16, 100, 23)])
def test_a_uniform_coordinate_takes_room_for_the_largest_sum(bits, clients, ring):
    assert bound_round(RunPlan(quantize=Quantize(bits)), clients=clients).ring.bits == ring


def test_an_upload_has_the_kept_coordinates_then_the_tally():
    bound = bound_round(RunPlan(sparsify=RandomK(0.25), metric_slots=3), dim=40)
    assert bound.update_dim == 10
    assert bound.tally.slots == 2 + 3
    assert bound.dim == 10 + 5 * bound.tally.digits
    assert bound.tally.digits * bound.tally.digit_bits >= 56


def test_every_round_has_its_own_support_and_rotation_but_not_every_attempt():
    run = RunPlan(sparsify=RandomK(0.5), secagg=CLEAR)

    def kept(number, attempt):
        plan = round_plan(run, round_number=number, attempt=attempt, dim=100)
        return tuple(support(plan.stage_seed("support"), 100, 50))

    assert kept(1, 1) == kept(1, 2)
    assert len({kept(number, 1) for number in range(1, 6)}) == 5


def test_a_noisy_upload_is_the_update_alone():
    bound = bound_round(private_plan(metric_slots=8), dim=100)
    assert bound.dim == bound.update_dim == 100
    assert bound.tally.slots == 0


def test_a_release_without_noise_costs_everything():
    release = bound_round().release(4)
    assert (release.mechanism, release.noise_multiplier) == ("none", 0.0)
    assert (release.round_number, release.clients, release.survivors) == (1, 5, 4)
    assert release.unit == "device"
    assert epsilon_of([release], 1e-5) == inf
    assert bound_round(RunPlan(quantize=Quantize())).release(4).mechanism == "none"


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (private_plan(1.3, clip=Clip(0.5)), "distributed_gaussian"),
        (
            private_plan(privacy=DistributedSkellam(noise_multiplier=1.3, delta=1e-5)),
            "distributed_skellam",
        ),
    ],
)
def test_a_release_states_the_noise_that_was_calibrated(run, kind):
    bound = bound_round(run, clients=10, round_number=3, dim=100)
    release = bound.release(9)
    assert release.mechanism == kind
    assert release.noise_multiplier == 1.3
    assert release.norm == bound.calibration.rounded_norm
    assert release.sigma_local == bound.calibration.sigma_local
    assert (release.round_number, release.clients, release.survivors) == (3, 10, 9)
    assert not release.amplification_claimed
    # At the fewest survivors the noise is what was asked for; with more it is not less.
    assert release.sigma_local * 9**0.5 == pytest.approx(1.3 * release.norm)
    assert 0 < PrivacyLedger(delta=1e-5).record(release).epsilon < 10
    assert epsilon_of([release], 1e-5) == epsilon_of([bound.release(10)], 1e-5)


def test_colluders_raise_the_noise_of_everybody_else():
    def share(colluders):
        privacy = DistributedSkellam(noise_multiplier=1.0, delta=1e-5, colluders=colluders)
        calibration = bound_round(private_plan(privacy=privacy), clients=10).calibration
        return calibration.sigma_local / calibration.rounded_norm

    # 9 shares are sure to come, 3 of them may be known: 6 must do what 9 did.
    assert share(0.3) == pytest.approx(share(0.0) * (9 / 6) ** 0.5)


def test_a_bound_round_does_not_print_its_functions():
    text = repr(bound_round(RunPlan(weighting=ByExamples(5))))
    assert "lambda" not in text
    assert "ByExamples(max_examples=5" in text


@pytest.mark.parametrize("dim", [1, 12, 650, 100_000])
@pytest.mark.parametrize("noise", [0.3, 1.0, 4.7])
def test_noise_fits_the_widest_ring_for_every_cohort(dim, noise):
    # The scale is then limited by the widest noise that can be drawn, to the last bit.
    for clients in range(2, 60):
        bound = bound_round(private_plan(noise, dropout=0.0), clients=clients, dim=dim)
        assert bound.release(clients).noise_multiplier == noise
