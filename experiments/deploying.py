"""The commands that run a deployment: what `experiments.deploy` calls for each of them.

    certs        the files of all parties                     `experiments.parties`
    superlink    at the coordinator, until it is stopped      `experiments.processes`
    node         on a device, until it is stopped
    submit       at the coordinator: one run, to its end      `experiments.following`
    rehearse     the same job, apps and identities in one process
    status       at the coordinator: who is there, what ran

Each returns the lines to print at its end; those that last print as they go.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from experiments.edge.pace import Pace
from experiments.following import JOB, Following, Patience, read_note, read_summary
from experiments.node_options import REHEARSAL, arguments, configured
from experiments.parties import AUTHORITY, CoordinatorKeys, DeviceKeys, create_parties
from experiments.processes import (
    LOOPBACK,
    STATE_KEY,
    Board,
    Coordinator,
    Setting,
    answers,
    become,
    prepare,
    prepare_board,
    proxy_configuration,
    started,
    unit,
    wait_forever,
    wait_until,
)
from experiments.submission import FlowerLink, Submission, admit, forget_admitted, nodes, runs
from fedcore.crypto import SystemEntropy
from fedcore.errors import ConfigurationError, FedcoreError
from fedcore.keyfiles import load_authority, read_file

if TYPE_CHECKING:
    from fedcore.job import Job

_WARNING: Final = "a rehearsal: masks and noise follow from the seed and protect nobody"


def certs(options: argparse.Namespace, now: int) -> list[Any]:
    """Create the files of all parties."""
    digits = len(str(options.count))
    names = [f"{options.prefix}{number:0{digits}}" for number in range(1, options.count + 1)]
    folders = create_parties(
        options.out,
        list(dict.fromkeys([*options.host, "localhost", LOOPBACK])),
        names,
        days=options.days,
        now=now,
        entropy=SystemEntropy(),
    )
    return [*folders, f"copy each folder to its party; keep {folders[0]} where no network is"]


def superlink(options: argparse.Namespace, now: int) -> list[Any]:
    """Serve devices until stopped."""
    del now
    coordinator = replace(_coordinator(options), database=not options.in_memory)
    coordinator.keys.check()
    proxy = proxy_configuration(coordinator, options.public_port)
    if options.unit:
        state = (*_flags(options, "keys", "state"), "--port", str(options.port))
        memory = ["--in-memory"] if options.in_memory else []
        public = ("--public-port", str(options.public_port))
        return [unit("superlink", ["superlink", *state, *public, *memory])]
    prepare(coordinator.state, SystemEntropy())
    if not coordinator.database:
        forget_admitted(coordinator)
    (coordinator.state / "nginx.conf").write_text(proxy, encoding="utf-8")
    authority = coordinator.keys.folder / "ca.crt"
    commands = coordinator.commands()
    if answers(coordinator.port, authority):
        msg = f"port {coordinator.port} has a SuperLink already: stop it, or choose another --port"
        raise ConfigurationError(msg)
    with started(commands, coordinator.state) as processes:
        wait_until(lambda: answers(coordinator.port, authority), processes, coordinator.state)
        for name in admit(coordinator):
            print(f"admitted {name}", flush=True)
        print(f"ready on {LOOPBACK}:{coordinator.port}, logs in {coordinator.state}", flush=True)
        wait_forever(processes, coordinator.state)
    return ["stopped"]


def node(options: argparse.Namespace, now: int) -> list[Any]:
    """Take part until stopped: this process becomes the board's first one."""
    del now
    board = _board(options)
    board.keys.check()
    settings = board.settings(_node_settings(options, board))
    if options.unit:
        return [unit("node", _node_arguments(options))]
    prepare_board(board, settings, SystemEntropy())
    if REHEARSAL in settings.node_config:
        print(_WARNING, flush=True)
    return become(board)


