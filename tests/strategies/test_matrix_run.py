"""Whole runs with correlated noise, and what a coordinator must not forget."""

from dataclasses import replace

import numpy as np
import pytest

from clients.client_app import build_client_app, replayed_entropy
from fedcore.codec import Clip
from fedcore.crypto import ReplayedEntropy, SystemEntropy
from fedcore.engine import FaultyGrid, run_in_process
from fedcore.errors import BudgetExhaustedError, ConfigurationError
from fedcore.job import Everyone, FedAvgM, FixedSize, Poisson, check
from fedcore.pipeline import FreshNoise, Modular, NoiseTape, Uniform
from fedcore.privacy import MatrixGaussian, PrivacyLedger
from strategies.matrix_run import MatrixRun
from strategies.sampling import Cohorts
from strategies.server_app import build_server_app
from tests.fedcore.pipeline.rounds import bound_round, private_plan
from tests.strategies.federation import ROOMY, client_app, losing, play
from tests.strategies.jobs import CLEAR, JOB, OPEN, Recorder, run_job

NOISE = MatrixGaussian(
    noise_multiplier=0.2, delta=1e-5, bands=2, min_separation=2, participations=3
)
SPACED = {
    "privacy": NOISE,
    "weighting": Uniform(),
    "clip": Clip(1.0),
    "clients": 8,
    "clients_per_round": 4,
    "rounds": 6,
}
ENTROPY = ReplayedEntropy(b"matrix")


def plan_with(noise=NOISE, **changes):
    return private_plan(**({"privacy": noise, "quantize": Modular(24)} | changes))


def started(path=None, noise=NOISE):
    return MatrixRun.start(noise, ENTROPY, path)


EVERY_ROUND = MatrixGaussian(
    noise_multiplier=0.5, delta=1e-5, bands=1, min_separation=1, participations=4
)
"""All ten clients of the federation may take part in four rounds running."""


def test_masked_and_unmasked_runs_publish_the_same_bits():
    masked, clear = run_job(**SPACED), run_job(**SPACED, **CLEAR)
    assert masked.reasons == []
    assert masked.model == clear.model
    assert run_job(**SPACED, **CLEAR, seed=1).model != clear.model


def test_a_run_with_momentum_works_as_well():
    momentum = FedAvgM(server_learning_rate=0.5, server_momentum=0.5)
    run = run_job(**SPACED, **CLEAR, strategy=momentum)
    assert [report.survivors for report in run.reports] == [4] * 6
    assert run.accuracy > run.initial.accuracy + 0.2


def test_the_run_costs_one_mechanism_and_never_less_than_what_was_possible():
    ledgers = [progress.ledger for progress in run_job(**SPACED, **CLEAR).progress]
    spent = [ledger.epsilon for ledger in ledgers]
    assert spent == sorted(spent)
    assert len(set(spent)) == 3
    assert {release.stream for release in ledgers[-1].releases} != {""}
    assert spent[-1] == pytest.approx(check_job().epsilon)


def check_job(**changes):
    return check(replace(JOB, **(SPACED | CLEAR | changes)))


def test_at_equal_epsilon_bands_leave_less_noise_in_the_model_than_independent_rounds():
    many = SPACED | CLEAR | {"clients": 24, "clients_per_round": 3, "rounds": 24, "dropout": 0.0}
    sizes, spent = {}, {}
    for bands in (1, 8):
        noise = MatrixGaussian(
            noise_multiplier=0.3, delta=1e-5, bands=bands, min_separation=8, participations=3
        )
        runs = [run_job(**(many | {"privacy": noise}), seed=seed) for seed in (0, 1, 2)]
        # With so much noise a model is little else.
        sizes[bands] = np.mean([np.square(array).mean() for run in runs for array in weights(run)])
        spent[bands] = runs[0].last.ledger.epsilon
    assert spent[8] == spent[1]
    assert sizes[8] < sizes[1] * 0.6


def weights(run):
    return run.last.arrays.values()


def test_cohorts_keep_their_distance_and_wear_devices_evenly():
    run = started(noise=MatrixGaussian(
        noise_multiplier=1.0, delta=1e-5, bands=4, min_separation=4, participations=5
    ))  # fmt: skip
    labels = {node: str(node) for node in range(13)}
    seen: dict[int, list[int]] = {}
    cohorts = Cohorts(
        labels, FixedSize(), size=3, devices=13, seed=5, entropy=ReplayedEntropy(b""), spacing=run
    )
    for number in range(1, 22):
        cohort = cohorts.current()
        assert cohort == cohorts.current()
        assert cohorts.executed(cohort).sampling == "unknown"  # whoever took part less comes first
        run.invite([labels[node] for node in cohort], number)
        for node in cohort:
            seen.setdefault(node, []).append(number)
        cohorts.finish()
    assert all(min(np.diff(rounds)) >= 4 for rounds in seen.values())
    assert max(map(len, seen.values())) <= 5
    # 13 devices, 5 times each, 3 a round: 21 rounds, and not one more.
    with pytest.raises(BudgetExhaustedError, match="round 22 needs 3 devices, but only"):
        cohorts.current()


@pytest.mark.parametrize("sampling", [Poisson(), Everyone()])
def test_correlated_noise_refuses_cohorts_that_do_not_keep_their_distance(sampling):
    with pytest.raises(ConfigurationError, match="sampling=fixed"):
        check_job(sampling=sampling)


def test_a_fleet_too_small_is_refused_before_training():
    with pytest.raises(ConfigurationError, match="need clients=8 at least, got 7"):
        check_job(clients=7)
    with pytest.raises(ConfigurationError, match="need clients=12 at least, got 8"):
        check_job(rounds=9)


