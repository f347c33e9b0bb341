"""Whole runs with devices of several classes: who is asked, for what, and what becomes of it."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedcore.codec import Clip, Delta, RandomK
from fedcore.crypto import ReplayedEntropy
from fedcore.engine import DropScript, VirtualClock, to_arrays, to_record
from fedcore.errors import ConfigurationError
from fedcore.job import DeviceClass, Equal, Mixed, Profile
from fedcore.job.devices import simulated_profiles
from fedcore.models import Mlp
from fedcore.models.parts import part_of
from fedcore.pipeline import ByClass, Modular, RunPlan, SeedHelper, Uniform
from fedcore.privacy import DistributedGaussian, PrivacyLedger
from fedcore.training import LocalTraining
from fedcore.vectors import Layout
from strategies.helper_client import InProcessHelper
from strategies.patience import Sizes, device_seconds, patience
from tests.strategies.federation import OPEN, SilentGrid, client_app, node_of, play, stage_of
from tests.strategies.jobs import CLEAR, JOB, PLAIN, SIGNED, run_job

SMALL = DeviceClass(name="small", memory_mib=512, cores=1, link_kbps=256, width=0.5, simulated=0.5)
LARGE = DeviceClass(name="large", memory_mib=2048, cores=4, link_kbps=1024, simulated=0.5)
DEVICES = Mixed(classes=(SMALL, LARGE))
MIXED = {
    "model": Mlp(hidden=(12,)), "weighting": Uniform(), "devices": DEVICES, "clip": Clip(10.0),
    "rounds": 2,
}  # fmt: skip
NOISE = {
    "privacy": DistributedGaussian(noise_multiplier=0.2, delta=1e-3), "quantize": Modular(20),
}  # fmt: skip
CHANGES = {
    "rolling": {},
    "nested": {"devices": replace(DEVICES, structure="nested")},
    "drops": {"faults": DropScript(seed=1, per_round=1, stages=("upload",))},
    "noise": NOISE,
    "sparse": {"sparsify": RandomK(0.5, unbiased=False)},
    "feedback": {
        "sparsify": RandomK(0.5, unbiased=False), "error_feedback": True,
        "devices": replace(DEVICES, structure="nested"),
    },
    "delta": {"downlink": Delta(8)},
    "steps": {
        "devices": replace(DEVICES, classes=(replace(SMALL, steps=0.5), LARGE), normalise=True)
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_masks_change_not_a_single_bit_of_a_mean_over_classes(changes):
    settings = MIXED | changes
    masked, clear = run_job(**settings), run_job(**settings, **CLEAR)
    assert masked.model == clear.model
    assert all(report.survivors for report in masked.reports)
    assert masked.model != run_job(**(settings | {"devices": Equal()})).model


def test_classes_work_among_enrolled_devices():
    assert run_job(**MIXED, **SIGNED).model == run_job(**MIXED, **CLEAR).model


def test_a_run_with_classes_learns():
    settings = MIXED | {"rounds": 12, "training": LocalTraining(epochs=2, learning_rate=0.1)}
    assert run_job(**settings, **CLEAR).accuracy > 0.8


def test_devices_of_a_class_that_is_not_asked_are_never_invited():
    devices = replace(DEVICES, classes=(replace(SMALL, width=0.0), LARGE))
    settings = MIXED | {"devices": devices, "clients_per_round": 4, "dropout": 0.0}
    recorder = run_job(**settings, **CLEAR)
    assert [report.survivors for report in recorder.reports] == [4, 4]
    with pytest.raises(ConfigurationError, match="invites 5 devices, and 4 of 8 are large enough"):
        run_job(**(settings | {"clients_per_round": 5}), **CLEAR)


def test_the_population_of_a_draw_is_those_that_may_be_asked():
    devices = replace(DEVICES, classes=(replace(SMALL, width=0.0), LARGE))
    settings = MIXED | NOISE | {"devices": devices, "clients_per_round": 3, "dropout": 0.0}
    ledger = run_job(**settings).last.ledger
    assert isinstance(ledger, PrivacyLedger)
    assert {release.population for release in ledger.releases} == {4}


def test_what_hides_a_device_costs_the_same_with_classes_as_without():
    settings = MIXED | NOISE
    mixed, equal = run_job(**settings), run_job(**(settings | {"devices": Equal()}))
    assert mixed.last.ledger == equal.last.ledger


PLAN = RunPlan(
    weighting=Uniform(), dropout=0.3,
    shares=ByClass(widths=(0.5, 1.0), steps=(1.0, 1.0), structure="nested", least_trainers=2),
)  # fmt: skip


def trains(large):
    """A train function of an 8-8-1 chain; `large` clients train all of it, by 1 each."""

    def train(message, client):
        (record,) = message.content.array_records.values()
        arrays = to_arrays(record)
        index = int(client in large)
        part = part_of(Layout.of(arrays), (0.5, 1.0)[index], "nested", 0)
        moved = {name: array + 1 for name, array in part.take(arrays).items()}
        return RecordDict(
            {
                "arrays": to_record(part.put(arrays, moved)),
                "metrics": MetricRecord({"num-examples": 1}),
                "part": ConfigRecord({"part": index}),
            }
        )

    return train


def chain():
    shapes = {"0.weight": (8, 3), "0.bias": (8,), "2.weight": (1, 8), "2.bias": (1,)}
    return to_record({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})


def test_a_weight_that_two_of_ten_train_moves_as_far_as_one_that_all_train():
    played = play(client_app(seed=1, train=trains({2, 7})), PLAN, model=chain())
    for array in played.arrays.values():
        np.testing.assert_allclose(array, 1.0, atol=1e-4)


def test_classes_work_with_a_second_party():
    helper = InProcessHelper(ReplayedEntropy(b"helper"))
    key = helper.public_key.hex()
    plan = replace(PLAN, secagg=SeedHelper(public_key=key))
    app = client_app(seed=1, policy=replace(OPEN, helper_key=key), train=trains({2, 7}))
    played = play(app, plan, model=chain(), helper=helper)
    for array in played.arrays.values():
        np.testing.assert_allclose(array, 1.0, atol=1e-4)


def test_a_round_in_which_one_device_alone_trained_a_weight_is_aborted_and_reveals_nothing():
    played = play(client_app(seed=1, train=trains({2})), PLAN, model=chain())
    (report,) = played.reports
    assert report.survivors == 0
    assert "trained by too few devices to be summed" in report.aborted[0]
    assert played.grid is not None
    assert played.grid.ledger.releases == ()
    assert not any(stage_of(message) == "reveal" for message in played.wire.sent)


def test_it_is_the_survivors_that_count_not_those_who_were_invited():
    gone = {node_of(2)}
    clock = VirtualClock()
    played = play(
        client_app(seed=1, train=trains({2, 7})), PLAN, model=chain(), clock=clock,
        wrap=lambda grid: SilentGrid(
            grid, lambda m: m.metadata.dst_node_id in gone and stage_of(m) == "upload"
        ),
    )  # fmt: skip
    assert played.reports[0].survivors == 0


def test_a_device_demands_that_nobody_trains_a_weight_alone():
    weak = replace(PLAN, shares=replace(PLAN.shares, least_trainers=1))
    played = play(client_app(seed=1, train=trains({2, 7})), weak, model=chain())
    assert played.reports[0].survivors == 0
    assert played.reports[0].lost == {"advertise": 10}


def test_a_device_may_refuse_rounds_with_parts_and_still_take_fewer_steps():
    policy = replace(OPEN, allow_parts=False)
    train = trains({*range(10)})
    narrow = play(client_app(seed=1, policy=policy, train=train), PLAN, model=chain())
    assert narrow.reports[0].lost == {"advertise": 10}
    steps = replace(PLAN, shares=replace(PLAN.shares, widths=(1.0, 1.0), steps=(0.5, 1.0)))
    whole = play(client_app(seed=1, policy=policy, train=train), steps, model=chain())
    assert whole.reports[0].survivors == 10


def test_a_train_function_that_knows_no_classes_is_no_party_to_a_round_with_them():
    played = play(client_app(seed=1), PLAN)
    assert played.reports[0].survivors == 0


BAD = [
    (PLAIN, "devices=mixed divides each weight's sum"),
    ({"model": JOB.model}, "model=logistic has no hidden channels"),
    (
        {"devices": replace(DEVICES, classes=(replace(SMALL, steps=0.3), LARGE))},
        "must be a whole number of epochs, got 0.6",
    ),
    (
        {
            "devices": replace(DEVICES, classes=(replace(SMALL, steps=0.5), LARGE), normalise=True),
            "training": LocalTraining(epochs=2, momentum=0.9),
        },
        "for plain SGD only",
    ),
    ({"error_feedback": True}, "choose error_feedback=false, or devices.structure=nested"),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_jobs_with_classes_that_cannot_be_right_are_refused_in_one_line(changes, said):
    with pytest.raises(ConfigurationError, match=said) as refusal:
        replace(JOB, **(MIXED | changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"classes": ()}, "must be 1 to 16 classes"),
        ({"classes": (replace(SMALL, width=0.0),)}, "nobody is asked"),
        ({"classes": (SMALL, replace(LARGE, simulated=0.4))}, "must add up to 1"),
        ({"classes": (SMALL, LARGE), "margin": 0.5}, "margin must be at least 1"),
        ({"classes": (SMALL, LARGE), "core_gflops": 0.0}, "core_gflops must be positive"),
    ],
)
def test_classes_that_make_no_fleet_are_refused(wrong, said):
    with pytest.raises(ConfigurationError, match=said):
        Mixed(**wrong)


@pytest.mark.parametrize("wrong", [{"memory_mib": 1000}, {"width": 1.5}, {"steps": 0.0}])
def test_a_class_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=r"devices\.classes"):
        DeviceClass(name="odd", **wrong)


def test_a_device_is_of_the_largest_class_that_it_suits():
    assert DEVICES.class_of(Profile(4096, 8, 2048)) == 1
    assert DEVICES.class_of(Profile(4096, 2, 2048)) == 0
    assert DEVICES.class_of(Profile(256, 8, 2048)) is None
    assert not DEVICES.asks(Profile())


def test_simulated_fractions_are_exact_and_have_nothing_to_do_with_the_order():
    profiles = simulated_profiles(DEVICES, 10, 3)
    classes = [DEVICES.class_of(profile) for profile in profiles]
    assert sorted(classes) == [0] * 5 + [1] * 5
    assert classes != sorted(classes)
    assert profiles != simulated_profiles(DEVICES, 10, 4)


SIZES = Sizes(weights=10**6, down_bytes=4 * 10**6, up_bytes=2 * 10**6)


def test_a_deadline_is_that_of_the_slowest_and_never_more_than_the_plan_allows():
    job = replace(JOB, **MIXED, stage_seconds=10_000.0)
    fast, slow = Profile(4096, 4, 8192, 64), Profile(1024, 1, 512, 1024)
    seconds = patience(job, {1: fast, 2: slow, 3: Profile(4096, 4, 8192)}, SIZES)
    assert seconds("advertise", [1, 2]) == 4 * 10.0
    # 48 Mbit at 512 kbit/s; 6 x 1024 examples x 2 epochs x half of 10^6 weights at 10^9/s
    alone = device_seconds(DEVICES, slow, "upload", SIZES, 2)
    assert alone == pytest.approx(10 + 48_000 / 512 + 6 * 1024 * 2 * 0.5e6 / 1e9)
    assert seconds("upload", [1, 2]) == pytest.approx(4 * alone)
    assert seconds("upload", [1]) < seconds("upload", [2])
    assert seconds("upload", [1, 3]) == 10_000.0  # one of them did not tell everything
    short = patience(replace(job, stage_seconds=60.0), {1: fast, 2: slow}, SIZES)
    assert short("upload", [1, 2]) == 60.0


def test_a_stage_waits_as_long_as_it_was_told_to():
    clock = VirtualClock()
    plan = RunPlan(dropout=0.3, stage_seconds=60.0)
    played = play(
        client_app(seed=1), plan, clock=clock,
        patience=lambda stage, _: 7.0 if stage == "upload" else 60.0,
        wrap=lambda grid: SilentGrid(
            grid, lambda m: m.metadata.dst_node_id == node_of(3) and stage_of(m) == "upload"
        ),
    )  # fmt: skip
    assert played.reports[0].lost == {"upload": 1}
    assert clock.now() == pytest.approx(7.0, abs=0.2)
