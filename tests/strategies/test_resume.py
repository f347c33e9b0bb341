"""A run that is stopped at any moment goes on as if it had not been, or pays for the round."""

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from math import inf

import numpy as np
import pytest

from clients.client_app import build_client_app, replayed_entropy
from fedcore.codec import Clip, Delta, PublicTopK, RandomK
from fedcore.crypto import SystemEntropy
from fedcore.engine import DropScript, WrappedGrid, run_in_process, run_on_ray
from fedcore.engine.run import on_grid
from fedcore.errors import ConfigurationError
from fedcore.job import FedAvgM, FedOpt, FedProx, Poisson, check
from fedcore.models import Mlp, Structured
from fedcore.pipeline import AdaptiveClip, Modular, SeedHelper, Uniform
from fedcore.privacy import DistributedGaussian, MatrixGaussian, PrivacyLedger
from fedcore.training import ExampleLevelPrivacy
from strategies import server_app
from strategies.checkpoint import Checkpoint
from strategies.checkpoints import LOST, CheckpointFolder, Checkpoints
from strategies.first import NO_DELTA
from strategies.matrix_run import MatrixRun
from strategies.server_app import build_server_app
from strategies.strategy_state import _ATTRIBUTES
from strategies.surroundings import coordinator_entropy
from tests.strategies.jobs import CLEAR, JOB, OPEN, PLAIN, SIGNED, Recorder, model_bytes, run_job

NOISE = DistributedGaussian(noise_multiplier=0.3, delta=1e-5)
PRIVATE = {"privacy": NOISE, "weighting": Uniform(), "clip": Clip(1.0), "quantize": Modular(20)}
FEEDBACK = {"error_feedback": True, "sparsify": RandomK(0.3), "quantize": Modular(14)}
DROPS = {"faults": DropScript(seed=2, per_round=1, stages=("upload",))}
MATRIX = {
    "privacy": MatrixGaussian(
        noise_multiplier=0.2, delta=1e-5, bands=2, min_separation=2, participations=3
    ),
    "weighting": Uniform(),
    "clip": Clip(1.0),
    "clients_per_round": 4,
}
EXAMPLES = {"privacy": ExampleLevelPrivacy(noise_multiplier=2.0), "weighting": Uniform()}
MOMENTUM = {"strategy": FedAvgM(server_learning_rate=0.7, server_momentum=0.5)}
KINDS = {
    "secure": {},
    "plain": PLAIN,
    "signed": SIGNED,
    "helper": {"secagg": SeedHelper()},
    "private momentum": PRIVATE | MOMENTUM,
    "feedback with losses": FEEDBACK | DROPS,
    "downlink": {"downlink": Delta(8), "sparsify": PublicTopK(0.3)},
    "adaptive clip": {"clip": AdaptiveClip(initial=0.5), "weighting": Uniform()},
    "adam": {"strategy": FedOpt(kind="fedadam", eta=0.05)},
    "yogi": CLEAR | {"strategy": FedOpt(kind="fedyogi", eta=0.05)},
    "pruned": MOMENTUM
    | {"model": Mlp(hidden=(16,)), "clip": Clip(100.0)}
    | {"pruning": Structured(ratio=0.5, after_round=1)},
    "correlated": MATRIX | CLEAR,
    "poisson": PRIVATE | {"sampling": Poisson()},
    "examples": EXAMPLES,
}


class KilledError(BaseException):
    """Stands for the end of the process: nothing may handle it."""


