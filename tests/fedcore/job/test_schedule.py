"""What a buffered run refuses, before anything is sent."""

import pytest

from fedcore.codec import Clip, Delta, RandomK
from fedcore.errors import ConfigurationError
from fedcore.job import (
    BothLevels,
    Buffered,
    DeviceClass,
    ExponentialBackOff,
    FedAvgM,
    FixedSize,
    Job,
    Mixed,
    NoClip,
    NoQuantize,
    Poisson,
    Robust,
    Rounds,
)
from fedcore.models import Structured
from fedcore.pipeline import (
    AdaptiveClip,
    Bonawitz,
    ByExamples,
    Modular,
    NoSecAgg,
    SeedHelper,
    Uniform,
)
from fedcore.privacy import CentralGaussian, DistributedGaussian, MatrixGaussian
from fedcore.training import ExampleLevelPrivacy

NOISE = {"noise_multiplier": 1.0, "delta": 1e-5}


def job(**changes):
    """A buffered job of 20 devices and buffers of ten."""
    schedule = Buffered(**changes.pop("schedule", {}))
    return Job(**({"clients": 20, "weighting": Uniform(), "schedule": schedule} | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weighting": ByExamples()}, "choose weighting=uniform, got weighting=examples"),
        (
            {"error_feedback": True, "sparsify": RandomK(0.5)},
            "choose error_feedback=false",
        ),
        ({"clip": AdaptiveClip()}, "choose clip=norm or clip=per_layer"),
        ({"downlink": Delta(4)}, "choose downlink=full"),
        (
            {"privacy": MatrixGaussian(**NOISE, bands=2, min_separation=2, participations=2)},
            "choose privacy=central_gaussian or distributed_gaussian",
        ),
        ({"sampling": Poisson()}, "choose sampling=fixed, got sampling=poisson"),
        (
            {
                "sampling": Poisson(),
                "privacy": DistributedGaussian(**NOISE, amplification=True),
            },
            "choose sampling=fixed",
        ),
        ({"pruning": Structured(0.3, after_round=1)}, "choose pruning=none"),
        ({"schedule": {"concurrency": 21}}, "concurrency must be at most clients=20, got 21"),
        ({"schedule": {"same_model": 10}}, "must hold 11 updates of each version"),
        ({"schedule": {"same_model": 10}, "dropout": 0.5}, "must hold 15 updates"),
        (
            {"clip": NoClip(), "quantize": NoQuantize(), "secagg": NoSecAgg()},
            "choose a quantizer",
        ),
        (
            {"sampling": FixedSize(over_selection=1.2), "dropout": 0.3},
            "choose sampling.over_selection=1",
        ),
        ({"backoff": ExponentialBackOff()}, "choose backoff=none"),
        (
            {
                "devices": Mixed(
                    classes=(DeviceClass(name="small", width=0.5), DeviceClass(name="l"))
                )
            },
            "choose devices=equal",
        ),
        ({"strategy": Robust("fedmedian")}, "compares single updates"),
    ],
)
def test_what_has_no_meaning_without_rounds_is_refused_in_one_line(changes, why):
    with pytest.raises(ConfigurationError) as caught:
        job(**changes)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("concurrency", 0),
        ("max_staleness", -1),
        ("max_staleness", 1024),
        ("same_model", 0),
        ("exponent", -0.1),
        ("exponent", 4.5),
        ("exponent", float("nan")),
    ],
)
def test_a_number_out_of_range_is_named(field, value):
    with pytest.raises(ConfigurationError, match=f"schedule.{field} must be in"):
        Buffered(**{field: value})


@pytest.mark.parametrize("secagg", [Bonawitz(), SeedHelper(), NoSecAgg()])
@pytest.mark.parametrize(
    "privacy",
    [
        DistributedGaussian(**NOISE),
        CentralGaussian(**NOISE),
        ExampleLevelPrivacy(),
        BothLevels(device=CentralGaussian(**NOISE), example=ExampleLevelPrivacy()),
    ],
    ids=lambda privacy: privacy.kind,
)
def test_every_protocol_goes_with_noise_of_either_unit(secagg, privacy):
    made = job(secagg=secagg, privacy=privacy, quantize=Modular(20), clip=Clip(1.0))
    assert Job.from_json(made.to_json()) == made
    assert job(strategy=FedAvgM()).schedule == Buffered()
    assert Job().schedule == Rounds()


def test_in_a_buffer_there_are_as_many_of_each_version_as_are_wanted_after_losses():
    assert Buffered(same_model=1).fewest(dropped=3) == 1  # nothing is demanded
    assert Buffered(same_model=2).fewest(dropped=0) == 2
    assert Buffered(same_model=2).fewest(dropped=3) == 5
