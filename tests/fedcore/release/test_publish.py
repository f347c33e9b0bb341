import hashlib
import os
import stat
from dataclasses import replace

import pytest

from fedcore.crypto.entropy import ReplayedEntropy, SystemEntropy
from fedcore.crypto.signatures import VerifyKey
from fedcore.errors import ConfigurationError
from fedcore.manifest import parse_manifest, signed_message
from fedcore.release import load_or_create_key, public_key_path, publish
from fedcore.release.publish import draft


def everything_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_release_is_three_files_in_a_numbered_folder(tmp_path, description, key):
    release = publish(tmp_path / "models", b"weights", description, key)

    assert release == tmp_path / "models" / "1"
    assert everything_in(tmp_path / "models") == [
        "1", "1/manifest.json", "1/manifest.sig", "1/model.onnx",
    ]  # fmt: skip
    statement = (release / "manifest.json").read_bytes()
    key.public.verify(signed_message(statement), (release / "manifest.sig").read_bytes())
    manifest = parse_manifest(statement)
    assert manifest.description == description
    manifest.file.verify((release / "model.onnx").read_bytes())


def test_versions_count_up_and_form_a_chain(tmp_path, description, key):
    releases = [publish(tmp_path, bytes([n]), description, key) for n in range(1, 12)]
    statements = [(release / "manifest.json").read_bytes() for release in releases]
    found = [parse_manifest(statement) for statement in statements]

    assert [manifest.version for manifest in found] == list(range(1, 12))
    assert [manifest.previous_sha256 for manifest in found] == [
        None, *(hashlib.sha256(statement).hexdigest() for statement in statements[:-1]),
    ]  # fmt: skip


def test_other_entries_of_the_folder_are_no_versions(tmp_path, description, key):
    for name in (".draft-1", "09", "latest", "0"):
        (tmp_path / name).mkdir()
    (tmp_path / "README").write_text("hello")

    assert publish(tmp_path, b"weights", description, key).name == "1"


def test_a_draft_is_complete_but_not_yet_there(tmp_path, description, key):
    with draft(tmp_path, b"weights", description, key) as release:
        assert not release.target.exists()
        assert (release.path / "model.onnx").read_bytes() == b"weights"

    assert (release.target / "model.onnx").read_bytes() == b"weights"
    assert not release.path.exists()


def test_a_draft_that_is_found_wanting_leaves_nothing_behind(tmp_path, description, key):
    with pytest.raises(ZeroDivisionError), draft(tmp_path, b"weights", description, key):
        raise ZeroDivisionError

    assert everything_in(tmp_path) == []


def test_a_disk_that_fails_leaves_nothing_behind(tmp_path, description, key, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path, b"weights", description, key)

    assert everything_in(tmp_path) == []


def test_of_two_publishers_of_one_version_the_second_is_refused(tmp_path, description, key):
    with (
        pytest.raises(ConfigurationError, match="publish again"),
        draft(tmp_path, b"second", description, key),
    ):
        publish(tmp_path, b"first", description, key)

    assert (tmp_path / "1" / "model.onnx").read_bytes() == b"first"
    assert everything_in(tmp_path)[0] == "1"


def test_a_description_that_no_device_would_read_is_not_published(tmp_path, description, key):
    labels = tuple(f"{number:0>150}" for number in range(2000))

    with pytest.raises(ConfigurationError, match="shorten the labels"):
        publish(tmp_path, b"weights", replace(description, labels=labels), key)
    assert everything_in(tmp_path) == []


def test_an_empty_model_is_not_published(tmp_path, description, key):
    with pytest.raises(ConfigurationError, match=r"file\.size"):
        publish(tmp_path, b"", description, key)


def test_a_signing_key_is_created_once_and_only_its_owner_may_read_it(tmp_path):
    path = tmp_path / "keys" / "signing.key"
    created = load_or_create_key(path, SystemEntropy())

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key(path, SystemEntropy()).public == created.public
    assert VerifyKey.from_pem(public_key_path(path).read_bytes()) == created.public


def test_a_signing_key_never_exists_with_a_wider_mode(tmp_path, monkeypatch):
    modes = []
    real = os.open

    def spy(path, flags, mode=0o777, **rest):
        modes.append(mode)
        return real(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", spy)
    load_or_create_key(tmp_path / "signing.key", ReplayedEntropy(b""))

    assert modes == [0o600]


def test_a_signing_key_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "signing.key"
    load_or_create_key(path, SystemEntropy())
    path.chmod(0o640)

    with pytest.raises(ConfigurationError, match="chmod 600"):
        load_or_create_key(path, SystemEntropy())


def test_a_file_that_is_no_key_is_neither_used_nor_overwritten(tmp_path):
    path = tmp_path / "signing.key"
    path.write_text("precious")
    path.chmod(0o600)

    with pytest.raises(ConfigurationError, match="private key"):
        load_or_create_key(path, SystemEntropy())
    assert path.read_text() == "precious"
