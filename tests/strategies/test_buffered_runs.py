"""Asynchronous runs from the first model to the last: the same apps, the same protocols."""

from dataclasses import replace
from math import inf

import pytest

from clients.client_app import build_client_app, replayed_entropy
from clients.simulated import simulated_identities
from fedcore.codec import Clip, RandomK
from fedcore.engine import DropScript, HeavyTailed, on_grid, run_in_process
from fedcore.job import Buffered, FedAvgM, check
from fedcore.pipeline import Modular, PerLayerClip, SeedHelper, Uniform
from fedcore.pipeline.envelope import CHECK_IN
from fedcore.privacy import CentralGaussian, DistributedGaussian
from strategies.checkpoints import LOST, CheckpointFolder
from strategies.helper_client import InProcessHelper
from strategies.server_app import build_server_app
from strategies.surroundings import coordinator_entropy, helper_entropy
from tests.strategies.federation import RecordingGrid, stage_of
from tests.strategies.jobs import CLEAR, JOB, OPEN, SIGNED, Recorder, model_bytes

HELPER = {"secagg": SeedHelper()}
PACE = {"pace": HeavyTailed(latency_seconds=0.01)}
BUFFERED = {
    "schedule": Buffered(concurrency=8, max_staleness=5),
    "weighting": Uniform(),
    "clients": 12,
    "clients_per_round": 5,
    "rounds": 5,
}
NOISE = {
    "privacy": DistributedGaussian(noise_multiplier=0.3, delta=1e-5),
    "clip": Clip(1.0),
    "quantize": Modular(20),
}
CENTRAL = NOISE | {"privacy": CentralGaussian(noise_multiplier=0.3, delta=1e-5)}
DROPS = {"faults": DropScript(seed=2, per_round=1, stages=("upload",))}
MOMENTUM = {"strategy": FedAvgM(server_learning_rate=0.7, server_momentum=0.5)}
POLICY = replace(
    OPEN,
    minimum_same_model=1,
    helper_key=InProcessHelper(helper_entropy(0)).public_key.hex(),
)


def job_of(*changes):
    merged = dict(BUFFERED)
    for change in changes:
        merged |= change
    return replace(JOB, **merged)


def run(*changes, folder=None, observer=None, policy=POLICY, wrap=lambda grid: grid, workers=0):
    """Run a buffered job, every device enrolled and with replayed entropy."""
    job, observer = job_of(*changes), observer or Recorder()
    server = build_server_app(
        observer, check(job), entropy=coordinator_entropy(0), checkpoints=folder
    )
    client = build_client_app(policy, entropy=replayed_entropy(0), identity=simulated_identities(0))
    run_in_process(
        on_grid(server, wrap) if wrap(None) is not None else server,
        client,
        num_nodes=job.clients,
        run_config={"job": job.to_json()},
        workers=workers,
    )
    return observer


def ages(run):
    return [report.buffer.staleness for report in run.reports]


@pytest.fixture(scope="module")
def masked():
    return run(PACE)


def test_an_asynchronous_run_learns_from_updates_of_several_versions(masked):
    assert masked.accuracy > 0.85
    assert [report.survivors for report in masked.reports] == [5] * 5
    assert ages(masked)[0] == (0,) * 5
    assert max(max(taken) for taken in ages(masked)) >= 1
    assert masked.reasons == []
    seconds = [progress.seconds for progress in masked.progress]
    assert seconds == sorted(seconds)
    assert seconds[-1] > 60  # of the fleet, not of this machine


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (DROPS,),
        (NOISE,),
        (CENTRAL, DROPS),
        (NOISE, {"sparsify": RandomK(0.3)}),
        (MOMENTUM, {"clip": PerLayerClip()}),
    ],
    ids=["plain", "drops", "noise", "central", "sparse", "layers"],
)
def test_masks_of_any_kind_change_not_a_single_bit_of_a_buffer(changes):
    runs = [run(PACE, {"rounds": 3}, *changes, kind) for kind in ({}, CLEAR, HELPER, SIGNED)]
    assert len({one.model for one in runs}) == 1
    assert len({one.last.ledger for one in runs}) == 1
    for one in runs:
        assert ages(one) == ages(runs[0])
        assert [report.metrics for report in one.reports] == [
            report.metrics for report in runs[0].reports
        ]
        assert all(report.lost.get("upload", 0) == (DROPS in changes) for report in one.reports)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_without_a_pace_is_the_same_whoever_computes(workers):
    assert run(workers=workers).model == run().model


def test_every_buffer_is_one_entry_of_the_ledger_and_nothing_is_amplified():
    private = run(PACE, NOISE)
    releases = private.last.ledger.releases
    assert [release.round_number for release in releases] == [1, 2, 3, 4, 5]
    assert {release.sampling for release in releases} == {"unknown"}
    assert not any(release.amplification_claimed for release in releases)
    in_rounds = check(replace(job_of(NOISE), schedule=JOB.schedule))
    assert private.last.ledger.epsilon == pytest.approx(in_rounds.epsilon)
    assert run(PACE).last.ledger.epsilon == inf