def submit(options: argparse.Namespace, now: int) -> list[Any]:
    """Run one job to its end, or take up the one of a folder."""
    del now
    coordinator = _coordinator(options)
    patience = Patience(options.patience * 60.0, options.restarts)
    if options.resume is not None:
        return _resume(options, coordinator, patience)
    if options.out is None:
        msg = "submit needs --out, a new folder for the results, or --resume FOLDER"
        raise ConfigurationError(msg)
    from fedcore.job import check  # noqa: PLC0415 - imports torch

    job = check(_job(options, coordinator.keys.folder / AUTHORITY)).job
    output = _new_output(options.out)
    (output / JOB).write_text(job.to_json(), encoding="utf-8")
    if options.rehearse:
        print(_WARNING, flush=True)
    link = FlowerLink(coordinator, Submission(job.to_json(), output, options.rehearse))
    following = Following(link, output, _say, options.rehearse, patience)
    return _closing(following.start(), output)


def _resume(options: argparse.Namespace, coordinator: Coordinator, patience: Patience) -> list[Any]:
    """Take up the run of a folder, whoever was killed meanwhile."""
    if options.out is not None or options.job is not None or options.overrides or options.rehearse:
        msg = (
            "--resume finds the job in its folder: leave out --out, --job, --rehearse and overrides"
        )
        raise ConfigurationError(msg)
    output = options.resume.resolve()
    job = read_file(output / JOB).decode("utf-8", "replace")
    note = read_note(output)
    rehearsal = note is not None and note.rehearsal
    if rehearsal:
        print(_WARNING, flush=True)
    link = FlowerLink(coordinator, Submission(job, output, rehearsal))
    return _closing(Following(link, output, _say, rehearsal, patience).resume(), output)


def _say(line: str) -> None:
    print(line, flush=True)


def rehearse(options: argparse.Namespace, now: int) -> list[Any]:
    """Run a job in this process, with everything but the network."""
    del now
    from clients.deployed import app as client_app  # noqa: PLC0415 - imports torch
    from experiments.deployed import app as server_app  # noqa: PLC0415 - imports torch
    from fedcore.engine import run_in_process  # noqa: PLC0415 - imports Flower
    from fedcore.job import Job  # noqa: PLC0415 - imports torch

    job = Job.from_json(read_file(options.job).decode("utf-8", "replace"))
    folders = sorted(path.parent.resolve() for path in options.parties.glob("*/device.key"))
    if len(folders) < job.clients:
        msg = (
            f"{options.parties} must hold the folders of clients={job.clients} devices, found "
            f"{len(folders)}: create more with certs"
        )
        raise ConfigurationError(msg)
    configs: list[dict[str, str | float | bool]] = [
        {**DeviceKeys(folder).settings(), REHEARSAL: job.seed} for folder in folders
    ]
    output = _new_output(options.out)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # the summary says it better
    run_in_process(
        server_app,
        client_app,
        node_configs=configs[: job.clients],
        run_config={
            **Submission(job.to_json(), output, rehearsal=True).settings(),
            "checkpoint": "",  # the same command holds all of it again
        },
    )
    return _closing(read_summary(output), output)


def status(options: argparse.Namespace, now: int) -> list[Any]:
    """Tell what the SuperLink knows."""
    del now
    coordinator = _coordinator(options)
    devices = nodes(coordinator)
    online = sum(state == "online" for _, state in devices)
    return [
        f"{online} of {len(devices)} admitted devices online",
        *(f"  {name}: {state}" for name, state in devices),
        *(f"run {run.get('run-id')}: {run.get('status')}" for run in runs(coordinator)),
    ]


def _coordinator(options: argparse.Namespace) -> Coordinator:
    return Coordinator(
        CoordinatorKeys(options.keys.resolve()), options.state.resolve(), options.port
    )


def _board(options: argparse.Namespace) -> Board:
    state = options.state.resolve()
    return Board(
        DeviceKeys(options.keys.resolve()),
        state,
        options.superlink,
        state_key=state / STATE_KEY if options.state_key is None else options.state_key.resolve(),
        pace=Pace(options.poll, max(options.poll, options.poll_idle)),
        warm_seconds=options.keep_warm,
    )


