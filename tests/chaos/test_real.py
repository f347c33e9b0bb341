"""The short version of `make chaos`: one real federation behind nginx, hurt at every stage."""

import http.client
import json
import shutil
import signal
import ssl
import subprocess
import time
from random import Random

import pytest

from tests.chaos.campaign import Campaign, overrides
from tests.chaos.faults import Fault
from tests.chaos.federation import INSTALL_NGINX, ROOT, Federation, Run, deploy_command
from tests.chaos.invariants import TRACE, evidence_in, lines_of, violations

pytestmark = pytest.mark.slow

DEVICES = 5
SEED = 11
SCRIPT = {
    1: [("unknown node", 0, "advertise"), ("kill SuperNode", 4, "share")],
    2: [("garble-reply", 1, "upload"), ("kill ServerApp", 0, "endorse")],
    3: [("replay", 2, "endorse"), ("kill submit", 0, "advertise"), ("kill nginx", 0, "reveal")],
    4: [("kill SuperLink", 0, "reveal")],
}
"""By round: what is done, to which device, in which stage."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    if shutil.which("nginx") is None:
        pytest.fail(INSTALL_NGINX)
    found = Federation(tmp_path_factory.mktemp("chaos"), DEVICES, SEED)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def ask(federation, port, path):
    """The status with which a port of the coordinator answers, over TLS."""
    context = ssl.create_default_context(cafile=federation.pki / "coordinator" / "ca.crt")
    connection = http.client.HTTPSConnection("localhost", port, timeout=60, context=context)
    try:
        connection.request("POST", path, b"", {"Content-Type": "application/protobuf"})
        return connection.getresponse().status
    finally:
        connection.close()


def test_devices_join_through_nginx_and_nobody_reaches_more_than_they(federation):
    assert federation.online() == DEVICES  # their wires end at nginx
    for path in (
        *("/v1/control/list-runs", "/v1/control/start-run", "/v1/control/register-node"),
        *("/v1/runtime/acquire-task", "/v1/fleet/../control/list-runs", "/", "/docs"),
        *("/v1/fleet/%2e%2e/control/list-runs", "/v1/fleet//../control/list-runs", "/v1/fleet"),
    ):
        assert ask(federation, federation.public, path) in {404, 400, 301}, path
    assert ask(federation, federation.public, "/v1/fleet/pull-messages") == 401
    # On loopback the same question is answered: the door keeps it out, not its form.
    assert ask(federation, federation.port, "/v1/control/list-runs") not in {404, 301}


def test_a_device_whose_owner_demands_more_refuses_and_the_coordinator_hears_why(federation):
    party, output = federation.parties["node-3"], federation.folder / "refused"
    before = party.command
    party.command = [*before, "--minimum-cohort", "50"]
    try:
        restarted(federation, party)
        run = Run(federation, output, overrides(DEVICES, 1, SEED))
        until_over(federation, run)
        (line,) = lines_of(output / "metrics.jsonl")
        summary = json.loads((output / "summary.json").read_text())
    finally:
        party.command = before
        restarted(federation, party)
    assert line["survivors"] == DEVICES - 1
    said = (
        "PeerProtocolError: this device's policy demands at least 50 invited clients, found 5; "
        "it does not take part"
    )
    assert line["refusals"][said] == line["attempts"]
    assert said in summary["refusals"]
    assert said in run.party.log.read_text()


def test_a_node_that_the_root_did_not_enroll_is_never_invited(federation):
    """The coordinator admitted it, and perhaps invented it; its identity is another root's."""
    other = federation.folder / "other"
    subprocess.run(
        deploy_command("certs", "--out", other, "--count", 1),
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    party, keys = federation.parties["node-2"], other / "device-1"
    for name in ("ca.crt", "node.auth"):
        shutil.copyfile(federation.pki / "device-3" / name, keys / name)
    before = party.command
    party.command = [
        str(keys) if part == str(federation.pki / "device-3") else part for part in before
    ]
    try:
        restarted(federation, party)
        run = Run(federation, federation.folder / "stranger", overrides(DEVICES, 1, SEED))
        until_over(federation, run)
    finally:
        party.command = before
        restarted(federation, party)
    (line,) = lines_of(run.output / "metrics.jsonl")
    assert (line["survivors"], line["lost"]) == (DEVICES - 1, {"identify": 1})
    number = {v: k for k, v in federation.numbers().items()}[2]
    asked = [line for line in lines_of(run.output / TRACE) if line["event"] == "asked"]
    assert {line["stage"] for line in asked if line["node"] in {"2", number}} == {"identify"}
    assert violations(evidence_in(run.output, federation.numbers())) == []


def test_whoever_is_killed_at_whichever_stage_no_sum_is_wrong_and_no_entry_lost(federation):

    def faults(random, round_number, devices):
        return [
            Fault(kind, node, round_number, stage, delay=0.5, seconds=8.0)
            for kind, node, stage in SCRIPT.get(round_number, [])
        ]

    log = federation.folder / "chaos.jsonl"
    campaign = Campaign(federation, Random(SEED), print, log, faults)
    campaign.hold(0, len(SCRIPT) + 1, time.monotonic() + 1500)
    assert campaign.broken == []
    assert campaign.rounds == len(SCRIPT) + 1
    assert campaign.completed >= 1  # others are lost with their coordinator
    assert set(campaign.done) == {kind for faults in SCRIPT.values() for kind, _, _ in faults}


def restarted(federation, party):
    """Have a device's command start again, and wait until all devices are online."""
    starts = party.starts
    party.send(signal.SIGTERM, party.tree()[:1])
    deadline = time.monotonic() + 300
    while party.starts == starts or federation.online() < DEVICES:
        federation.settle(1.0)
        assert time.monotonic() < deadline


def until_over(federation, run):
    deadline = time.monotonic() + 600
    while run.ended is None and time.monotonic() < deadline:
        federation.keep_up()
        run.keep_up()
        time.sleep(0.2)
    assert run.ended == 0, run.party.log.read_text()
