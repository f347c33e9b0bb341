"""Enrolling devices: the command, and the files that it makes and refuses."""

import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from clients.identity import identity_of
from experiments import enrollment
from experiments.deploy import main
from fedcore.crypto import SystemEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import ConfigurationError
from fedcore.keyfiles import load_authority, load_certificate, load_identity, load_key
from fedcore.secagg.identity import Certificate

ROOT = Path(enrollment.__file__).parents[1]
NOW = 1_800_000_000
DAY = 86_400
LEAVES = ["root", "key", "device", "devices", "roster", "show"]


def enroll(*arguments, now=NOW):
    return main(["enroll", *map(str, arguments)], now=now)


def refused(capsys, *arguments, now=NOW):
    """The one line with which the command refuses."""
    capsys.readouterr()
    try:
        status = enroll(*arguments, now=now)
    except SystemExit as error:
        status = error.code
    out, line = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert re.fullmatch(r"error: .*\n", line)
    return line


@pytest.fixture
def pki(tmp_path):
    """A root that lasts a year."""
    folder = tmp_path / "pki"
    assert enroll("root", "--out", folder) == 0
    return folder


def issue(pki, name, *more, now=NOW):
    assert enroll("device", name, "--root", pki / "root.key", "--out", pki, *more, now=now) == 0


def test_a_root_is_a_secret_key_a_public_key_and_a_certificate_of_its_own(pki):
    authority = load_authority(pki / "root.pub")
    certificate = load_certificate(pki / "root.crt")
    certificate.check(authority, NOW)
    assert certificate.key == authority == load_key(pki / "root.key").public.raw
    assert certificate.expires_at == NOW + 365 * DAY


def test_an_enrolled_device_has_an_identity_that_the_pinned_root_certifies(pki):
    issue(pki, "sensor-1", "--days", 30)
    identity = load_identity(pki / "sensor-1.crt", pki / "sensor-1.key")
    identity.certificate.check(load_authority(pki / "root.pub"), NOW)
    assert identity.certificate.name == "sensor-1"
    assert identity.certificate.expires_at == NOW + 30 * DAY
    assert identity.key.public.raw == identity.certificate.key


def test_a_node_reads_the_files_that_the_command_wrote(pki):
    issue(pki, "sensor-1")
    files = pki / "sensor-1.crt", pki / "sensor-1.key"
    config = {"identity": str(files[0]), "identity-key": str(files[1])}
    identity = identity_of(Context(1, 1000, config, RecordDict(), {}))
    assert identity.certificate == load_identity(*files).certificate
    assert identity.key.seed == load_key(files[1]).seed


def test_a_key_made_on_the_device_is_certified_without_leaving_it(pki, tmp_path):
    device = tmp_path / "device"
    assert enroll("key", "sensor-1", "--out", device) == 0
    issue(pki, "sensor-1", "--key", device / "sensor-1.pub")
    assert not (pki / "sensor-1.key").exists()
    identity = load_identity(pki / "sensor-1.crt", device / "sensor-1.key")
    identity.certificate.check(load_authority(pki / "root.pub"), NOW)


def test_many_devices_have_names_and_keys_of_their_own(pki):
    assert enroll("devices", "--count", 12, "--root", pki / "root.key", "--out", pki) == 0
    names = [f"device-{number:02}" for number in range(1, 13)]
    assert sorted(path.stem for path in pki.glob("device-*.crt")) == names
    identities = [load_identity(pki / f"{name}.crt", pki / f"{name}.key") for name in names]
    assert [identity.certificate.name for identity in identities] == names
    assert len({identity.certificate.key for identity in identities}) == 12


