from dataclasses import replace
from math import inf

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients.client_app import build_client_app, replayed_entropy
from fedcore.codec import Clip, RandomK
from fedcore.engine import DropScript, on_grid, run_in_process, run_on_ray
from fedcore.engine.flower_private import Identity
from fedcore.errors import ConfigurationError
from fedcore.job import FedAvgM, FedOpt, FedProx, Robust, check
from fedcore.models import build
from fedcore.pipeline import Modular, Uniform
from fedcore.pipeline.envelope import STAGES
from fedcore.privacy import DistributedGaussian, DistributedSkellam
from fedcore.training import ExampleLevelPrivacy, get_arrays
from strategies.sampling import choose_cohort
from strategies.server_app import MOST_ABORTED_IN_A_ROW, build_server_app
from strategies.surroundings import describe_by
from tests.strategies.federation import RecordingGrid, node_of
from tests.strategies.jobs import CLEAR, JOB, OPEN, PLAIN, SIGNED, Recorder, model_bytes, run_job

NOISE = DistributedGaussian(noise_multiplier=0.3, delta=1e-5)
PRIVATE = {"privacy": NOISE, "weighting": Uniform(), "clip": Clip(1.0)}
FEEDBACK = {"error_feedback": True, "sparsify": RandomK(0.3), "quantize": Modular(14)}
DROPS = {"faults": DropScript(seed=2, per_round=1, stages=("upload",))}


@pytest.fixture(scope="module")
def secure():
    return run_job()


@pytest.fixture(scope="module")
def plain():
    return run_job(**PLAIN)


def test_a_secure_run_learns_as_well_as_a_plain_one(secure, plain):
    assert secure.initial.accuracy < 0.3
    assert plain.accuracy > 0.85
    assert secure.accuracy == pytest.approx(plain.accuracy, abs=0.01)
    for name, array in secure.last.arrays.items():
        np.testing.assert_allclose(array, plain.last.arrays[name], atol=1e-3)


def test_the_observer_is_told_about_every_round(secure):
    assert [report.round_number for report in secure.reports] == [1, 2, 3]
    assert [report.survivors for report in secure.reports] == [6, 6, 6]
    assert [report.invited for report in secure.reports] == [6, 6, 6]
    assert set(secure.reports[0].metrics) == {"train-loss", "train-accuracy"}
    assert secure.reasons == []
    losses = [progress.evaluation.loss for progress in secure.progress]
    assert losses == sorted(losses, reverse=True)
    assert secure.last.ledger.epsilon == inf
    assert len(secure.last.ledger.releases) == 3


@pytest.mark.parametrize(
    "changes",
    [{}, PLAIN, PRIVATE, FEEDBACK | DROPS],
    ids=["secure", "plain", "private", "feedback"],
)
def test_two_runs_of_one_seed_give_the_same_bytes_and_another_seed_others(changes):
    one, again = run_job(rounds=2, **changes), run_job(rounds=2, **changes)
    assert one.model == again.model
    assert one.reports == again.reports
    assert run_job(seed=1, rounds=2, **changes).model != one.model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        DROPS,
        FEEDBACK,
        FEEDBACK | DROPS,
        PRIVATE,
        PRIVATE | FEEDBACK | DROPS | {"quantize": Modular(20)},
        {"strategy": FedOpt("fedadam", eta=0.05)},
        {"privacy": DistributedSkellam(noise_multiplier=0.3, delta=1e-5), "weighting": Uniform()},
    ],
    ids=["plain", "drops", "feedback", "both", "noise", "all", "fedadam", "skellam"],
)
def test_masks_change_not_a_single_bit(changes):
    masked, clear = run_job(rounds=2, **changes), run_job(rounds=2, **changes, **CLEAR)
    assert masked.model == clear.model
    assert [report.metrics for report in masked.reports] == [
        report.metrics for report in clear.reports
    ]
    assert masked.last.ledger == clear.last.ledger
    assert masked.reports[0].threshold > 0 == clear.reports[0].threshold
    lost = {"upload": 1} if "faults" in changes else {}
    assert [report.lost for report in masked.reports] == [lost, lost]
    assert [report.lost for report in clear.reports] == [lost, lost]


@pytest.mark.parametrize("changes", [{}, FEEDBACK | DROPS, PLAIN], ids=["secure", "all", "plain"])
def test_worker_processes_change_not_a_single_bit(changes):
    here, forked = run_job(rounds=2, **changes), run_job(rounds=2, workers=2, **changes)
    assert here.model == forked.model
    assert here.reports == forked.reports


