"""What a deployment is made of: the files of its parties, command lines, and error lines."""

import itertools
import json
import re
import socket
import ssl
import stat
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.app import Context, RecordDict

from clients.deployed import entropy_of, policy_of
from experiments import deploy, submission
from experiments.deployed import DeployedRecorder, write_model
from experiments.edge.settings import Settings
from experiments.following import RunFailedError, describe_round, judge
from experiments.parties import CoordinatorKeys, DeviceKeys
from experiments.processes import (
    Board,
    Coordinator,
    EndedError,
    check_alive,
    prepare_board,
    proxy_configuration,
)
from experiments.processes import toml as as_toml
from experiments.submission import write_bundle
from fedcore.crypto import ReplayedEntropy, SystemEntropy
from fedcore.errors import ConfigurationError
from fedcore.job import Job
from fedcore.keyfiles import load_authority, load_identity
from fedcore.privacy import PrivacyLedger
from strategies.progress import Resumed

ROOT = Path(deploy.__file__).parents[1]
NOW = 1_800_000_000
SECRETS = {"root.key", "ca.key", "server.key", "node.auth", "device.key"}


def run(*arguments, now=NOW):
    return deploy.main([str(argument) for argument in arguments], now=now)


def line_of(capsys, *arguments, status=2, now=NOW):
    """The one line with which a command ends."""
    capsys.readouterr()
    try:
        found = run(*arguments, now=now)
    except SystemExit as error:
        found = error.code
    out, line = capsys.readouterr()
    assert (found, out) == (status, "")
    assert re.fullmatch(r"error: .*\n", line)
    return line


@pytest.fixture
def pki(tmp_path):
    """All parties of a deployment with two devices."""
    assert run("certs", "--out", tmp_path / "pki", "--host", "fl.example.org", "--count", 2) == 0
    return tmp_path / "pki"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_party_gets_a_folder_and_only_its_own_secrets(pki):
    secrets = {
        str(path.relative_to(pki))
        for path in pki.rglob("*")
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) == 0o600
    }
    assert secrets == {
        *("offline/root.key", "offline/ca.key", "coordinator/server.key"),
        *("device-1/node.auth", "device-1/device.key", "device-2/node.auth", "device-2/device.key"),
    }
    assert {path.name for path in pki.rglob("*") if path.name in SECRETS} == SECRETS
    assert all(path.stat().st_mode & 0o077 == 0o055 & path.stat().st_mode for path in pki.iterdir())


