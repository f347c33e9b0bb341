"""The arguments of the commands that run a deployment, see `experiments.deploying`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from experiments import deploying, enrollment
from experiments.node_options import MOST_DEVICES, add_node_options, number, whole

PORT: Final = 9092
PUBLIC_PORT: Final = 8443
Parser = argparse.ArgumentParser


def add_commands(groups: Any, exits: str) -> None:
    """Add certs, superlink, node, submit, rehearse and status to the parser's groups."""
    _add_certs(groups, exits)
    _add_superlink(groups, exits)
    _add_node(groups, exits)
    _add_submit(groups, exits)
    _add_rehearse(groups, exits)
    _add_status(groups, exits)


def _add_certs(groups: Any, exits: str) -> None:
    leaf = groups.add_parser(
        "certs", help="the files of all parties, a folder for each",
        description="Create what is missing: a root of identities, an authority for TLS, the "
        "server's certificate, and a folder for each device with its two keys. Secret files "
        "have mode 0600; nothing is overwritten.",
        epilog=f"Example: certs --out pki --host fl.example.org --count 5. {exits}",
    )  # fmt: skip
    leaf.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the folders go")
    leaf.add_argument(
        "--host", action="append", default=[], metavar="NAME",
        help="under which devices reach the coordinator; may be repeated (always: localhost)",
    )  # fmt: skip
    leaf.add_argument(
        "--count", type=whole(1, MOST_DEVICES), required=True, metavar="N", help="of devices"
    )
    leaf.add_argument(
        "--prefix", type=_name, default="device-", help="of their names (default: device-)"
    )
    leaf.add_argument(
        "--days", type=whole(1, enrollment.MOST_DAYS), default=365, metavar="N",
        help="how long all of it is valid (default: 365)",
    )  # fmt: skip
    leaf.set_defaults(run=deploying.certs)


def _add_superlink(groups: Any, exits: str) -> None:
    leaf = groups.add_parser(
        "superlink", help="at the coordinator: serve devices until stopped",
        description="Start Flower's SuperLink with TLS, node authentication, a database and "
        "process isolation, admit the devices of the keys' folder, and write STATE/nginx.conf, "
        "the public door. The SuperLink itself listens on loopback only.",
        epilog=exits,
    )  # fmt: skip
    _add_coordinator(leaf)
    leaf.add_argument(
        "--public-port", type=whole(1, 65_535), default=PUBLIC_PORT, metavar="N",
        help=f"on which nginx serves devices (default: {PUBLIC_PORT})",
    )  # fmt: skip
    leaf.add_argument(
        "--in-memory", action="store_true",
        help="no database: rounds take a third of the time, and a SuperLink that is started again "
        "knows no runs; `submit` goes on from its checkpoint all the same",
    )  # fmt: skip
    _add_unit(leaf)
    leaf.set_defaults(run=deploying.superlink)


def _add_node(groups: Any, exits: str) -> None:
    leaf = groups.add_parser(
        "node", help="on a device: take part until stopped",
        description="Run Flower's device side, with the device's keys, journal and demands: one "
        "process for the network, and one for apps that is there while messages come.",
        epilog="Exit status: 0 after SIGINT or SIGTERM, 1 if the coordinator refuses this device, "
        f"2 if an argument or a file is wrong. {exits}",
    )  # fmt: skip
    leaf.add_argument(
        "--keys", type=Path, required=True, metavar="DIR", help="the device's folder, of certs"
    )
    _add_state(leaf)
    leaf.add_argument(
        "--superlink", type=deploying.address, required=True, metavar="HOST:PORT",
        help="where the coordinator is reached",
    )  # fmt: skip
    leaf.add_argument(
        "--partition", type=whole(0, MOST_DEVICES - 1), required=True, metavar="N",
        help="the device's number, from 0; without --data also its share of the job's data set",
    )  # fmt: skip
    leaf.add_argument("--data", type=Path, metavar="FILE", help="its own examples, an .npz file")
    leaf.add_argument(
        "--state-key", type=Path, metavar="FILE",
        help="the key that seals what is in --state, made if missing (default: STATE/state.key)",
    )  # fmt: skip
    add_node_options(leaf)
    _add_unit(leaf)
    leaf.set_defaults(run=deploying.node)