@pytest.mark.parametrize("stage", ["advertise", "share", "upload", "reveal"])
def test_a_drop_at_any_stage_leaves_the_same_mean_in_every_run(stage):
    drops = {"faults": DropScript(seed=1, per_round=1, stages=(stage,))}
    one, again = run_job(rounds=1, **drops), run_job(rounds=1, **drops)
    assert one.model == again.model
    assert one.reports[0].lost == {stage: 1}
    assert one.reports[0].survivors == (6 if stage == "reveal" else 5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_signed_run_loses_whom_an_unsigned_one_loses_and_nobody_to_the_endorsements(stage):
    drops = {"faults": DropScript(seed=1, per_round=1, stages=(stage,))}
    signed, unsigned = (run_job(rounds=1, **drops, **change) for change in (SIGNED, {}))
    assert signed.model == unsigned.model
    assert signed.reports[0].lost == {stage: 1}
    assert signed.reports[0].survivors == (6 if stage in {"endorse", "reveal"} else 5)
    assert unsigned.reports[0].lost == ({} if stage == "endorse" else {stage: 1})


@pytest.mark.parametrize(
    "strategy",
    [FedAvgM(), FedProx(), FedOpt("fedadam"), FedOpt("fedyogi"), FedOpt("fedadagrad", tau=0.01)],
    ids=lambda strategy: strategy.kind,
)
def test_every_linear_strategy_gives_the_model_of_a_plain_run(strategy):
    secure, plain = (run_job(rounds=2, strategy=strategy, **change) for change in ({}, PLAIN))
    for name, array in secure.last.arrays.items():
        np.testing.assert_allclose(array, plain.last.arrays[name], atol=5e-3, err_msg=name)


@pytest.mark.parametrize(
    "strategy",
    [Robust("krum", malicious=1), Robust("fedmedian"), Robust("fedtrimmedavg")],
    ids=lambda strategy: strategy.kind,
)
def test_a_robust_strategy_runs_where_single_updates_are_seen(strategy):
    recorder = run_job(rounds=2, strategy=strategy, **PLAIN)
    assert recorder.accuracy > 0.8
    with pytest.raises(ConfigurationError, match=f"strategy={strategy.kind} compares"):
        replace(JOB, strategy=strategy)


def test_example_level_privacy_is_accounted_by_the_example():
    changes = {"privacy": ExampleLevelPrivacy(noise_multiplier=0.7), "weighting": Uniform()}
    recorder = run_job(rounds=2, **changes)
    releases = recorder.last.ledger.releases
    assert [(release.unit, release.round_number) for release in releases] == [
        ("example", 1),
        ("example", 2),
    ]
    projected = check(replace(JOB, rounds=2, **changes)).epsilon
    assert recorder.last.ledger.epsilon == pytest.approx(projected)
    assert recorder.last.report.epsilon == recorder.last.ledger.epsilon < inf
    assert recorder.last.report.metrics == {}
    assert recorder.accuracy > 0.5


def test_example_level_privacy_does_without_the_codec_too():
    changes = {"privacy": ExampleLevelPrivacy(noise_multiplier=0.7), "weighting": Uniform()}
    recorder = run_job(rounds=1, **changes, **PLAIN)
    assert recorder.last.ledger.releases[0].unit == "example"


def test_noise_in_the_sum_is_accounted_by_the_device():
    recorder = run_job(rounds=2, **PRIVATE)
    assert {release.unit for release in recorder.last.ledger.releases} == {"device"}
    spent = [report.epsilon for report in recorder.reports]
    assert 0 < spent[0] < spent[1] < inf
    assert spent[1] == recorder.last.ledger.epsilon
    assert spent[1] == pytest.approx(check(replace(JOB, rounds=2, **PRIVATE)).epsilon)


def test_a_plain_run_shows_an_infinite_epsilon_and_an_empty_ledger(plain):
    assert {report.epsilon for report in plain.reports} == {inf}
    assert plain.last.ledger.releases == ()


def test_a_round_trains_the_cohort_that_its_seed_chooses():
    wires = []

    def record(grid):
        wires.append(RecordingGrid(grid))
        return wires[0]

    job = replace(JOB, rounds=3, seed=4, clients_per_round=3, dropout=0.0)
    run_in_process(
        on_grid(build_server_app(None, check(job)), record),
        build_client_app(entropy=replayed_entropy(4)),
        num_nodes=8,
        run_config={"job": job.to_json()},
    )
    trained = [
        str(message.metadata.dst_node_id - node_of(0))
        for message in wires[0].sent
        if message.content.array_records
    ]
    everybody = [str(n) for n in range(8)]
    chosen = [choose_cohort(everybody, 3, seed=4, round_number=n) for n in (1, 2, 3)]
    assert [set(trained[at : at + 3]) for at in (0, 3, 6)] == [set(cohort) for cohort in chosen]
    assert len(trained) == 9


def test_the_model_is_tested_as_often_as_the_job_says_and_at_the_end():
    recorder = run_job(evaluate_every=2)
    tested = [progress.evaluation is not None for progress in recorder.progress]
    assert tested == [False, True, True]


def test_a_run_with_too_few_nodes_is_refused():
    with pytest.raises(ConfigurationError, match="expected 8 nodes, found 3"):
        run_job(nodes=3, stage_seconds=0.2)


def test_a_run_that_gets_nowhere_is_stopped():
    drops = {"faults": DropScript(per_round=4, stages=("upload",))}
    recorder = run_job(rounds=9, **drops)
    assert len(recorder.progress) == MOST_ABORTED_IN_A_ROW
    assert [report.survivors for report in recorder.reports] == [0] * MOST_ABORTED_IN_A_ROW
    assert "rounds in a row were aborted" in recorder.reasons[0]
    assert "needed 5 clients, found 2" in recorder.reasons[0]
    assert recorder.last.ledger.releases == ()


def test_an_aborted_round_leaves_the_model_as_it_was(secure):
    drops = {"faults": DropScript(per_round=4, stages=("upload",))}
    recorder = run_job(rounds=1, **drops)
    assert recorder.model == model_bytes(get_arrays(build(JOB.model, (1, 8, 8), 10, 0)))


def test_a_budget_that_runs_out_stops_the_run_with_its_last_model():
    """A preflight of another job stands for a budget that somebody raised too late."""
    rounds = 3
    enough = check(replace(JOB, rounds=rounds, **PRIVATE))
    budget = check(replace(JOB, rounds=2, **PRIVATE)).epsilon * 1.001
    tight = PRIVATE | {"privacy": replace(NOISE, epsilon_budget=budget)}
    job = replace(JOB, rounds=rounds, **tight)
    with pytest.raises(ConfigurationError, match="it lasts for 2 rounds"):
        check(job)
    recorder = Recorder()
    run_in_process(
        build_server_app(recorder, enough),
        build_client_app(OPEN, entropy=replayed_entropy(0)),
        num_nodes=8,
        run_config={"job": job.to_json()},
    )
    assert [report.survivors for report in recorder.reports] == [6, 6]
    assert "round 3 would raise epsilon" in recorder.reasons[0]


def test_a_run_without_an_observer_and_preflight_checks_itself():
    job = replace(JOB, rounds=1, classes=3)
    with pytest.raises(ConfigurationError, match="classes must be 10"):
        run_in_process(
            build_server_app(), build_client_app(), num_nodes=8, run_config={"job": job.to_json()}
        )


def test_a_device_refuses_a_job_in_the_clear_unless_it_is_told_otherwise():
    recorder = Recorder()
    job = replace(JOB, rounds=1, **CLEAR)
    run_in_process(
        build_server_app(recorder, check(job)),
        build_client_app(entropy=replayed_entropy(0)),
        num_nodes=8,
        run_config={"job": job.to_json()},
    )
    assert recorder.reports[0].survivors == 0
    assert recorder.reports[0].lost == {"upload": 6}


def test_a_fault_script_reads_protocol_messages_and_plain_training():
    describe = describe_by({7: "phone"})
    with Identity(1, 1, 1).assumed():
        config = RecordDict({"config": ConfigRecord({"server-round": 3})})
        assert describe(Message(config, 7, "train")) == (3, "upload", "phone")
        assert describe(Message(config, 7, "evaluate")) is None
        assert describe(Message(RecordDict(), 7, "train")) == (0, "upload", "phone")


@pytest.mark.slow
def test_ray_gives_the_bytes_of_the_in_process_engine():
    job = replace(JOB, clients=4, clients_per_round=4, rounds=2, dropout=0.0, error_feedback=True)
    recorder = Recorder()
    run_on_ray(
        build_server_app(recorder, check(job)),
        build_client_app(OPEN, entropy=replayed_entropy(0)),
        4,
        {"job": job.to_json()},
    )
    here = run_job(clients=4, clients_per_round=4, rounds=2, dropout=0.0, error_feedback=True)
    assert [report.survivors for report in recorder.reports] == [4, 4]
    assert recorder.model == here.model
    assert [report.metrics for report in recorder.reports] == [
        report.metrics for report in here.reports
    ]
    assert recorder.last.ledger == here.last.ledger
