"""The helper as its operator starts it: a process of its own, and files made by the command."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from clients import DevicePolicy
from experiments import deploy
from fedcore.keyfiles import load_authority, load_identity
from fedcore.pipeline import SeedHelper
from strategies.helper_client import HelperAddress, HelperClient
from tests.strategies.federation import ROOMY, assert_close, client_app, play, weighted_mean
from tests.strategies.test_helper_service import Authority

CLIENTS = 10
SECONDS = 60
"""After which a process that says nothing counts as broken."""


def run(*arguments):
    assert deploy.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory):
    """What the commands make: a root, devices, and the helper's key."""
    folder = tmp_path_factory.mktemp("pki")
    run("enroll", "root", "--out", folder)
    run(
        *("enroll", "devices", "--count", CLIENTS, "--prefix", "device-"),
        *("--root", folder / "root.key", "--out", folder),
    )
    run("helper", "key", "--out", folder / "helper.key")
    return folder


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls"), "ours")


@pytest.fixture
def helper(enrolled, tls, tmp_path):
    """The running process, its address and the public key that it prints."""
    files = tls.issue("helper")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "experiments.deploy", "helper", "serve"),
            *("--folder", tmp_path / "notes", "--key", enrolled / "helper.key"),
            *("--certificate", files["certificate"], "--private-key", files["private_key"]),
            *("--client-authority", tls.path, "--authority", enrolled / "root.pub"),
            *("--address", "127.0.0.1:0"),
        ],
        cwd=Path(deploy.__file__).parents[1],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A job in a shell's background inherits an ignored SIGINT, and so would this one.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - C only
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        port = process.stdout.readline().removeprefix("listening on port ").strip()
        key = process.stdout.readline().rpartition(" ")[2].strip()
        yield process, f"127.0.0.1:{port}", key
    finally:
        process.kill()
        process.wait(SECONDS)
        process.stdout.close()


def identity_from(folder):
    """What the owner of each device put on it."""

    def identity(context):
        name = f"device-{context.node_config['partition-id'] + 1:02}"
        return load_identity(folder / f"{name}.crt", folder / f"{name}.key")

    return identity


def round_with(helper, enrolled, tls, identities=None):
    """A round of enrolled devices; the coordinator's certificate is of `tls`."""
    process, address, key = helper
    authority = load_authority(enrolled / "root.pub").hex()
    app = client_app(
        policy=DevicePolicy(helper_key=key, authority=authority),
        identity=identities or identity_from(enrolled),
    )
    plan = replace(ROOMY, attempts=1, secagg=SeedHelper(key, authority))
    with HelperClient(HelperAddress(address, key, tls.path, **tls.issue("coordinator"))) as remote:
        played = play(app, plan, helper=remote)
    assert process.poll() is None
    return played


def test_a_round_goes_through_a_helper_that_was_started_by_its_command(helper, enrolled, tls):
    played = round_with(helper, enrolled, tls)
    assert_close(played.arrays, weighted_mean(range(CLIENTS)), atol=1e-5)
    assert played.reports[0].lost == {}
    process, _, _ = helper
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 0
    assert process.stdout.read().split() == ["stopped"]


def test_a_device_of_another_root_is_not_counted_by_the_process(helper, enrolled, tls, tmp_path):
    run("enroll", "root", "--out", tmp_path / "other")
    run(
        *("enroll", "devices", "--count", CLIENTS, "--prefix", "device-"),
        *("--root", tmp_path / "other" / "root.key", "--out", tmp_path / "other"),
    )
    ours, theirs = identity_from(enrolled), identity_from(tmp_path / "other")

    def mixed(context):
        return theirs(context) if context.node_config["partition-id"] == 4 else ours(context)

    played = round_with(helper, enrolled, tls, mixed)
    assert_close(played.arrays, weighted_mean(set(range(CLIENTS)) - {4}), atol=1e-5)
    assert played.reports[0].lost == {"upload": 1}


def test_a_coordinator_of_another_authority_is_not_served(helper, enrolled, tls, tmp_path):
    foreign = Authority(tmp_path, "theirs")
    foreign.path = tls.path  # it trusts the helper, which does not trust it
    played = round_with(helper, enrolled, foreign)
    assert played.reports[0].survivors == 0
    assert "the helper at" in played.reports[0].aborted[0]