def _add_submit(groups: Any, exits: str) -> None:
    leaf = groups.add_parser(
        "submit", help="at the coordinator: run a job to its end",
        description="Send a job to the SuperLink and follow it. The job is what experiments.train "
        "would run with the same overrides, or a file of an earlier run; its root of identities "
        "is that of the keys' folder.",
        epilog="Example: submit --keys pki/coordinator --state coordinator --out outputs/first "
        "rounds=10 clients=5 clients_per_round=5. A SuperLink that is away is waited for, and a "
        "run whose SuperLink or ServerApp was killed goes on from its checkpoint; if this command "
        "was killed: submit --keys ... --state ... --resume outputs/first. Exit status: 0 only if "
        f"all rounds were held, 1 if the run ended early. {exits}",
    )  # fmt: skip
    _add_coordinator(leaf)
    _add_output(leaf, required=False)
    leaf.add_argument(
        "--resume", type=Path, metavar="DIR",
        help="take up the run of this folder: follow it, or go on from its checkpoint",
    )  # fmt: skip
    leaf.add_argument(
        "--patience", type=number(0.0, open_below=True), default=30.0, metavar="MINUTES",
        help="how long a SuperLink may be away (default: 30)",
    )  # fmt: skip
    leaf.add_argument(
        "--restarts", type=whole(0, 1000), default=5, metavar="N",
        help="how often a run that was killed is started without a round in between (default: 5)",
    )  # fmt: skip
    leaf.add_argument("--job", type=Path, metavar="FILE", help="job.json of an earlier run")
    leaf.add_argument(
        "--rehearse", action="store_true",
        help="draw cohorts and the coordinator's noise from the job's seed: a trial",
    )  # fmt: skip
    leaf.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of experiments.train")
    leaf.set_defaults(run=deploying.submit)


def _add_rehearse(groups: Any, exits: str) -> None:
    leaf = groups.add_parser(
        "rehearse", help="the same job in one process: the same model, bit for bit",
        description="Run a job with the same apps and identities, but without a network. Nodes "
        "started with --rehearse SEED, the job's, and submit --rehearse give the same model.npz.",
        epilog=exits,
    )  # fmt: skip
    leaf.add_argument(
        "--parties", type=Path, required=True, metavar="DIR", help="all devices' folders, of certs"
    )
    leaf.add_argument("--job", type=Path, required=True, metavar="FILE", help="a run's job.json")
    _add_output(leaf)
    leaf.set_defaults(run=deploying.rehearse)


def _add_status(groups: Any, exits: str) -> None:
    leaf = groups.add_parser(
        "status", help="at the coordinator: which devices are online, how runs ended",
        description="Ask the SuperLink.", epilog=exits,
    )  # fmt: skip
    _add_coordinator(leaf)
    leaf.set_defaults(run=deploying.status)


def _add_coordinator(leaf: Parser) -> None:
    leaf.add_argument(
        "--keys", type=Path, required=True, metavar="DIR", help="the coordinator's folder, of certs"
    )
    _add_state(leaf)
    leaf.add_argument(
        "--port", type=whole(1, 65_535), default=PORT, metavar="N",
        help=f"of the SuperLink, on loopback (default: {PORT})",
    )  # fmt: skip


def _add_state(leaf: Parser) -> None:
    leaf.add_argument(
        "--state", type=Path, required=True, metavar="DIR",
        help="what must survive restarts, and logs; made if missing",
    )  # fmt: skip


def _add_unit(leaf: Parser) -> None:
    leaf.add_argument(
        "--unit", action="store_true", help="print a systemd unit for this command, start nothing"
    )


def _add_output(leaf: Parser, *, required: bool = True) -> None:
    leaf.add_argument(
        "--out", type=Path, required=required, metavar="DIR", help="a new folder for the results"
    )


def _name(text: str) -> str:
    """Take what may be a device's name, and so part of a path."""
    if not enrollment.is_name(text):
        msg = f"must be 1 to 64 letters, digits, dots, dashes or underscores, got {text!r:.80}"
        raise argparse.ArgumentTypeError(msg)
    return text