def test_secret_files_are_their_owners_only_under_any_umask(pki):
    before = os.umask(0)
    try:
        issue(pki, "sensor-1")
        enroll("key", "sensor-2", "--out", pki)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in pki.iterdir()}
    assert {name for name, mode in modes.items() if mode == 0o600} == {
        "root.key", "sensor-1.key", "sensor-2.key",
    }  # fmt: skip


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o610])
def test_a_secret_key_that_others_may_reach_is_not_used(pki, mode, capsys):
    issue(pki, "sensor-1")
    for name in ("root.key", "sensor-1.key"):
        (pki / name).chmod(mode)
    with pytest.raises(ConfigurationError, match=r"sensor-1.key can be .* by others: chmod 600"):
        load_identity(pki / "sensor-1.crt", pki / "sensor-1.key")
    line = refused(capsys, "device", "x", "--root", pki / "root.key", "--out", pki)
    assert "root.key can be read or changed by others: chmod 600 it" in line
    assert "chmod 600" in refused(capsys, "show", pki / "root.key")
    assert not (pki / "x.crt").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["root", "--out", "pki"],
        ["device", "sensor-1", "--root", "pki/root.key", "--out", "pki"],
        ["key", "sensor-1", "--out", "pki"],
        [
            "devices",
            "--count",
            "3",
            "--prefix",
            "sensor-",
            "--root",
            "pki/root.key",
            "--out",
            "pki",
        ],
        ["roster", "pki", "--out", "pki/root.pub"],
    ],
    ids=lambda command: command[0],
)
def test_no_file_is_ever_overwritten(pki, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    issue(pki, "sensor-1")
    before = {path: path.read_bytes() for path in pki.iterdir()}
    assert "exists and is never overwritten" in refused(capsys, *command)
    assert {path: path.read_bytes() for path in pki.iterdir()} == before


def test_a_dangling_link_is_a_file_that_exists(pki, tmp_path, capsys):
    (pki / "sensor-1.key").symlink_to(tmp_path / "elsewhere")
    line = refused(capsys, "device", "sensor-1", "--root", pki / "root.key", "--out", pki)
    assert "never overwritten" in line
    assert not (tmp_path / "elsewhere").exists()


def test_a_disk_that_fails_leaves_nothing_behind(pki, monkeypatch, capsys):
    before = sorted(pki.iterdir())
    sync, calls = os.fsync, []

    def third_fails(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", third_fails)
    line = refused(
        capsys, "devices", "--count", 2, "--root", pki / "root.key", "--out", pki
    )  # fmt: skip
    assert "cannot be written: No space left on device" in line
    assert sorted(pki.iterdir()) == before


def test_no_certificate_outlives_the_root(pki, capsys):
    issue(pki, "sensor-1", "--days", 365)
    line = refused(
        capsys, "device", "x", "--days", 365, "--root", pki / "root.key", "--out", pki, now=NOW + 1
    )
    assert "would outlive the root, which ends on 2028-01-15 08:00:00 UTC" in line


def test_an_expired_root_enrolls_nobody(pki, capsys):
    line = refused(
        capsys, "device", "x", "--days", 1, "--root", pki / "root.key", "--out", pki,
        now=NOW + 365 * DAY,
    )  # fmt: skip
    assert "root.crt: the certificate of root expired" in line


def test_a_device_cannot_enroll_others(pki, capsys):
    issue(pki, "sensor-1")
    line = refused(capsys, "device", "x", "--root", pki / "sensor-1.key", "--out", pki)
    assert "sensor-1.crt: the certificate of sensor-1 is not signed by the key" in line


def test_the_roots_own_key_is_no_devices(pki, capsys):
    line = refused(
        capsys, "device", "x", "--key", pki / "root.pub", "--root", pki / "root.key", "--out", pki
    )
    assert "a device needs a key of its own, found the root's" in line


# The roster.


def test_a_roster_lists_every_device_of_the_root_by_name(pki, tmp_path, capsys):
    for name in ("zebra", "ant", "bee"):
        issue(pki, name)
    assert enroll("roster", pki, "--out", tmp_path / "roster.json") == 0
    roster = json.loads((tmp_path / "roster.json").read_text())
    assert [device["name"] for device in roster["devices"]] == ["ant", "bee", "zebra"]
    assert bytes.fromhex(roster["authority"]) == load_authority(pki / "root.pub")
    bee = load_certificate(pki / "bee.crt")
    assert roster["devices"][1] == {
        "name": "bee",
        "key": bee.key.hex(),
        "expires": "2028-01-15 08:00:00 UTC",
        "certificate": b64encode(bee.to_bytes()).decode(),
    }
    capsys.readouterr()
    assert enroll("show", tmp_path / "roster.json") == 0
    assert "roster of 3 devices, 0 expired" in capsys.readouterr().out


def test_a_roster_refuses_an_expired_certificate(pki, tmp_path, capsys):
    issue(pki, "old", "--days", 1)
    issue(pki, "young", "--days", 9)
    line = refused(capsys, "roster", pki, "--out", tmp_path / "roster.json", now=NOW + DAY)
    assert "old.crt: the certificate of old expired" in line
    assert not (tmp_path / "roster.json").exists()


def test_a_roster_refuses_a_certificate_of_another_root(pki, tmp_path, capsys):
    other = tmp_path / "other"
    assert enroll("root", "--out", other) == 0
    assert (
        enroll("device", "stranger", "--root", other / "root.key", "--out", pki) == 0
    )  # fmt: skip
    line = refused(capsys, "roster", pki, "--out", tmp_path / "roster.json")
    assert "stranger.crt: the certificate of stranger is not signed by the key" in line
    line = refused(capsys, "roster", pki, "--authority", pki / "no.pub", "--out", tmp_path / "r")
    assert "no.pub cannot be read: No such file" in line


@pytest.mark.parametrize("twice", ["name", "key"])
def test_a_roster_refuses_a_name_or_a_key_that_occurs_twice(pki, tmp_path, capsys, twice):
    issue(pki, "one")
    again = tmp_path / "again"
    if twice == "name":
        arguments = ["one"]
    else:
        identity = load_identity(pki / "one.crt", pki / "one.key")
        (tmp_path / "one.pub").write_bytes(identity.key.public.to_pem())
        arguments = ["two", "--key", tmp_path / "one.pub"]
    assert enroll("device", *arguments, "--root", pki / "root.key", "--out", again) == 0
    next(again.glob("*.crt")).rename(pki / "second.crt")
    line = refused(capsys, "roster", pki, "--out", tmp_path / "roster.json")
    assert re.search(rf"second.crt has the {twice} \S+ of \S+one.crt: keep one", line)


def test_a_roster_of_nobody_is_refused(pki, tmp_path, capsys):
    assert "found none" in refused(capsys, "roster", pki, "--out", tmp_path / "roster.json")


# What a file is.


def test_show_says_what_a_file_is_and_nothing_secret(pki, capsys):
    issue(pki, "sensor-1", "--days", 10)
    seed = load_key(pki / "sensor-1.key").seed
    public = load_certificate(pki / "sensor-1.crt").key.hex()
    capsys.readouterr()
    for name in ("root.pub", "root.key", "sensor-1.key", "sensor-1.crt"):
        assert enroll("show", pki / name, now=NOW + 2 * DAY) == 0
    shown = capsys.readouterr().out
    assert "public key\n" in shown
    assert "secret key, not shown\n" in shown
    assert "certificate of sensor-1\n" in shown
    assert "(in 8 days)" in shown
    assert shown.count(public) == 2
    assert seed.hex() not in shown
    assert b64encode(seed).decode().rstrip("=") not in shown


def test_show_calls_an_expired_certificate_expired(pki, capsys):
    issue(pki, "sensor-1", "--days", 1)
    capsys.readouterr()
    assert enroll("show", pki / "sensor-1.crt", now=NOW + DAY) == 0
    assert "(EXPIRED: enroll the device again)" in capsys.readouterr().out


def test_a_certificate_for_any_time_can_be_shown(pki, capsys):
    key = load_key(pki / "root.key")
    far = Certificate.issue(key, name="far", key=b"k" * 32, expires_at=(1 << 62) - 1)
    (pki / "far.crt").write_bytes(far.to_bytes())
    capsys.readouterr()
    assert enroll("show", pki / "far.crt") == 0
    assert "second 4611686018427387903" in capsys.readouterr().out


MALFORMED = {
    "empty": b"",
    "json": b"{}",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "roster without devices": b'{"format":1,"authority":"00","devices":[]}',
    "no certificate": b"\x03abc",
    "certificate and more": Certificate("abc", bytes(32), 1, bytes(64)).to_bytes() + b"x",
    "public key": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    "secret key": b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_file_that_is_none_of_ours_is_refused_in_one_line(tmp_path, capsys, data):
    path = tmp_path / "file"
    path.write_bytes(data)
    path.chmod(0o600)
    refused(capsys, "show", path)
    for load in (load_certificate, load_key, load_authority):
        with pytest.raises(ConfigurationError):
            load(path)


def test_a_pipe_is_refused_without_waiting(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "must be a plain file" in refused(capsys, "show", tmp_path / "pipe")


def test_a_secret_key_in_the_place_of_a_public_one_is_refused(pki, capsys):
    issue(pki, "sensor-1")
    line = refused(
        capsys, "roster", pki, "--authority", pki / "root.key", "--out", pki / "roster.json"
    )
    assert "an Ed25519 public key" in line


def test_a_key_of_another_device_is_no_identity(pki):
    issue(pki, "one")
    issue(pki, "two")
    with pytest.raises(ConfigurationError, match="must belong to the certificate's key"):
        load_identity(pki / "one.crt", pki / "two.key")


# The command line.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: STEP"),
        (["magic"], "invalid choice: 'magic'"),
        (["root"], "the following arguments are required: --out"),
        (["root", "--out", "x", "--days", "soon"], "--days: invalid int value: 'soon'"),
        (["root", "--out", "x", "--days", "0"], r"--days must be in 1..3650, got 0"),
        (["root", "--out", "x", "--days", "9999"], r"--days must be in 1..3650, got 9999"),
        (["key", "../x", "--out", "x"], "must be 1 to 64 letters"),
        (["key", "root", "--out", "x"], "must be 1 to 64 letters"),
        (["key", "a/b", "--out", "x"], "must be 1 to 64 letters"),
        (["key", "x" * 65, "--out", "x"], "must be 1 to 64 letters"),
        (["device", "x", "--root", "no.key", "--out", "x"], "no.key cannot be read: No such file"),
        (["devices", "--count", "0", "--root", "r", "--out", "x"], r"must be in 1..65520, got 0"),
        (["devices", "--count", "1e3", "--root", "r", "--out", "x"], "must be in 1..65520"),
        (["devices", "--count", "9" * 99, "--root", "r", "--out", "x"], "must be in 1..65520"),
        (["roster", "no", "--out", "x"], "no/root.pub cannot be read: No such file"),
        (["show", "no"], "no cannot be read: No such file"),
        (["show", "."], "cannot be read: Is a directory"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [[], ["enroll"], *(["enroll", leaf] for leaf in LEAVES)])
def test_help_at_every_level_explains_every_argument(capsys, place):
    with pytest.raises(SystemExit) as stopped:
        main([*place, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m experiments.deploy {' '.join(place)}".rstrip() in text
    assert len(text.split()) > 30
    if place == ["enroll"]:
        assert all(re.search(rf"^    {leaf}\s+\w", text, re.MULTILINE) for leaf in LEAVES)


def test_the_command_loads_no_training_library_and_no_flower(tmp_path):
    script = (
        "import sys; from experiments.deploy import main;"
        f"main(['enroll', 'root', '--out', {str(tmp_path / 'pki')!r}]);"
        "print({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'ray', 'flwr', 'hydra', 'opacus'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert (tmp_path / "pki" / "root.key").exists()


def test_two_roots_have_different_keys(tmp_path):
    for name in ("one", "two"):
        enroll("root", "--out", tmp_path / name)
    assert load_authority(tmp_path / "one/root.pub") != load_authority(tmp_path / "two/root.pub")


def test_a_certificate_survives_its_file(tmp_path):
    key = SigningKey.generate(SystemEntropy())
    for size in (1, 31, 64):
        certificate = Certificate.issue(key, name="n" * size, key=b"k" * 32, expires_at=1)
        (tmp_path / "file.crt").write_bytes(certificate.to_bytes())
        assert load_certificate(tmp_path / "file.crt") == certificate
