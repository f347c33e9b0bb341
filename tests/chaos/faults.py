"""What is done to a real deployment, and how it is undone; drawn from a seed.

    device         killed whole or in part, frozen, full disk, damaged journal, wrong clock
    its wire       cut, stalled, late, narrow, damaged
    coordinator    SuperLink, SuperExec, ServerApp, nginx, the submitting command: killed or
                   frozen; full disk; damaged checkpoint
    outsiders      a node that nobody admitted, one with certificates of somebody else
    messages       garbled, cut, empty, oversize, stale and repeated, to and from a device

A fault names a round and a stage, and happens when the trace says that this stage began.
"""

import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fedcore.pipeline.envelope import IDENTIFY, STAGES
from tests.chaos import proc
from tests.chaos.federation import ROOT, Federation, Party, Run, deploy_command
from tests.chaos.traced import ON_REPLIES, ON_REQUESTS, REPLAY

SKEWED = Path(__file__).parent / "skewed"
SKEW = "CHAOS_SKEW_SECONDS"
SHORT, LONG = (2.0, 8.0), (40.0, 50.0)
"""Seconds of an outage: most end within a stage, one of ten is longer than any stage waits."""
Undo = Callable[[], str]
"""Ends a fault; returns what was wrong about how it was met, or nothing."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: Its name in `KINDS`, or an order to the traced ServerApp.
        node: Whom it hits, if it is about a device.
        round_number: When.
        stage: In which stage of that round.
        delay: Seconds after that stage's first message.
        seconds: How long it lasts, where it lasts.
    """

    kind: str
    node: int
    round_number: int
    stage: str
    delay: float
    seconds: float


DAMAGED_CHECKPOINT = "damaged checkpoint"


def nothing() -> str:
    return ""


def _node(federation: Federation, fault: Fault) -> Party:
    return federation.parties[f"node-{fault.node}"]


def kill_node(federation: Federation, run: Run, fault: Fault) -> Undo:
    party = _node(federation, fault)
    party.send(signal.SIGKILL)
    return nothing


def kill_supernode(federation: Federation, run: Run, fault: Fault) -> Undo:
    party = _node(federation, fault)
    party.send(signal.SIGKILL, party.part("flower-supernode") or party.tree()[1:2])
    return nothing


def kill_executor(federation: Federation, run: Run, fault: Fault) -> Undo:
    party = _node(federation, fault)
    party.send(signal.SIGKILL, party.part("superexec", "forkserver") or party.tree()[2:])
    return nothing


def kill_node_command(federation: Federation, run: Run, fault: Fault) -> Undo:
    """Only the command, not what it started: that has to end with it."""
    party = _node(federation, fault)
    party.send(signal.SIGKILL, party.tree()[:1])
    return nothing


def terminate_node(federation: Federation, run: Run, fault: Fault) -> Undo:
    party = _node(federation, fault)
    party.send(signal.SIGTERM, party.tree()[:1])
    return nothing


def freeze_node(federation: Federation, run: Run, fault: Fault) -> Undo:
    return _frozen(_node(federation, fault).tree())


def _frozen(pids: list[int]) -> Undo:
    proc.send(pids, signal.SIGSTOP)

    def thaw() -> str:
        proc.send(pids, signal.SIGCONT)
        return ""

    return thaw


def _on_the_wire(**condition: object) -> Callable[[Federation, Run, Fault], Undo]:
    def hurt(federation: Federation, run: Run, fault: Fault) -> Undo:
        wire = federation.wires[fault.node]
        wire.set(**condition)

        def heal() -> str:
            wire.set()
            return ""

        return heal

    return hurt


def fill_node_disk(federation: Federation, run: Run, fault: Fault) -> Undo:
    return _full(_node(federation, fault))


def fill_coordinator_disk(federation: Federation, run: Run, fault: Fault) -> Undo:
    return _full(federation.parties["superlink"])


def _full(party: Party) -> Undo:
    party.limit_files(0)

    def free() -> str:
        party.limit_files(-1)
        return ""

    return free


def damage_journal(federation: Federation, run: Run, fault: Fault) -> Undo:
    """Flip a bit of what the device answered; its owner restores the disk later."""
    journal = federation.node_state(fault.node) / "answered"
    if not journal.exists():
        return nothing
    data = journal.read_bytes()
    damaged = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    journal.write_bytes(damaged)

    def restore() -> str:
        if journal.read_bytes() != damaged:
            return "a damaged journal was written over"
        journal.write_bytes(data)
        return ""

    return restore


def damage_checkpoint(federation: Federation, run: Run, fault: Fault) -> Undo:
    kill_server_app(federation, run, fault)
    cut_newest_checkpoint(run.output / "checkpoint")
    return nothing


def cut_newest_checkpoint(folder: Path) -> bool:
    """Damage the newer one of two checkpoints; tell whether there were two."""
    kept = sorted(folder.glob("*.checkpoint"))
    if len(kept) > 1:
        kept[-1].write_bytes(kept[-1].read_bytes()[:-7])
    return len(kept) > 1


def set_clock(seconds: float) -> Callable[[Federation, Run, Fault], Undo]:
    def hurt(federation: Federation, run: Run, fault: Fault) -> Undo:
        party = _node(federation, fault)
        # Not this repository: an app has to come from the bundle that was sent.
        party.surroundings = {"PYTHONPATH": str(SKEWED), SKEW: str(seconds)}
        party.send(signal.SIGTERM, party.tree()[:1])

        def heal() -> str:
            party.surroundings = {}
            party.send(signal.SIGTERM, party.tree()[:1])
            return ""

        return heal

    return hurt


