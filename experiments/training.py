"""One training run from its configuration to its report.

Nothing is written before everything that can be checked was checked. From then on the
run's folder is readable at any moment: rounds and ledger are written as they finish. Until
the run is finished its folder also has all that is needed to go on after the last round.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from clients.client_app import build_client_app, replayed_entropy
from clients.policy import DevicePolicy
from clients.simulated import simulated_identities
from experiments.compared import model_of, teacher, unpruned
from experiments.costs import costs_in_words, warnings_in_words
from experiments.recorder import Recorder, ReleaseSummary
from experiments.report import write_report
from experiments.schema import Experiment, InProcess, NoRelease, Ray
from experiments.sweep import (
    CHECKPOINTS,
    FAILED,
    INTERRUPTED,
    can_go_on,
    finished,
    swept_before,
)
from fedcore.crypto import SystemEntropy
from fedcore.engine import DropScript, run_in_process, run_on_ray
from fedcore.errors import ConfigurationError
from fedcore.job import Buffered, Job, Preflight, RemoteHelper, check, of_examples
from fedcore.manifest import Provenance
from fedcore.pipeline import NoSecAgg, SeedHelper
from fedcore.release import load_or_create_key, release_model
from fedcore.training import one_thread
from strategies.checkpoints import CheckpointFolder
from strategies.helper_client import InProcessHelper
from strategies.server_app import build_server_app
from strategies.surroundings import coordinator_entropy, helper_entropy

CALIBRATION_EXAMPLES = 256


def run_experiment(
    experiment: Experiment, cfg: DictConfig, *, resume: bool = False
) -> dict[str, object]:
    """Check, train, release, report; return the summary.

    Args:
        experiment: What to run, and where.
        cfg: What it was made from.
        resume: Go on in a folder that an earlier process wrote; a sweep does so by itself.

    Raises:
        ConfigurationError: Something cannot work; nothing was written.
        KeyboardInterrupt: The user stopped the run; what was finished is on disk.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)  # the progress bar says it better
    one_thread()
    job = experiment.job
    if (earlier := swept_before(Path(experiment.output), cfg)) is not None:
        print(f"{experiment.output} was finished by an earlier sweep")
        return earlier
    resume = resume or can_go_on(Path(experiment.output), cfg)
    folder = Path(experiment.output) if resume else new_folder(experiment.output)
    preflight = check(job)
    job = preflight.job  # its noise is stated now: devices and records get the same
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        write_configuration(folder, cfg)
    recorder = Recorder(folder, quiet=not sys.stderr.isatty())
    _announce(job, preflight, folder)
    release: ReleaseSummary | None = None
    done = False
    try:
        _run(experiment, job, preflight, recorder, folder / CHECKPOINTS)
        shutil.rmtree(folder / "model", ignore_errors=True)  # a release that was interrupted
        release = _release(experiment, job, preflight, recorder, folder)
        done = True
    except KeyboardInterrupt:
        recorder.stopped(INTERRUPTED)
        raise
    except Exception:
        recorder.stopped(FAILED)
        raise
    finally:
        if recorder.began or not resume:  # what cannot go on is left as it was
            summary = recorder.close(None if release is None else release.to_dict())
            report = write_report(folder)
            if done:
                shutil.rmtree(folder / CHECKPOINTS)
            print(_closing(summary, report))
    return summary


def stopped_run(folder: Path) -> DictConfig:
    """Return the configuration of a run that was stopped, to go on in its folder.

    Raises:
        ConfigurationError: There is no run, or it was finished.
    """
    path = folder / ".hydra" / "config.yaml"
    if not path.is_file():
        msg = f"{folder} has no .hydra/config.yaml: name the folder of a run that was stopped"
        raise ConfigurationError(msg)
    if finished(folder) is not None:
        msg = f"{folder} was finished: start another run, in another folder"
        raise ConfigurationError(msg)
    try:
        cfg = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        msg = f"{path} cannot be read: {error!s:.200}"
        raise ConfigurationError(msg) from error
    if not isinstance(cfg, DictConfig):
        msg = f"{path} must be the configuration of a run, found a list"
        raise ConfigurationError(msg)
    cfg.output = str(folder)  # wherever it was moved
    return cfg