def test_a_device_is_in_a_buffer_once_and_sends_no_model_back_and_forth(masked):
    wires = []

    def recorded(grid):
        if grid is None:
            return True
        wires.append(RecordingGrid(grid))
        return wires[-1]

    # On a grid that is not the engine's own, the clock is the real one: milliseconds, then.
    quick = {"pace": HeavyTailed(median_seconds=0.06, latency_seconds=0.0)}
    again = run(quick, wrap=recorded)
    assert again.reports[0].traffic.downloads >= 8
    uploads = {}
    for message in wires[0].sent:
        if stage_of(message) == "upload":
            assert not message.content.array_records
            uploads.setdefault(message.metadata.group_id, []).append(message.metadata.dst_node_id)
        if stage_of(message) == CHECK_IN:
            assert len(message.content.array_records) == 1
    assert [len(set(nodes)) for nodes in uploads.values()] == [5] * 5
    assert [len(nodes) for nodes in uploads.values()] == [5] * 5


def test_each_version_of_a_buffer_has_as_many_updates_as_the_devices_demand():
    strict = run(PACE, {"dropout": 0.2}, policy=replace(POLICY, minimum_same_model=2))
    for taken in ages(strict):
        assert all(taken.count(age) >= 3 for age in taken)  # two, whoever of them drops out
    assert all(report.survivors == 5 for report in strict.reports)


def test_devices_that_demand_more_of_their_own_model_than_there_are_do_not_take_part():
    alone = {"schedule": Buffered(concurrency=8, same_model=1)}
    refused = run(PACE, alone, policy=replace(POLICY, minimum_same_model=4))
    for report in refused.reports:  # four of one version, whoever of the five drops out
        assert report.survivors == (5 if len(set(report.buffer.staleness)) == 1 else 0)
    assert 0 in [report.survivors for report in refused.reports]


def test_devices_that_go_away_while_they_work_hold_nobody_up():
    pace = {"pace": HeavyTailed(lapse=0.2, latency_seconds=0.01)}
    lossy = run(pace, {"clients": 20})
    assert sum(report.lost.get(CHECK_IN, 0) for report in lossy.reports) > 0
    assert [report.survivors for report in lossy.reports] == [5] * 5


def test_no_update_is_older_than_the_schedule_allows():
    fresh = {"schedule": Buffered(concurrency=8, max_staleness=0, same_model=1)}
    assert {age for taken in ages(run(PACE, fresh)) for age in taken} == {0}
    stale = {"schedule": Buffered(concurrency=8, max_staleness=2, same_model=1), "rounds": 8}
    assert max(age for taken in ages(run(PACE, stale)) for age in taken) == 2


def test_a_run_in_which_nobody_checks_in_stops():
    nobody = {"pace": HeavyTailed(lapse=0.999), "rounds": 9}
    stalled = run(nobody)
    assert len(stalled.progress) == 3
    assert "nobody is left who trains" in stalled.reasons[0]
    assert stalled.last.ledger.releases == ()


class KilledError(BaseException):
    """Stands for the end of the process."""


class Dying(Recorder):
    """Ends its process when it is told of a buffer."""

    def round_finished(self, progress):
        super().round_finished(progress)
        if progress.report.round_number == 3:
            raise KilledError


KINDS = {
    "masks": (),
    "helper and losses": (HELPER, DROPS),
    "noise and momentum": (NOISE, MOMENTUM),
    "signed": (SIGNED,),
}


def told(run):
    earlier = () if run.earlier is None else run.earlier.past
    return [replace(past, seconds=0) for past in (*earlier, *(p.past for p in run.progress))]


@pytest.mark.parametrize("pace", [PACE, {}], ids=["paced", "at once"])
@pytest.mark.parametrize("name", KINDS)
def test_a_simulation_that_was_stopped_goes_on_bit_for_bit(name, pace, tmp_path):
    changes = (pace, *KINDS[name], {"rounds": 6})
    whole = run(*changes, folder=CheckpointFolder(tmp_path / "whole", repeatable=True))
    folder = CheckpointFolder(tmp_path / "run", repeatable=True)
    with pytest.raises(KilledError):  # the third buffer is not in a checkpoint yet
        run(*changes, folder=folder, observer=Dying())
    resumed = run(*changes, folder=folder)
    assert resumed.earlier.past[-1].report.round_number == 2
    assert resumed.model == whole.model
    assert told(resumed) == told(whole)
    assert resumed.last.ledger == whole.last.ledger


def test_in_the_world_work_that_was_under_way_is_lost_and_the_model_goes_on(tmp_path):
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(KilledError):
        run(PACE, NOISE, folder=folder, observer=Dying())
    resumed = run(PACE, NOISE, folder=folder)
    assert [past.report.round_number for past in resumed.earlier.past] == [1, 2, 3]
    assert resumed.earlier.past[-1].report.aborted == (LOST,)
    first = resumed.progress[0].report
    assert (first.round_number, set(first.buffer.staleness)) == (4, {0})
    numbers = [release.round_number for release in resumed.last.ledger.releases]
    assert numbers == [1, 2, 3, 4, 5]
    assert model_bytes(resumed.earlier.arrays) != resumed.model