def kill_server_app(federation: Federation, run: Run, fault: Fault) -> Undo:
    party = federation.parties["superlink"]
    party.send(signal.SIGKILL, party.part("flwr-serverapp"))
    return nothing


def freeze_server_app(federation: Federation, run: Run, fault: Fault) -> Undo:
    return _frozen(federation.parties["superlink"].part("flwr-serverapp"))


def kill_superlink(federation: Federation, run: Run, fault: Fault) -> Undo:
    party = federation.parties["superlink"]
    party.send(signal.SIGKILL, party.part("flower-superlink"))
    return nothing


def kill_superexec(federation: Federation, run: Run, fault: Fault) -> Undo:
    party = federation.parties["superlink"]
    party.send(signal.SIGKILL, party.part("flower-superexec"))
    return nothing


def kill_coordinator(federation: Federation, run: Run, fault: Fault) -> Undo:
    federation.parties["superlink"].send(signal.SIGKILL)
    return nothing


def kill_superlink_command(federation: Federation, run: Run, fault: Fault) -> Undo:
    party = federation.parties["superlink"]
    party.send(signal.SIGKILL, party.tree()[:1])
    return nothing


def freeze_superlink(federation: Federation, run: Run, fault: Fault) -> Undo:
    return _frozen(federation.parties["superlink"].part("flower-superlink"))


def kill_submit(federation: Federation, run: Run, fault: Fault) -> Undo:
    if run.party is not None:
        run.party.send(signal.SIGKILL)
    return nothing


def kill_nginx(federation: Federation, run: Run, fault: Fault) -> Undo:
    federation.parties["nginx"].send(signal.SIGKILL)
    return nothing


def _intruding(*, admitted_elsewhere: bool) -> Callable[[Federation, Run, Fault], Undo]:
    """A node with keys of its own, which trusts our server's authority or another one."""

    def hurt(federation: Federation, run: Run, fault: Fault) -> Undo:
        folder = federation.folder / f"outsider-{admitted_elsewhere}"
        keys = folder / "device-1"
        if not keys.exists():
            subprocess.run(
                deploy_command("certs", "--out", folder, "--count", 1),
                cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            if not admitted_elsewhere:
                shutil.copyfile(federation.pki / "device-1" / "ca.crt", keys / "ca.crt")
        door = federation.parties["nginx"] if federation.nginx else None
        port = federation.public if door else federation.port
        log = folder / f"{fault.round_number}-{fault.stage}.log"
        arguments = federation.node(fault.node, port, keys)
        stranger = Party("stranger", deploy_command(*arguments), log)
        stranger.keep_up()

        def leave() -> str:
            stranger.stop()
            said = log.read_text(encoding="utf-8", errors="replace")
            return "an outsider was let in" if "connected to" in said else ""

        return leave

    return hurt


KINDS: dict[str, tuple[int, Callable[[Federation, Run, Fault], Undo]]] = {
    "kill node": (3, kill_node),
    "kill SuperNode": (2, kill_supernode),
    "kill node's executor": (2, kill_executor),
    "kill node's command": (1, kill_node_command),
    "stop node": (1, terminate_node),
    "freeze node": (3, freeze_node),
    "cut wire": (3, _on_the_wire(cut=True)),
    "stall wire": (2, _on_the_wire(stalled=True)),
    "late wire": (2, _on_the_wire(delay=0.7)),
    "narrow wire": (2, _on_the_wire(bandwidth=30_000.0)),
    "damaged wire": (2, _on_the_wire(damaged=0.3)),
    "full disk of node": (2, fill_node_disk),
    "damaged journal": (2, damage_journal),
    "clock an hour ahead": (1, set_clock(3600.0)),
    "clock a minute behind": (1, set_clock(-60.0)),
    "kill ServerApp": (2, kill_server_app),
    "freeze ServerApp": (1, freeze_server_app),
    "kill SuperLink": (2, kill_superlink),
    "kill coordinator's SuperExec": (1, kill_superexec),
    "kill coordinator": (1, kill_coordinator),
    "kill superlink command": (1, kill_superlink_command),
    "freeze SuperLink": (1, freeze_superlink),
    "kill submit": (1, kill_submit),
    "kill nginx": (2, kill_nginx),
    "full disk of coordinator": (1, fill_coordinator_disk),
    DAMAGED_CHECKPOINT: (1, damage_checkpoint),
    "unknown node": (1, _intruding(admitted_elsewhere=False)),
    "foreign certificate": (1, _intruding(admitted_elsewhere=True)),
}
ORDERS = (*ON_REPLIES, *ON_REQUESTS, REPLAY)
"""Each with weight 1."""


def draw(random: Random, round_number: int, devices: int) -> list[Fault]:
    """Return the faults of a round: none in one of five, up to three."""
    kinds = [kind for kind, (weight, _) in KINDS.items() for _ in range(weight)]
    found = []
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        kind = random.choice([*kinds, *ORDERS, *ORDERS])
        stage = random.choice(STAGES if round_number > 1 else (IDENTIFY, *STAGES))
        found.append(
            Fault(
                kind,
                random.randrange(devices),
                round_number,
                stage,
                random.uniform(0.0, 4.0),
                random.uniform(*(LONG if random.random() < 0.1 else SHORT)),
            )
        )
    return found


def begin(federation: Federation, run: Run, fault: Fault) -> Undo:
    """Let a fault happen; return how it ends."""
    if fault.kind in KINDS:
        return KINDS[fault.kind][1](federation, run, fault)
    run.order(fault.round_number, fault.stage, fault.node, fault.kind)
    return nothing