def _flags(options: argparse.Namespace, *names: str) -> list[str]:
    """Return options that are paths as arguments, independent of the current folder."""
    given = {name: getattr(options, name) for name in names}
    return [
        part
        for name, path in given.items()
        if path is not None
        for part in (f"--{name.replace('_', '-')}", str(path.resolve()))
    ]


def _node_arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments of this very node."""
    return [
        *("node", *_flags(options, "keys", "state", "data", "state_key")),
        *("--superlink", options.superlink, "--partition", str(options.partition)),
        *arguments(options),
    ]


def _node_settings(options: argparse.Namespace, board: Board) -> dict[str, Setting]:
    """Return the node's configuration: files, number, and what its owner demands."""
    settings: dict[str, Setting] = {
        **board.keys.settings(),
        "partition-id": options.partition,
        "journal": str(board.state / "answered"),
        "feedback": str(board.state / "unsent"),
        "state-key": str(board.state_key),
        **configured(options),
    }
    if options.data is not None:
        if not options.data.is_dir():  # a folder is mapped, see `fedcore.data.mapped`
            read_file(options.data)
        settings["data-path"] = str(options.data.resolve())
    return settings


def _job(options: argparse.Namespace, authority: Path) -> Job:
    """Return the job of a file or of Hydra's overrides, for devices of this authority."""
    from fedcore.job import Job  # noqa: PLC0415 - imports torch
    from fedcore.pipeline import Bonawitz, SeedHelper  # noqa: PLC0415 - with it

    if options.job is not None and options.overrides:
        msg = "pass overrides or --job, not both: a job file says everything"
        raise ConfigurationError(msg)
    if options.job is not None:
        job = Job.from_json(read_file(options.job).decode("utf-8", "replace"))
    else:
        job = _composed(options.overrides)
    if job.faults.kind != "none":
        msg = f"faults={job.faults.kind} makes simulated devices disappear: choose faults=none"
        raise ConfigurationError(msg)
    if isinstance(job.secagg, SeedHelper) and job.helper.kind == "local":
        msg = "helper=local would let the coordinator see every update: choose helper=remote"
        raise ConfigurationError(msg)
    if not isinstance(job.secagg, Bonawitz | SeedHelper):
        return job
    secagg = replace(job.secagg, authority=load_authority(authority).hex())
    return replace(job, secagg=secagg)


def _composed(overrides: Iterable[str]) -> Job:
    """Return the job that `experiments.train` would run with these overrides."""
    from hydra import compose, initialize_config_dir  # noqa: PLC0415 - --help needs no Hydra
    from hydra.errors import HydraException  # noqa: PLC0415 - with it
    from omegaconf.errors import OmegaConfBaseException  # noqa: PLC0415 - with it

    from experiments.command import CONF  # noqa: PLC0415 - with it
    from experiments.schema import to_experiment  # noqa: PLC0415 - imports torch

    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            return to_experiment(compose("train", overrides=["release=none", *overrides])).job
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(str(error)) from error


def _new_output(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"--out must be a new or empty folder, got {folder}: choose another"
        raise ConfigurationError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _closing(summary: Mapping[str, Any], output: Path) -> list[str]:
    if summary.get("stopped"):
        raise StoppedError(str(summary["stopped"]))
    release = summary["release"]
    return [
        f"{summary['completed_rounds']} of {summary['rounds']} rounds, "
        f"accuracy {summary['accuracy']:.4f}",
        f"{output / release['model']}: SHA-256 of the model {release['model_digest']}",
    ]


class StoppedError(FedcoreError):
    """A rehearsal ended before its last round."""


def address(text: str) -> str:
    """Take host:port."""
    if not re.fullmatch(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}", text):
        msg = f"must be host:port, got {text!r:.80}"
        raise argparse.ArgumentTypeError(msg)
    return text
