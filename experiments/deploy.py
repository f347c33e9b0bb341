"""Prepare and run a deployment: `python -m experiments.deploy certs --out pki --count 5`.

    certs             the files of all parties, a folder for each
    superlink         at the coordinator: serve devices
    node              on a device: take part
    submit            at the coordinator: run a job to its end
    rehearse          the same job in one process
    status            at the coordinator: who is online, how runs ended
    enroll root       whoever decides who takes part, once
    enroll key        on a device: its key pair, which never leaves it
    enroll device     at the root: a certificate for that key, or key and certificate
    enroll devices    at the root: many keys and certificates, for a fleet that is imaged
    enroll roster     everybody who is enrolled, checked, in one file
    enroll show       what a file is
    helper key        at the second party: the key that devices pin
    helper serve      at the second party: the service that adds up masks

Every leaf of the parser names the function that runs it; that function returns the
lines to print.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from experiments import enrollment
from experiments.deploy_parser import add_commands
from experiments.deploying import StoppedError
from experiments.following import RunFailedError
from experiments.processes import EndedError
from fedcore import keyfiles
from fedcore.crypto import SystemEntropy
from fedcore.errors import FedcoreError

FAILED: Final = 1
WRONG: Final = 2
INTERRUPTED: Final = 130
_MOST_DEVICES: Final = 65_520
_EXITS: Final = "Exit status: 0, or 2 with one line on stderr when an argument or a file is wrong."


class Parser(argparse.ArgumentParser):
    """A parser whose complaints fit on one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is, and exit."""
        self.exit(WRONG, f"error: {message} (try {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None, *, now: int | None = None) -> int:
    """Run the command; return its exit status.

    That is 0, 1 if what was started ended too early, 2 if an argument or a file is wrong, or
    130 after an interruption.

    Args:
        arguments: Of the command line; the process's own if None.
        now: Unix time in seconds; the system's if None.
    """
    options = _parser().parse_args(arguments)
    try:
        lines = options.run(options, int(time.time()) if now is None else now)
    except FedcoreError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        failed = isinstance(error, (EndedError, RunFailedError, StoppedError))
        return FAILED if failed else WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    print("\n".join(map(str, lines)))
    return 0


def _root(options: argparse.Namespace, now: int) -> list[Any]:
    files = enrollment.create_root(options.out, days=options.days, now=now, entropy=SystemEntropy())
    return [*files, f"pin {files[1].name} on every device; keep {files[0].name} offline"]


def _key(options: argparse.Namespace, now: int) -> list[Any]:
    del now
    files = enrollment.create_key(options.out, options.name, entropy=SystemEntropy())
    return [*files, f"have {files[1].name} certified: enroll device {options.name} --key"]


def _device(options: argparse.Namespace, now: int) -> list[Any]:
    root = enrollment.load_root(options.root, now)
    if options.key is None:
        return _enroll(root, [options.name], options, now)
    key = keyfiles.load_authority(options.key)
    certificate = root.enroll(options.name, key, days=options.days, now=now)
    path = options.out / f"{options.name}.crt"
    return [*keyfiles.create({path: (certificate.to_bytes(), keyfiles.PUBLIC_MODE)})]


def _devices(options: argparse.Namespace, now: int) -> list[Any]:
    root = enrollment.load_root(options.root, now)
    digits = len(str(options.count))
    names = [f"{options.prefix}{number:0{digits}}" for number in range(1, options.count + 1)]
    _enroll(root, names, options, now)
    return [f"{options.out}: {names[0]} to {names[-1]}, a .key and a .crt each"]


def _enroll(
    root: enrollment.Root, names: Sequence[str], options: argparse.Namespace, now: int
) -> list[Any]:
    return [
        *enrollment.enroll_devices(
            root, names, options.out, days=options.days, now=now, entropy=SystemEntropy()
        )
    ]


def _roster(options: argparse.Namespace, now: int) -> list[Any]:
    authority = keyfiles.load_authority(options.authority or options.folder / "root.pub")
    certificates = enrollment.collect(options.folder, authority, now)
    data = enrollment.roster_json(authority, certificates)
    keyfiles.create({options.out: (data, keyfiles.PUBLIC_MODE)})
    return [f"{options.out}: {len(certificates)} devices"]


def _show(options: argparse.Namespace, now: int) -> list[Any]:
    return [enrollment.describe(options.file, now)]


def _helper_key(options: argparse.Namespace, now: int) -> list[Any]:
    from strategies.helper_service import create_helper_key  # noqa: PLC0415 - imports Flower

    del now
    public = create_helper_key(options.out, SystemEntropy())
    return [options.out, f"public key, for devices to pin: {public.hex()}"]


def _helper_serve(options: argparse.Namespace, now: int) -> list[Any]:
    from strategies.helper_service import HelperSettings, serve  # noqa: PLC0415 - imports Flower

    del now
    settings = HelperSettings(
        folder=str(options.folder),
        secret_key=str(options.key),
        certificate=str(options.certificate),
        private_key=str(options.private_key),
        client_authority=str(options.client_authority),
        device_authority=None if options.authority is None else str(options.authority),
        address=options.address,
    )
    with serve(settings) as server:
        print(f"listening on port {server.port}", flush=True)
        print(f"public key, for devices to pin: {server.rounds.public_key.hex()}", flush=True)
        try:
            server.wait()
        except KeyboardInterrupt:
            return ["stopped"]
    return ["ended"]


def _parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.deploy",
        description="Prepare and run a deployment with real devices: who may take part, the files "
        "that each party needs, and the processes of each machine.",
        epilog=_EXITS,
    )
    groups = parser.add_subparsers(title="what to prepare", metavar="GROUP", required=True)
    add_commands(groups, _EXITS)
    _add_enroll(groups)
    _add_helper(groups)
    return parser


def _add_enroll(groups: argparse._SubParsersAction[Parser]) -> None:
    group = groups.add_parser(
        "enroll", help="who may take part: identities of devices, signed by a root",
        description="Create a root and enroll devices. Devices pin the root's public key "
        "(root.pub) and take part only with others that it certified, so whoever runs the "
        "coordinator must not hold root.key. No file is ever overwritten.",
        epilog=f"Example: enroll root --out pki; enroll devices --count 100 --root pki/root.key "
        f"--out pki; enroll roster pki --out roster.json. {_EXITS}",
    )  # fmt: skip
    leaves = group.add_subparsers(title="steps", metavar="STEP", required=True)

    leaf = leaves.add_parser(
        "root", help="create the root: root.key (0600), root.pub, root.crt",
        description="Create the key pair that certifies devices. It ends after --days: no "
        "certificate outlives it.",
    )  # fmt: skip
    _add_out(leaf)
    _add_days(leaf)
    leaf.set_defaults(run=_root)

    leaf = leaves.add_parser(
        "key", help="on a device: create its key pair, NAME.key (0600) and NAME.pub",
        description="Create a device's key pair where it will be used. Only NAME.pub goes to the "
        "root, which answers with a certificate: enroll device NAME --key NAME.pub.",
    )  # fmt: skip
    leaf.add_argument("name", metavar="NAME", type=_name, help="of the device")
    _add_out(leaf)
    leaf.set_defaults(run=_key)

    leaf = leaves.add_parser(
        "device", help="certify a device: NAME.crt, and NAME.key (0600) unless it has one",
        description="Certify the key that a device made (--key NAME.pub), or create both here.",
    )  # fmt: skip
    leaf.add_argument("name", metavar="NAME", type=_name, help="of the device")
    leaf.add_argument(
        "--key", type=Path, metavar="FILE", help="the device's public key; a new pair if absent"
    )
    _add_issuer(leaf)
    leaf.set_defaults(run=_device)

    leaf = leaves.add_parser(
        "devices", help="create keys and certificates of many devices",
        description="Create a key (0600) and a certificate for each of --count devices, named "
        "PREFIX1, PREFIX2, ... with leading zeros.",
    )  # fmt: skip
    leaf.add_argument(
        "--count", type=_count, required=True, metavar="N", help=f"1 to {_MOST_DEVICES}"
    )
    leaf.add_argument(
        "--prefix", type=_name, default="device-", help="of their names (default: device-)"
    )
    _add_issuer(leaf)
    leaf.set_defaults(run=_devices)

    leaf = leaves.add_parser(
        "roster", help="check all certificates of a folder and list them in one file",
        description="Collect NAME.crt files. Expired certificates, those of another root, and "
        "names or keys that occur twice are refused.",
    )  # fmt: skip
    leaf.add_argument("folder", type=Path, metavar="DIR", help="holds the certificates")
    leaf.add_argument(
        "--authority",
        type=Path,
        metavar="FILE",
        help="the root's public key (default: DIR/root.pub)",
    )
    leaf.add_argument("--out", type=Path, required=True, metavar="FILE", help="of the roster")
    leaf.set_defaults(run=_roster)

    leaf = leaves.add_parser(
        "show", help="say what a key, certificate or roster is; never anything secret",
        description="Say what a file of this command is, and until when it is valid.",
    )  # fmt: skip
    leaf.add_argument("file", type=Path, metavar="FILE", help="any file of this command")
    leaf.set_defaults(run=_show)


def _add_helper(groups: argparse._SubParsersAction[Parser]) -> None:
    group = groups.add_parser(
        "helper", help="the second party of secagg=seed_helper",
        description="Run the service that knows the seeds of the masks and nothing else. Its "
        "operator must not collude with the coordinator's: together they see every update.",
        epilog=_EXITS,
    )  # fmt: skip
    leaves = group.add_subparsers(title="steps", metavar="STEP", required=True)

    leaf = leaves.add_parser(
        "key", help="create the helper's key (0600) and print the public one",
        description="Create the X25519 key to which devices seal their seeds.",
    )  # fmt: skip
    leaf.add_argument("--out", type=Path, required=True, metavar="FILE", help="of the secret key")
    leaf.set_defaults(run=_helper_key)

    leaf = leaves.add_parser(
        "serve", help="serve coordinators over gRPC with mutual TLS, until interrupted",
        description="Serve coordinators whose TLS certificate --client-authority signed. With "
        "--authority only enrolled devices are counted: without it, the coordinator is trusted "
        "not to invent devices. Answered rounds are noted in --folder and never answered again.",
    )  # fmt: skip
    for name, what in (
        ("--folder", "holds the notes of answered rounds"),
        ("--key", "the helper's secret key, of helper key"),
        ("--certificate", "PEM file with the server's TLS certificate"),
        ("--private-key", "PEM file with its key, mode 0600"),
        ("--client-authority", "PEM file with the authority of the coordinators' certificates"),
    ):
        leaf.add_argument(name, type=Path, required=True, metavar="PATH", help=what)
    leaf.add_argument("--authority", type=Path, metavar="FILE", help="root.pub of the devices")
    leaf.add_argument("--address", default="0.0.0.0:9443", help="host:port (%(default)s)")
    leaf.set_defaults(run=_helper_serve)


def _add_issuer(leaf: Parser) -> None:
    leaf.add_argument(
        "--root", type=Path, required=True, metavar="FILE", help="root.key, with root.crt beside it"
    )
    _add_out(leaf)
    _add_days(leaf)


def _add_out(leaf: Parser) -> None:
    leaf.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the files go; made if missing"
    )


def _add_days(leaf: Parser) -> None:
    leaf.add_argument(
        "--days", type=int, default=365, metavar="N",
        help=f"how long it is valid, 1 to {enrollment.MOST_DAYS} (default: 365)",
    )  # fmt: skip


def _name(text: str) -> str:
    """Take what may be a device's name, and so part of a path."""
    if not enrollment.is_name(text):
        msg = f"must be 1 to 64 letters, digits, dots, dashes or underscores, got {text!r:.80}"
        raise argparse.ArgumentTypeError(msg)
    return text


def _count(text: str) -> int:
    """Take a number of devices."""
    if not text.isdecimal() or not 1 <= int(text[:9]) <= _MOST_DEVICES:
        msg = f"must be in 1..{_MOST_DEVICES}, got {text:.20}"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