def new_folder(output: str) -> Path:
    """Return the folder to write, which is not made yet.

    Raises:
        ConfigurationError: Something is there already.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"output must be a new or empty folder, got {output}: choose another"
        raise ConfigurationError(msg)
    return folder


def write_configuration(folder: Path, cfg: DictConfig) -> None:
    """Write what Hydra would have written, had it been allowed to before the checks."""
    from hydra.core.hydra_config import HydraConfig  # noqa: PLC0415 - only set inside a command

    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        overrides = OmegaConf.to_yaml(hydra.overrides.task)
        (folder / ".hydra" / "overrides.yaml").write_text(overrides, encoding="utf-8")
        (folder / ".hydra" / "hydra.yaml").write_text(OmegaConf.to_yaml(hydra), encoding="utf-8")


def _run(
    experiment: Experiment, job: Job, preflight: Preflight, recorder: Recorder, checkpoints: Path
) -> None:
    # Everybody draws from the seed here, but for a helper in another process, which answers
    # each round once, and for noise that is to come from the operating system.
    drawn = of_examples(job.privacy)
    secret = drawn is not None and drawn.secure_mode
    repeatable = not isinstance(job.helper, RemoteHelper) and not secret
    server = build_server_app(
        recorder,
        preflight,
        entropy=coordinator_entropy(job.seed),
        checkpoints=CheckpointFolder(checkpoints, repeatable=repeatable),
    )
    client = simulated_devices(job, signed=experiment.signed)
    run_config = {"job": job.to_json()}
    match experiment.engine:
        case InProcess(workers):
            run_in_process(
                server, client, num_nodes=job.clients, run_config=run_config, workers=workers
            )
        case Ray(cpus):
            run_on_ray(server, client, job.clients, run_config, cpus_per_client=cpus)


def simulated_devices(job: Job, *, signed: bool, inner: Sequence[Mod] = ()) -> ClientApp:
    """Return the ClientApp of a simulation, whose randomness follows from the job's seed.

    Args:
        job: What the devices take part in.
        signed: Whether they are enrolled.
        inner: Mods between the secure sum and the train function.
    """
    return build_client_app(
        DevicePolicy(
            most_dropout=job.dropout,
            require_masks=not isinstance(job.secagg, NoSecAgg),
            authority=getattr(job.secagg, "authority", None),
            helper_key=_helper_key(job),
            minimum_same_model=same_model(job),
        ),
        entropy=replayed_entropy(job.seed),
        identity=simulated_identities(job.seed) if signed else None,
        keep_answer=isinstance(job.faults, DropScript),  # nothing else gets lost in a simulation
        inner=inner,
    )


def same_model(job: Job) -> int:
    """Return what simulated devices demand of a buffer: what the job promises."""
    return job.schedule.same_model if isinstance(job.schedule, Buffered) else 1


def _helper_key(job: Job) -> str | None:
    """Return the seed helper that simulated devices pin."""
    if not isinstance(job.secagg, SeedHelper):
        return None
    if isinstance(job.helper, RemoteHelper):
        return job.helper.public_key
    return InProcessHelper(helper_entropy(job.seed)).public_key.hex()


def _release(
    experiment: Experiment, job: Job, preflight: Preflight, recorder: Recorder, folder: Path
) -> ReleaseSummary | None:
    """Export, sign, read back and try the final model."""
    if isinstance(experiment.release, NoRelease) or recorder.arrays is None:
        return None
    dataset = preflight.dataset
    model = model_of(job, dataset, recorder.arrays)
    calibration = dataset.x_test[:CALIBRATION_EXAMPLES]
    key_path = Path(experiment.release.key or folder / "signing.key")
    report = release_model(
        model,
        folder=folder / "model",
        name=job.name,
        labels=tuple(str(label) for label in range(dataset.classes)),
        calibration=calibration,
        x_test=dataset.x_test,
        y_test=dataset.y_test,
        key=load_or_create_key(key_path, SystemEntropy()),
        provenance=Provenance(
            run_id=folder.name,
            seed=job.seed,
            rounds=job.rounds,
            epsilon=float(preflight.epsilon),
            delta=float(preflight.delta or 0.0),
            config_digest=hashlib.sha256(job.to_json().encode()).hexdigest(),
        ),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return ReleaseSummary(
        path=str(report.path),
        version=report.version,
        parameters=report.parameters,
        macs=report.macs,
        onnx_bytes=report.onnx_bytes,
        float_bytes=report.float_bytes,
        agreement=report.agreement,
        float_accuracy=report.float_accuracy,
        int8_accuracy=report.device.accuracy,
        device_latency_ms=report.device.latency_ms,
        device_peak_memory_mb=report.device.peak_memory_mb,
        unpruned=unpruned(job, dataset, recorder.unpruned, calibration),
        teacher=teacher(job, dataset),
    )


def _announce(job: Job, preflight: Preflight, folder: Path) -> None:
    bound = preflight.bound
    masks = "masked" if bound and (bound.secagg or bound.helper) else "in the clear"
    if bound is None:
        form = "as float32"
    elif bound.compressor is not None:
        form = f"one by one, by {bound.compressor.kind}"
    else:
        form = f"in a {bound.ring.bits}-bit ring"
    weights = f"{preflight.parameters:,}"
    if len(preflight.sizes) > 1:
        weights += f" and then {preflight.sizes[-1]:,}"
    more = f", {job.invited} invited" if job.invited > job.clients_per_round else ""
    print(
        f"{job.name}: {weights} weights, {job.rounds} rounds, "
        f"{job.clients_per_round} of {job.clients} clients a round{more}, uploads {masks} {form}, "
        f"epsilon {preflight.epsilon:.3g} after the last round\n{folder}",
        flush=True,
    )
    for line in (*costs_in_words(preflight.privacy), *warnings_in_words(preflight.privacy)):
        print(line, flush=True)


def _closing(summary: dict[str, object], report: Path) -> str:
    """Return the one block that a user reads at the end."""
    rows = [("rounds", f"{summary.get('completed_rounds')} of {summary.get('rounds')}")]
    if summary.get("stopped"):
        rows.append(("stopped", str(summary["stopped"])))
    if summary.get("completed_rounds"):
        rows += _result_rows(summary)
    rows.append(("report", str(report)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _result_rows(summary: dict[str, object]) -> list[tuple[str, str]]:
    secagg, release = summary["secagg"], summary["release"]
    rows = [("test accuracy", f"{summary['accuracy']:.4f}"), ("privacy", _privacy(summary))]
    if summary["uplink_payload_reduction"] is not None:  # somebody uploaded
        rows.append(
            (
                "upload",
                f"{summary['uplink_payload_bytes_per_client_round']:,.0f} bytes a client and round "
                f"({summary['uplink_payload_reduction']:.1f}x smaller than float32), "
                f"{summary['uplink_bytes_per_client_round']:,.0f} with keys, shares and metrics",
            )
        )
        rows.append(
            (
                "both ways",
                f"{summary['total_bytes_per_client_round']:,.0f} bytes for each update that "
                f"arrived, all counted ({summary['total_reduction']:.1f}x smaller than float32)",
            )
        )
    if isinstance(secagg, dict):
        rows.append(
            (
                "secure sum",
                f"{secagg['neighbours']} neighbours, threshold {secagg['threshold']}, "
                f"{secagg['dropped_clients']} clients lost, "
                f"{secagg['aborted_rounds']} rounds aborted",
            )
        )
    if isinstance(release, dict):
        rows.append(
            (
                "release",
                f"{release['path']}: {release['onnx_bytes']:,} bytes, verified and run without "
                f"torch, accuracy {release['int8_accuracy']:.4f}, agreement "
                f"{release['agreement']:.4f}",
            )
        )
    rows.append(
        (
            "speed",
            f"{summary['seconds_total']:.1f} s, "
            f"{summary['clients_per_second']:.0f} clients a second, "
            f"{summary['peak_memory_mb']:.0f} MB",
        )
    )
    return rows


def _privacy(summary: dict[str, object]) -> str:
    if summary["epsilon"] == "inf":
        return "none: epsilon inf"
    spent = f"epsilon {_short(summary['epsilon'])}, delta {_short(summary['delta'])}"
    if summary["unit"] == "device" and summary["epsilon_example"] is not None:
        spent += (
            f" for a device; epsilon {_short(summary['epsilon_example'])}, delta "
            f"{_short(summary['delta_example'])} for an example"
        )
    return spent


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