def test_the_servers_certificate_is_the_authoritys_and_names_its_hosts(pki):
    server = x509.load_pem_x509_certificate((pki / "coordinator" / "server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((pki / "device-1" / "ca.crt").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "coordinator" / "server.crt", pki / "coordinator" / "server.key")


def test_a_device_has_an_identity_of_the_root_and_a_key_that_the_coordinator_admits(pki):
    device = pki / "device-2"
    identity = load_identity(device / "device.crt", device / "device.key")
    identity.certificate.check(load_authority(device / "root.pub"), NOW)
    secret = load_ssh_private_key((device / "node.auth").read_bytes(), None)
    assert isinstance(secret, ec.EllipticCurvePrivateKey)
    assert secret.curve.name == "secp384r1"
    admitted = CoordinatorKeys(pki / "coordinator").admitted
    assert list(admitted) == ["device-1", "device-2"]
    assert load_ssh_public_key(admitted["device-2"].read_bytes()) == secret.public_key()


def test_a_second_call_makes_what_is_missing_and_changes_nothing(pki):
    before = contents(pki)
    assert run("certs", "--out", pki, "--count", 3) == 0
    after = contents(pki)
    assert {path: after[path] for path in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} == {"device-3", "admitted"}


def test_what_cannot_be_certified_is_refused_in_one_line(tmp_path, capsys):
    out = tmp_path / "pki"
    assert "--host must be a DNS name or an IP address" in line_of(
        capsys, "certs", "--out", out, "--host", "https://x", "--count", 1
    )
    assert "must be in 1..65520, got 0" in line_of(capsys, "certs", "--out", out, "--count", 0)
    assert "would outlive" in line_of(
        capsys, "certs", "--out", out, "--count", 1, now=NOW + 86_400
    )  # the root is there since the first call


def test_the_superlink_listens_on_loopback_with_tls_and_asks_for_keys(pki, tmp_path):
    coordinator = Coordinator(CoordinatorKeys(pki / "coordinator"), tmp_path / "state", 9092)
    coordinator.keys.check()
    superlink, superexec = coordinator.commands().values()
    assert (
        options(superlink)
        >= {
            "--host": "127.0.0.1",
            "--port": "9092",
            "--isolation": "process",
            "--database": str(tmp_path / "state" / "state.db"),
            "--superexec-auth-secret-file": str(tmp_path / "state" / "superexec.secret"),
            "--ssl-keyfile": str(pki / "coordinator" / "server.key"),
        }.items()
    )
    assert "--enable-supernode-auth" in superlink
    assert "--insecure" not in superlink + superexec
    assert options(superexec) >= {"--runtime-api-address": "127.0.0.1:9092"}.items()
    in_memory, _ = replace(coordinator, database=False).commands().values()
    assert "--database" not in in_memory
    assert set(superlink) - set(in_memory) == {"--database", str(tmp_path / "state" / "state.db")}


def test_a_superlink_in_memory_is_told_of_all_devices_again(pki, tmp_path, capsys):
    coordinator = Coordinator(CoordinatorKeys(pki / "coordinator"), tmp_path, 9092)
    (tmp_path / "admitted.json").write_text('{"7": "device-1"}')
    submission.forget_admitted(coordinator)
    submission.forget_admitted(coordinator)  # there may be nothing to forget
    assert not (tmp_path / "admitted.json").exists()
    arguments = ("superlink", "--keys", pki / "coordinator", "--state", tmp_path, "--in-memory")
    assert run(*arguments, "--unit") == 0
    assert "--in-memory" in capsys.readouterr().out


def options(command):
    """The pairs of a command line."""
    return dict(itertools.pairwise(command)).items()


def test_a_board_reads_where_it_belongs_from_one_private_file(pki, tmp_path):
    board = Board(
        DeviceKeys(pki / "device-1"), tmp_path / "state", "fl.example.org:8443", tmp_path / "key"
    )
    board.keys.check()
    written = board.settings({"partition-id": 3})
    prepare_board(board, written, ReplayedEntropy(b"test"))
    file = tmp_path / "state" / "board.json"
    read = Settings.from_json(file.read_text())
    assert read == written
    assert read.authority == str(pki / "device-1" / "ca.crt")
    assert read.node_key == str(pki / "device-1" / "node.auth")
    assert board.command[0] == sys.executable
    assert board.command[-1] == str(file)
    for secret in (file, board.state_key):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    key = board.state_key.read_bytes()
    prepare_board(board, written, ReplayedEntropy(b"another"))
    assert board.state_key.read_bytes() == key


def test_a_board_whose_key_others_may_read_does_not_start(pki, tmp_path):
    board = Board(DeviceKeys(pki / "device-1"), tmp_path, "localhost:1", tmp_path / "key")
    board.state_key.write_bytes(bytes(32))
    board.state_key.chmod(0o644)
    with pytest.raises(ConfigurationError, match="can be read or changed by others"):
        prepare_board(board, board.settings({}), ReplayedEntropy(b"test"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pace": {}}'])
def test_what_is_no_file_of_a_board_is_refused(text):
    with pytest.raises(ConfigurationError, match=r"board\.json must be a file of `deploy node`"):
        Settings.from_json(text)


def test_the_proxy_passes_the_fleet_api_on_and_nothing_else(pki, tmp_path):
    coordinator = Coordinator(CoordinatorKeys(pki / "coordinator"), tmp_path, 9092)
    text = re.sub(r"#.*", "", proxy_configuration(coordinator, 8443))
    assert text.count("{") == text.count("}")
    assert all(line.strip()[-1] in "{};" for line in text.splitlines() if line.strip())
    locations = dict(re.findall(r"location (\S+) \{([^}]*)\}", text))
    assert set(locations) == {"/v1/fleet/", "/"}
    assert "proxy_pass https://127.0.0.1:9092/v1/fleet/;" in locations["/v1/fleet/"]
    assert "proxy_ssl_verify on;" in locations["/v1/fleet/"]
    # nginx compares names only; this one is in every server's certificate.
    assert "proxy_ssl_name localhost;" in locations["/v1/fleet/"]
    assert locations["/"].split() == ["return", "404;"]
    assert "listen 8443 ssl;" in text
    assert f"ssl_certificate {pki / 'coordinator' / 'server.crt'};" in text


def test_a_path_that_nginx_would_misread_is_refused(tmp_path):
    coordinator = Coordinator(CoordinatorKeys(tmp_path / "a;b"), tmp_path, 9092)
    with pytest.raises(ConfigurationError, match="plain path for nginx"):
        proxy_configuration(coordinator, 8443)


def test_settings_come_back_from_toml_as_they_were():
    settings = {"path": 'C:\\a "b" c', "number": 3, "rate": 0.25, "on": True, "job": '{"a": "é"}'}
    assert tomllib.loads(as_toml(settings)) == settings
    with pytest.raises(ConfigurationError, match="must be printable"):
        as_toml({"path": "a\nb"})


def test_a_devices_demands_are_in_its_node_configuration(pki):
    settings = DeviceKeys(pki / "device-1").settings()
    policy = policy_of(settings | {"minimum-cohort": 5, "minimum-noise-multiplier": 1})
    assert policy.authority == load_authority(pki / "offline" / "root.pub").hex()
    assert (policy.minimum_cohort, policy.minimum_noise_multiplier) == (5, 1.0)
    assert policy.require_masks
    assert policy.minimum_same_model == 2
    assert policy_of({"minimum-same-model": 4}).minimum_same_model == 4
    with pytest.raises(ConfigurationError, match="largest-clip must be a float"):
        policy_of({"largest-clip": "1"})
    with pytest.raises(ConfigurationError, match="minimum-cohort must be a int"):
        policy_of({"minimum-cohort": True})
    with pytest.raises(ConfigurationError, match="allow-parts must be true or false"):
        policy_of({"allow-parts": "false"})


def test_a_node_takes_its_examples_from_a_file_or_a_folder_that_is_there(pki, tmp_path, capsys):
    node = ("node", "--keys", pki / "device-1", "--state", tmp_path / "s", "--partition", 0)
    node = (*node, "--superlink", "localhost:9092", "--unit", "--data")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples.npz").touch()
    for name in ("examples", "examples.npz"):
        assert run(*node, tmp_path / name) == 0
        assert f"--data {tmp_path / name} " in capsys.readouterr().out
    assert "cannot be read" in line_of(capsys, *node, tmp_path / "nowhere.npz")


def context(**config):
    return Context(1, 2, config, RecordDict(), {"job": "", "rehearsal-seed": 3})


def test_only_the_devices_owner_can_ask_for_a_rehearsal():
    assert isinstance(entropy_of(context()), SystemEntropy)
    rehearsed = entropy_of(context(**{"partition-id": 0, "rehearsal-seed": 3}))
    assert isinstance(rehearsed, ReplayedEntropy)


def test_the_bundle_is_our_code_and_names_both_apps(tmp_path):
    write_bundle(tmp_path / "app")
    suffixes = {path.suffix for path in (tmp_path / "app").rglob("*") if path.is_file()}
    assert suffixes == {".py", ".toml"}
    app = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys; sys.path.insert(0, '.'); from importlib import import_module as load\n"
            "for name in sys.argv[1:]:\n"
            "    module, _, attribute = name.partition(':')\n"
            "    print(load(module).__file__, type(getattr(load(module), attribute)).__name__)",
            *(app["components"]["serverapp"], app["components"]["clientapp"]),
        ],
        cwd=tmp_path / "app", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files, kinds = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert kinds == ("ServerApp", "DeployedApp")
    assert all(Path(file).is_relative_to((tmp_path / "app").resolve()) for file in files)
    assert set(app["config"]) >= {"job", "output", "rehearsal"}


@pytest.mark.parametrize(
    ("status", "summary", "said"),
    [
        ("finished:completed", {"completed_rounds": 1, "rounds": 2}, "after 1 of 2 rounds"),
        ("finished:completed", None, "after 0 of all rounds"),
        ("finished:failed", {"completed_rounds": 2, "rounds": 2}, "finished:failed"),
        (
            "finished:completed",
            {"completed_rounds": 2, "rounds": 2, "stopped": "budget"},
            "budget",
        ),
        ("finished:stopped", {"completed_rounds": 1, "rounds": 2, "stopped": None}, "stopped"),
    ],
)
def test_a_run_is_finished_only_if_both_witnesses_say_so(tmp_path, status, summary, said):
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(RunFailedError, match=said):
        judge(tmp_path, status)


def test_a_run_that_stops_before_its_first_round_says_why(tmp_path):
    recorder = DeployedRecorder(tmp_path)
    recorder.stopped("expected 4 nodes, found 3")
    recorder.close()
    with pytest.raises(RunFailedError, match="after 0 of all rounds: expected 4 nodes, found 3"):
        judge(tmp_path, "finished:failed")


def test_equal_models_are_equal_files(tmp_path):
    arrays = {"w": np.arange(6.0).reshape(2, 3), "b": np.ones(3, np.float32)}
    write_model(tmp_path / "one.npz", arrays)
    write_model(tmp_path / "two.npz", {name: array.copy() for name, array in arrays.items()})
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as found:
        assert {name: found[name].tolist() for name in found} == {
            name: array.tolist() for name, array in arrays.items()
        }


def test_a_run_that_goes_on_has_the_model_that_it_goes_on_from(tmp_path):
    kept = {"w": np.arange(6.0, dtype=np.float32)}
    write_model(tmp_path / "model.npz", {"w": np.ones(6, np.float32)})  # of a round that is lost
    recorder = DeployedRecorder(tmp_path)
    recorder.resumed(Resumed((), kept, None, PrivacyLedger(delta=1e-5), None))
    with np.load(tmp_path / "model.npz") as found:
        np.testing.assert_array_equal(found["w"], kept["w"])


def test_a_finished_run_has_all_rounds(tmp_path):
    summary = {"completed_rounds": 2, "rounds": 2, "stopped": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert judge(tmp_path, "finished:completed") == summary


def test_a_round_is_told_in_one_line():
    line = {
        "round": 3,
        "survivors": 4,
        "invited": 5,
        "accuracy": None,
        "epsilon": "inf",
        "seconds": 7.2,
        "aborted": ["too few"],
    }
    assert describe_round(line) == "round 3: 4 of 5 devices, epsilon inf, 7 s, aborted: too few"


def test_a_process_that_ended_is_named_with_its_last_words(tmp_path):
    (tmp_path / "supernode.log").write_text("one\n\ntwo\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    process.wait()
    with pytest.raises(EndedError, match="supernode ended with status 7: one / two"):
        check_alive({"supernode": process}, tmp_path)


def test_a_key_that_others_may_read_stops_a_node_before_it_starts(pki, tmp_path, capsys):
    (pki / "device-1" / "node.auth").chmod(0o644)
    line = line_of(
        capsys,
        *("node", "--keys", pki / "device-1", "--state", tmp_path / "state"),
        *("--superlink", "localhost:1", "--partition", 0),
    )
    assert "node.auth can be read or changed by others" in line
    assert not (tmp_path / "state").exists()


def test_wrong_arguments_are_one_line(pki, tmp_path, capsys):
    node = ("node", "--keys", pki / "device-1", "--state", tmp_path, "--partition", 0)
    assert "must be host:port" in line_of(capsys, *node, "--superlink", "https://x:1")
    assert "must be a folder of the command certs" in line_of(
        capsys, "superlink", "--keys", tmp_path / "none", "--state", tmp_path
    )
    keys = ("--keys", pki / "coordinator", "--state", tmp_path / "state")
    assert "faults=drop" in line_of(
        capsys, "submit", *keys, "--out", tmp_path / "a", "faults=drop", "rounds=1"
    )
    assert "helper=local" in line_of(
        capsys, "submit", *keys, "--out", tmp_path / "b", "secagg=seed_helper"
    )
    assert "rounds" in line_of(capsys, "submit", *keys, "--out", tmp_path / "c", "rounds=x")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_a_unit_starts_the_same_command(pki, tmp_path, capsys):
    arguments = (
        *("node", "--keys", pki / "device-1", "--state", tmp_path / "state", "--partition", 0),
        *("--superlink", "fl.example.org:8443", "--minimum-cohort", 5),
    )
    capsys.readouterr()
    assert run(*arguments, "--unit") == 0
    text = capsys.readouterr().out
    started = re.search(r"^ExecStart=(\S+) -m experiments.deploy (.*)$", text, re.MULTILINE)
    assert started[1] == sys.executable
    assert f"--keys {pki / 'device-1'} --state {tmp_path / 'state'}" in started[2]
    assert "--superlink fl.example.org:8443 --partition 0" in started[2]
    assert "--minimum-cohort 5" in started[2]
    assert f"WorkingDirectory={ROOT}" in text
    assert not re.search("@[A-Z]+@", text)
    # What is printed is itself an accepted command line.
    assert run(*started[2].split(), "--unit") == 0
    assert capsys.readouterr().out == text


def test_a_rehearsal_needs_all_devices(pki, tmp_path, capsys):
    job = tmp_path / "job.json"
    job.write_text(Job().to_json())
    line = line_of(
        capsys, "rehearse", "--parties", pki, "--job", job, "--out", tmp_path / "results"
    )
    assert "must hold the folders of clients=10 devices, found 2" in line


def test_help_needs_neither_torch_nor_flower():
    for leaf in ("certs", "superlink", "node", "submit", "rehearse", "status"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "experiments.deploy", leaf, "--help"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0
        loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert not {"torch", "flwr", "hydra"} & loaded


def test_the_superlink_that_is_not_there_is_one_line(pki, tmp_path, capsys):
    keys = ("--keys", pki / "coordinator", "--state", tmp_path / "state", "--port", free_port())
    assert "is the SuperLink running" in line_of(capsys, "status", *keys)
    assert (tmp_path / "state" / "flwr" / "config.toml").exists()
    assert submission.CONNECTION in (tmp_path / "state" / "flwr" / "config.toml").read_text()


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