def test_the_grid_refuses_to_invite_a_device_too_early_and_sends_nothing():
    wires = []

    def keep(wire):
        wires.append(wire)
        return wire

    with pytest.raises(ConfigurationError, match=r"round 2 would invite 10 that may not"):
        play(client_app(seed=1), plan_with(), rounds=2, wrap=keep)
    assert {message.metadata.group_id for message in wires[0].sent} == {"1"}


def test_an_aborted_round_publishes_nothing_and_uses_up_no_row():
    plan = plan_with(EVERY_ROUND, dropout=0.3, secagg=ROOMY.secagg)
    faulty, run = _losing_round(2), started(noise=EVERY_ROUND)
    broken = play(client_app(seed=1), plan, rounds=3, wrap=faulty, noise=run)
    assert [report.survivors for report in broken.reports] == [10, 0, 10]
    assert [release.round_number for release in broken.grid.ledger.releases] == [1, 3]
    assert run.tape.last == 3
    assert set(run.taken.values()) == {(3, 3)}  # whoever was asked took part


def _losing_round(number):
    def script(message):
        late = message.metadata.group_id == str(number)
        return losing(range(5), "upload")(message) if late else None

    return lambda grid: FaultyGrid(grid, script)


def test_a_run_goes_on_from_its_file_with_the_same_noise(tmp_path):
    path = tmp_path / "noise"
    bounds = [bound_round(plan_with(), dim=30, round_number=number) for number in (1, 2, 3)]
    whole = NoiseTape(NOISE, started().tape.seed)
    expected = [whole.draw(bound) for bound in bounds]
    run = started(path)
    run.invite(["a", "b"], 1)
    np.testing.assert_array_equal(run.draw(bounds[0]), expected[0])
    again = MatrixRun.resume(path)
    assert again.taken == {"a": (1, 1), "b": (1, 1)}
    assert not again.eligible("a", 2)
    np.testing.assert_array_equal(again.draw(bounds[1]), expected[1])
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_second_grid_on_the_same_file_and_ledger_goes_on(tmp_path):
    path, plan = tmp_path / "noise", plan_with(EVERY_ROUND)
    first = play(client_app(seed=1), plan, rounds=2, noise=started(path, EVERY_ROUND))
    second = play(client_app(seed=1), plan, noise=MatrixRun.resume(path), ledger=first.grid.ledger)
    assert [release.round_number for release in second.grid.ledger.releases] == [1, 2, 3]
    whole = play(client_app(seed=1), plan, rounds=3, noise=started(noise=EVERY_ROUND))
    assert second.grid.ledger.epsilon == whole.grid.ledger.epsilon


def test_noise_that_was_lost_or_rolled_back_stops_the_run(tmp_path):
    path, plan = tmp_path / "noise", plan_with(EVERY_ROUND)
    run = started(path, EVERY_ROUND)
    old = path.read_bytes()
    ledger = play(client_app(seed=1), plan, rounds=2, noise=run).grid.ledger
    with pytest.raises(ConfigurationError, match="resume the run with its own file"):
        play(client_app(seed=1), plan, noise=MatrixRun.start(EVERY_ROUND, SystemEntropy()),
             ledger=ledger)  # fmt: skip
    with pytest.raises(ConfigurationError, match="rolled back"):
        play(client_app(seed=1), plan, noise=MatrixRun.from_bytes(old), ledger=ledger)
    path.unlink()
    with pytest.raises(ConfigurationError, match="must not be drawn anew"):
        MatrixRun.resume(path)


def test_a_file_is_never_started_over_and_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "noise"
    started(path)
    with pytest.raises(ConfigurationError, match="already: resume it"):
        started(path)
    data = path.read_bytes()
    for damaged in (
        b"",
        data[:-1],
        data.replace(b"v1", b"v9"),
        b"{}",
        data.replace(b'"seed":"', b'"seed":"0'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match="is damaged"):
            MatrixRun.resume(path)


def test_what_cannot_be_kept_is_not_published(tmp_path):
    run = started(tmp_path / "noise")
    run.path = tmp_path / "gone" / "noise"
    with pytest.raises(ConfigurationError, match="nothing may be published"):
        run.draw(bound_round(plan_with(), dim=30))


def test_correlated_noise_is_drawn_by_a_run_that_counts_participations():
    with pytest.raises(ConfigurationError, match="takes its noise from a MatrixRun"):
        play(client_app(seed=1), plan_with(), noise=NoiseTape(NOISE, bytes(32)))
    with pytest.raises(ConfigurationError, match="takes its noise from a MatrixRun"):
        play(client_app(seed=1), plan_with(), noise=FreshNoise(ENTROPY))
    with pytest.raises(ConfigurationError, match="but the plan says"):
        play(client_app(seed=1), plan_with(EVERY_ROUND), noise=started())


def test_a_run_does_not_print_its_seed(tmp_path):
    run = started(tmp_path / "noise")
    assert run.tape.seed.hex() not in repr(run)
    assert repr(run.tape.seed)[2:-1] not in repr(run)
    assert run.tape.seed.hex().encode() in (tmp_path / "noise").read_bytes()
    assert run.tape.seed.hex() not in PrivacyLedger(delta=1e-5).to_json()


def test_a_server_app_keeps_its_noise_in_the_file_that_the_run_names(tmp_path):
    path, job, seen = tmp_path / "noise", replace(JOB, **(SPACED | CLEAR)), Recorder()
    run_in_process(
        build_server_app(seen, check(job)),
        build_client_app(OPEN, entropy=replayed_entropy(0)),
        num_nodes=job.clients,
        run_config={"job": job.to_json(), "noise-file": str(path)},
    )
    kept = MatrixRun.resume(path)
    assert kept.tape.last == 6
    assert {count for _, count in kept.taken.values()} == {3}
    assert seen.last.ledger.releases[-1].stream == kept.tape.stream