class Dying(Recorder):
    """An observer that ends its process when it is told of a round."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._after = after

    def round_finished(self, progress):
        super().round_finished(progress)
        if progress.report.round_number == self._after:
            raise KilledError


@contextmanager
def dying_at_note(count):
    """End the process after `count` notes of rounds that begin or are about to be revealed."""
    note, seen = Checkpoints.note, []

    def noting(self, round_number, ledger):
        note(self, round_number, ledger)
        seen.append(round_number)
        if len(seen) == count:
            raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "note", noting)
        with pytest.raises(KilledError):
            yield


def lines(run):
    """All that is told of the rounds of a run but how long they took."""
    earlier = () if run.earlier is None else run.earlier.past
    return [replace(past, seconds=0) for past in (*earlier, *(p.past for p in run.progress))]


@pytest.fixture(scope="module")
def whole():
    runs = {}

    def of(name, **more):
        if name not in runs:
            runs[name] = run_job(**KINDS[name], **more)
        return runs[name]

    return of


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name, whole, tmp_path):
    uninterrupted, folder = whole(name), CheckpointFolder(tmp_path, repeatable=True)
    with pytest.raises(KilledError):  # told of round 2, which is not in a checkpoint yet
        run_job(**KINDS[name], checkpoints=folder, recorder=Dying(2))
    with dying_at_note(2):  # in round 2: its sum may be known
        run_job(**KINDS[name], checkpoints=folder)
    resumed = run_job(**KINDS[name], checkpoints=folder)
    assert [p.report.round_number for p in resumed.earlier.past] in ([1], [1, 2])
    assert resumed.model == uninterrupted.model
    assert resumed.last.ledger == uninterrupted.last.ledger
    assert resumed.last.examples == uninterrupted.last.examples
    assert lines(resumed) == lines(uninterrupted)
    assert resumed.initial == uninterrupted.initial


def test_what_devices_keep_is_kept_for_them_in_workers_too(whole, tmp_path):
    folder = CheckpointFolder(tmp_path, repeatable=True)
    name = "feedback with losses"
    with pytest.raises(KilledError):
        run_job(**KINDS[name], checkpoints=folder, recorder=Dying(3), workers=2)
    assert run_job(**KINDS[name], checkpoints=folder, workers=2).model == whole(name).model


def test_a_run_that_was_over_when_it_was_stopped_is_told_again(whole, tmp_path):
    folder = CheckpointFolder(tmp_path, repeatable=True)
    first = run_job(checkpoints=folder)
    again = run_job(checkpoints=folder)
    assert again.progress == []
    assert lines(again) == lines(first) == lines(whole("secure"))
    assert model_bytes(again.earlier.arrays) == first.model
    assert len(list(tmp_path.glob("*.checkpoint"))) == 2


def test_the_model_before_pruning_is_told_again(whole, tmp_path):
    folder = CheckpointFolder(tmp_path, repeatable=True)
    before = model_bytes(whole("pruned").progress[0].arrays)
    with pytest.raises(KilledError):
        run_job(**KINDS["pruned"], checkpoints=folder, recorder=Dying(3))
    resumed = run_job(**KINDS["pruned"], checkpoints=folder)
    assert model_bytes(resumed.earlier.unpruned) == before


@pytest.mark.parametrize(
    "strategy",
    [
        MOMENTUM["strategy"],
        FedProx(),
        *(FedOpt(kind=kind) for kind in ("fedadagrad", "fedadam", "fedyogi")),
    ],
    ids=lambda strategy: strategy.kind,
)
def test_no_strategy_changes_an_attribute_that_is_not_kept(strategy, monkeypatch):
    made = []
    monkeypatch.setattr(
        server_app,
        "build_strategy",
        lambda *args, build=server_app.build_strategy, **more: (
            made.append(build(*args, **more)) or made[-1]
        ),
    )
    run_job(strategy=strategy, rounds=2, **CLEAR)
    fresh = server_app.build_strategy(strategy, cohort=6)
    changed = {name for name, value in vars(made[0]).items() if value is not vars(fresh)[name]}
    plain = {name for name in changed if vars(made[0])[name] == vars(fresh)[name]}
    assert changed - plain <= set(_ATTRIBUTES)


def run_in_the_world(folder, *, recorder=None, devices=None, **changes):
    """Run `JOB` as on a SuperLink: fresh randomness, and rounds that are held once."""
    job, seen = replace(JOB, **changes), recorder or Recorder()
    run_in_process(
        build_server_app(seen, check(job)),
        devices or build_client_app(OPEN, entropy=replayed_entropy(0)),
        num_nodes=job.clients,
        run_config={"job": job.to_json(), "checkpoint": str(folder)},
    )
    return seen


@pytest.mark.parametrize(("note", "charged"), [(3, False), (4, True)], ids=["begun", "revealed"])
def test_in_the_world_an_interrupted_round_is_lost_and_paid_for_if_it_was_revealed(
    note, charged, tmp_path
):
    with dying_at_note(note):
        run_in_the_world(tmp_path, **PRIVATE)
    resumed = run_in_the_world(tmp_path, **PRIVATE)
    past = resumed.earlier.past
    assert [p.report.round_number for p in past] == [1, 2]
    assert past[1].report.aborted == (LOST,)
    assert [report.round_number for report in resumed.reports] == [3]
    rounds = [release.round_number for release in resumed.last.ledger.releases]
    assert rounds == ([1, 2, 3] if charged else [1, 3])
    assert past[1].report.epsilon == resumed.earlier.ledger.epsilon < inf


def test_in_the_world_local_training_of_a_lost_round_is_paid_for(tmp_path):
    changes = EXAMPLES | PLAIN
    with dying_at_note(2):
        run_in_the_world(tmp_path, **changes)
    resumed = run_in_the_world(tmp_path, **changes)
    rounds = [release.round_number for release in resumed.last.ledger.releases]
    assert rounds == [1, 2, 3]
    assert resumed.earlier.past[1].report.epsilon == resumed.earlier.ledger.epsilon < inf


@pytest.mark.parametrize("note", [3, 4])
def test_in_the_world_correlated_noise_goes_on_and_no_row_is_used_twice(note, tmp_path):
    with dying_at_note(note):
        run_in_the_world(tmp_path, **(MATRIX | CLEAR))
    before = MatrixRun.resume(tmp_path / "noise")
    resumed = run_in_the_world(tmp_path, **(MATRIX | CLEAR))
    kept = MatrixRun.resume(tmp_path / "noise")
    assert kept.tape.seed == before.tape.seed
    assert (before.tape.last, kept.tape.last) == (1, 3)
    assert {release.stream for release in resumed.last.ledger.releases} == {kept.tape.stream}
    assert resumed.reasons == []


def test_noise_that_was_begun_before_the_first_checkpoint_is_taken_up_unless_it_was_used(tmp_path):
    changes, path = MATRIX | CLEAR, tmp_path / "noise"
    begun = MatrixRun.start(changes["privacy"], SystemEntropy(), path)
    run_in_the_world(tmp_path, **changes)
    assert MatrixRun.resume(path).tape.seed == begun.tape.seed
    for kept in (*tmp_path.glob("*.checkpoint"), tmp_path / "round"):
        kept.unlink()
    with pytest.raises(ConfigurationError, match="already: resume it"):
        run_in_the_world(tmp_path, **changes)


def test_what_is_told_to_devices_keeps_the_name_of_the_run(tmp_path):
    with pytest.raises(KilledError):
        run_in_the_world(tmp_path, recorder=Dying(1))
    run_in_the_world(tmp_path)
    latest = Checkpoint.from_bytes(max(tmp_path.glob("*.checkpoint")).read_bytes())
    assert latest.grid.run_id == "1"
    assert latest.grid.round_number == 3


def test_a_run_goes_on_while_a_device_is_away(tmp_path):
    """A wrapped grid, as a SuperLink: devices are found, and not known by construction."""

    def run(nodes, recorder):
        job = replace(JOB, clients_per_round=8, stage_seconds=0.5, **PRIVATE)
        server = build_server_app(recorder, check(job))
        run_in_process(
            on_grid(server, WrappedGrid),
            build_client_app(OPEN, entropy=replayed_entropy(0)),
            num_nodes=nodes,
            run_config={"job": job.to_json(), "checkpoint": str(tmp_path)},
        )
        return recorder

    with pytest.raises(KilledError):
        run(8, Dying(1))
    with pytest.raises(ConfigurationError, match="expected 8 nodes, found 7"):
        run_in_process(
            on_grid(build_server_app(), WrappedGrid),
            build_client_app(OPEN),
            num_nodes=7,
            run_config={"job": replace(JOB, clients_per_round=8, stage_seconds=0.5).to_json()},
        )
    resumed = run(7, Recorder())
    assert [report.survivors for report in resumed.reports] == [7, 7]


def test_a_damaged_checkpoint_is_passed_over_and_said_so(whole, tmp_path, caplog):
    folder = CheckpointFolder(tmp_path, repeatable=True)
    run_job(checkpoints=folder)
    latest = max(tmp_path.glob("*.checkpoint"))
    latest.write_bytes(latest.read_bytes()[:-1])
    again = run_job(checkpoints=folder)
    assert [report.round_number for report in again.reports] == [3]
    assert again.model == whole("secure").model
    assert "its hash does not fit: it is damaged" in caplog.text
    assert "going on from the one before, after round 2" in caplog.text


def test_in_the_world_rounds_after_the_earlier_checkpoint_are_lost_and_paid_for(tmp_path):
    first = run_in_the_world(tmp_path, **(PRIVATE | {"rounds": 4}), recorder=Recorder())
    latest = max(tmp_path.glob("*.checkpoint"))
    latest.write_bytes(b"")
    again = run_in_the_world(tmp_path, **(PRIVATE | {"rounds": 4}))
    assert again.progress == []
    assert again.earlier.ledger == first.last.ledger
    assert again.earlier.past[-1].report.aborted == (LOST,)


def test_without_a_checkpoint_that_can_be_read_nothing_is_begun(tmp_path):
    folder = CheckpointFolder(tmp_path, repeatable=True)
    run_job(checkpoints=folder)
    for path in tmp_path.glob("*.checkpoint"):
        path.write_bytes(b"nothing")
    seen = Recorder()
    with pytest.raises(ConfigurationError, match=r"no checkpoint in .* can be read"):
        run_job(checkpoints=folder, recorder=seen)
    for path in tmp_path.glob("*.checkpoint"):
        path.unlink()
    with pytest.raises(ConfigurationError, match="knows of round 3, but has no checkpoint"):
        run_job(checkpoints=folder, recorder=seen)
    (tmp_path / "round").write_bytes(b"{}")
    with pytest.raises(ConfigurationError, match="says what the last round has spent"):
        run_job(checkpoints=folder, recorder=seen)
    assert seen.initial is None


def test_another_job_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path, repeatable=True)
    run_job(checkpoints=folder)
    with pytest.raises(ConfigurationError, match="belongs to another job"):
        run_job(checkpoints=folder, rounds=4)
    (tmp_path / "round").unlink()
    with pytest.raises(ConfigurationError, match="checkpoint belongs to another job"):
        run_job(checkpoints=folder, seed=1)


def test_two_processes_do_not_use_one_folder(tmp_path):
    mine = Checkpoints(CheckpointFolder(tmp_path), "job")
    code = (
        "import sys; from pathlib import Path; "
        "from strategies.checkpoints import CheckpointFolder, Checkpoints; "
        f"Checkpoints(CheckpointFolder(Path({str(tmp_path)!r})), 'job')"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "no other process uses" in other.stderr
    mine.close()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0


def test_what_cannot_be_kept_is_not_begun(tmp_path):
    kept = Checkpoints(CheckpointFolder(tmp_path / "run"), "job")
    (tmp_path / "run" / "lock").unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(ConfigurationError, match="the run must not go on"):
        kept.note(1, PrivacyLedger(delta=NO_DELTA))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="checkpoints cannot be kept"):
        Checkpoints(CheckpointFolder(tmp_path / "file"), "job")


def test_a_checkpoint_is_for_its_owners_eyes_only(tmp_path):
    run_job(checkpoints=CheckpointFolder(tmp_path / "kept", repeatable=True), rounds=1)
    for path in (tmp_path / "kept").iterdir():
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_an_engine_that_forgets_its_devices_refuses_to_repeat_what_they_kept(tmp_path):
    job = replace(JOB, **(FEEDBACK | CLEAR))
    folder = CheckpointFolder(tmp_path, repeatable=True)
    run_job(**(FEEDBACK | CLEAR), checkpoints=folder)
    server = build_server_app(None, check(job), entropy=coordinator_entropy(0), checkpoints=folder)
    client = build_client_app(OPEN, entropy=replayed_entropy(0))
    with pytest.raises(Exception, match="error_feedback=true keeps on each device"):
        run_on_ray(server, client, job.clients, {"job": job.to_json()})


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    for name in ("downlink", "correlated", "feedback with losses", "signed", "pruned"):
        folder = tmp_path / name
        run_job(**KINDS[name], checkpoints=CheckpointFolder(folder, repeatable=True))
        data = max(folder.glob("*.checkpoint")).read_bytes()
        again = Checkpoint.from_bytes(data)
        assert again.to_bytes() == data
        assert all(np.isfinite(array).all() for array in again.model.values())
