"""Correlated noise in the ring of each round."""

import numpy as np
import pytest

from fedcore.codec import Clip, RandomK
from fedcore.codec.rotate import rotate_back
from fedcore.errors import ConfigurationError, LocalProtocolError
from fedcore.pipeline import Modular, NoiseTape, NoSecAgg, decode_sum
from fedcore.privacy import CorrelatedNoise, MatrixGaussian
from tests.fedcore.pipeline.rounds import bound_round, local, private_plan, upload_all

SEED = bytes(range(32))


def mechanism(**changes):
    values = {"noise_multiplier": 0.7, "delta": 1e-5, "bands": 3, "min_separation": 4}
    return MatrixGaussian(**({**values, "participations": 2} | changes))


def plan_with(**changes):
    return private_plan(
        **({"privacy": mechanism(), "quantize": Modular(24), "secagg": NoSecAgg()} | changes)
    )


def in_the_model(tape, bound):
    """A round's noise in coordinates of the model, over the largest contribution."""
    drawn = tape.draw(bound)
    return rotate_back(drawn, bound.plan.stage_seed("rotation")) / bound.calibration.rounded_norm


def rows(count, dim):
    noise = CorrelatedNoise(SEED, bands=3, dim=dim)
    return np.array([noise.next() for _ in range(count)]) * mechanism().row_multiplier


def test_the_noise_is_the_mechanisms_whatever_the_rotation_and_the_size_of_the_cohort():
    tape = NoiseTape(mechanism(), SEED)
    bounds = [
        bound_round(plan_with(), dim=50, round_number=number, clients=clients)
        for number, clients in ((1, 5), (2, 9), (3, 30))
    ]
    found = [in_the_model(tape, bound) for bound in bounds]
    coarsest = min(bound.calibration.rounded_norm for bound in bounds)
    np.testing.assert_allclose(found, rows(3, 50), atol=50**0.5 / coarsest)


def test_the_noise_of_rounds_that_published_nothing_comes_with_the_next():
    tape = NoiseTape(mechanism(), SEED)
    bounds = [bound_round(plan_with(), dim=50, round_number=number) for number in (1, 4, 5)]
    found = np.cumsum([in_the_model(tape, bound) for bound in bounds], axis=0)
    expected = np.cumsum(rows(5, 50), axis=0)[[0, 3, 4]]
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_a_tape_that_was_stopped_goes_on_as_if_it_had_not():
    bounds = [bound_round(plan_with(), dim=20, round_number=number) for number in (1, 2, 3, 4)]
    whole = NoiseTape(mechanism(), SEED)
    expected = [whole.draw(bound) for bound in bounds]
    first = NoiseTape(mechanism(), SEED)
    for bound in bounds[:2]:
        first.draw(bound)
    second = NoiseTape(mechanism(), SEED, last=first.last, dim=first.dim)
    np.testing.assert_array_equal([second.draw(bound) for bound in bounds[2:]], expected[2:])


@pytest.mark.parametrize("number", [1, 2])
def test_a_row_is_used_once_for_every_attempt(number):
    tape = NoiseTape(mechanism(), SEED)
    tape.draw(bound_round(plan_with(), round_number=2))
    with pytest.raises(LocalProtocolError, match="a row is used once"):
        tape.draw(bound_round(plan_with(), round_number=number, attempt=2))


def test_a_row_is_noted_as_used_before_it_is_given():
    noted = []
    tape = NoiseTape(mechanism(), SEED)
    tape.keep = lambda: noted.append((tape.last, tape.dim))
    tape.draw(bound_round(plan_with(), round_number=3))
    assert noted == [(3, 12)]

    def fail():
        raise OSError("the disk is full")

    tape.keep = fail
    with pytest.raises(OSError, match="disk"):
        tape.draw(bound_round(plan_with(), round_number=4))
    with pytest.raises(LocalProtocolError, match="a row is used once"):
        tape.draw(bound_round(plan_with(), round_number=4))


def test_another_plan_or_model_is_refused():
    tape = NoiseTape(mechanism(), SEED)
    with pytest.raises(LocalProtocolError, match="this noise is of"):
        tape.draw(bound_round(plan_with(privacy=mechanism(noise_multiplier=0.6))))
    tape.draw(bound_round(plan_with()))
    with pytest.raises(ConfigurationError, match="has 12 coordinates, the model 13"):
        tape.draw(bound_round(plan_with(), round_number=2, dim=13))


def test_the_tape_does_not_print_its_seed():
    assert SEED.hex()[:8] not in repr(NoiseTape(mechanism(), SEED))
    assert repr(SEED)[2:12] not in repr(NoiseTape(mechanism(), SEED))


def test_supports_that_change_are_refused():
    with pytest.raises(ConfigurationError, match="choose sparsify=dense"):
        plan_with(sparsify=RandomK(0.5))


def test_what_is_decoded_is_the_mean_and_the_rounds_noise():
    plan = plan_with(clip=Clip(2.0))
    bound = bound_round(plan, clients=4, dim=4096)
    updates = [local(np.full(4096, 0.01 * client)) for client in range(4)]
    total, _ = upload_all(bound, updates)
    mean = decode_sum(bound, total, 4, [()], NoiseTape(mechanism(), SEED))
    noise = rows(1, 4096)[0] * bound.calibration.rounded_norm / bound.calibration.scale
    np.testing.assert_allclose(mean.delta * 4, 0.06 + noise, atol=1e-2)
    # The inflation by rounding is in the noise.
    assert bound.calibration.rounded_norm / bound.calibration.scale > 2.0


def test_the_ring_has_room_for_what_is_released():
    bound = bound_round(plan_with(quantize=Modular(14)), clients=10, dim=20_000)
    tape = NoiseTape(mechanism(), SEED)
    drawn = tape.draw(bound)
    assert np.abs(drawn).max() < 2**13
    assert drawn.std() < bound.calibration.sigma_local * 1.01
    carried = tape.draw(bound_round(plan_with(quantize=Modular(14)), clients=10, dim=20_000,
                                    round_number=4))  # fmt: skip
    assert drawn.std() < carried.std() < bound.calibration.sigma_local * 1.01
    assert np.abs(carried).max() < 2**13


def test_the_release_states_the_whole_stream():
    bound = bound_round(plan_with(), clients=5, round_number=9)
    release = bound.release(4)
    assert release.correlated
    assert release.norm == pytest.approx(
        bound.calibration.rounded_norm * mechanism().sensitivity, rel=1e-12
    )
    assert (release.participations, release.separation) == (2, 4)
    assert release.noise_multiplier == 0.7
