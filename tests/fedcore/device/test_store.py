import os
import shutil
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedcore.crypto.entropy import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.device import newest, open_release
from fedcore.errors import ConfigurationError, VerificationError
from fedcore.manifest import parse_manifest, signed_message

FILES = ("manifest.json", "manifest.sig", "model.onnx")


def rewrite(path, change):
    path.write_bytes(change(path.read_bytes()))


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def sign_again(release, key, **changes):
    """Sign a changed manifest, as only the owner of `key` can."""
    manifest = replace(parse_manifest((release / "manifest.json").read_bytes()), **changes)
    (release / "manifest.json").write_bytes(manifest.to_bytes())
    (release / "manifest.sig").write_bytes(key.sign(signed_message(manifest.to_bytes())))


def swap_signature(release):
    shutil.copy(release.parent / "1" / "manifest.sig", release)


def swap_statement(release):
    shutil.copy(release.parent / "1" / "manifest.json", release)


def use_a_folder(path):
    path.unlink()
    path.mkdir()


def use_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def raise_version(release):
    rewrite(release / "manifest.json", lambda data: data.replace(b'"version":2', b'"version":3'))


def sign_without_context(release):
    key = SigningKey.generate(ReplayedEntropy(b"publisher"))
    (release / "manifest.sig").write_bytes(key.sign((release / "manifest.json").read_bytes()))


def sign_with_another_key(release):
    sign_again(release, SigningKey.generate(ReplayedEntropy(b"stranger")))


TAMPERINGS = {
    "another version's signature": (swap_signature, "signature"),
    "another version's manifest": (swap_statement, "signature"),
    "a version that was raised": (raise_version, "signature"),
    "a signature without context": (sign_without_context, "signature"),
    "a stranger's signature": (sign_with_another_key, "signature"),
    "a model of the same length": (lambda r: rewrite(r / "model.onnx", flip), "SHA-256"),
    "no model at all": (lambda r: (r / "model.onnx").write_bytes(b""), "found 0 bytes"),
    "nothing but the folder": (lambda r: [(r / f).unlink() for f in FILES[1:]], "missing"),
} | {
    f"{file} {name}": (lambda r, f=file, c=change: c(r / f), rule)
    for file in FILES
    for name, change, rule in [
        ("with a bit flipped", lambda path: rewrite(path, flip), "signature|SHA-256"),
        ("cut short", lambda path: rewrite(path, lambda d: d[:-1]), "signature|SHA-256"),
        ("made longer", lambda path: rewrite(path, lambda d: d + b"\n"), "signature|at most"),
        ("emptied", lambda path: path.write_bytes(b""), "signature|SHA-256"),
        ("missing", lambda path: path.unlink(), "missing|found neither"),
        ("replaced by a folder", use_a_folder, "no plain file|found neither"),
        ("replaced by a pipe", use_a_pipe, "no plain file|found neither"),
    ]
}


def test_an_untouched_release_opens(models, model, description, key):
    release = open_release(models / "1", key.public)

    assert release.manifest.version == 1
    assert release.manifest.description == description
    assert release.model == model


def test_of_a_folder_of_versions_the_newest_is_opened(models, key):
    (models / ".draft-3").mkdir()
    (models / "007").mkdir()

    assert newest(models) == models / "2"
    assert open_release(models, key.public).manifest.version == 2


def test_the_trusted_key_may_be_its_32_bytes(models, key):
    assert open_release(models, key.public.raw) == open_release(models, key.public)
    with pytest.raises(ConfigurationError, match="32 bytes"):
        open_release(models, key.public.raw[:-1])


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_release_that_was_tampered_with_is_refused(models, key, name):
    tamper, rule = TAMPERINGS[name]
    tamper(models / "2")

    with pytest.raises(VerificationError, match=rule):
        open_release(models / "2", key.public)


def test_another_key_opens_nothing(models):
    stranger = SigningKey.generate(ReplayedEntropy(b"stranger")).public

    with pytest.raises(VerificationError, match="signature"):
        open_release(models, stranger)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    file=st.sampled_from(FILES),
    at=st.integers(0, 10_000),
    removed=st.integers(0, 4),
    inserted=st.binary(max_size=4),
)
def test_a_release_with_any_bytes_replaced_is_opened_only_if_nothing_changed(
    models, key, file, at, removed, inserted
):
    path = models / "2" / file
    original = path.read_bytes()
    at %= len(original) + 1
    changed = original[:at] + inserted + original[at + removed :]
    path.write_bytes(changed)
    try:
        if changed == original:
            assert open_release(models, key.public).manifest.version == 2
        else:
            with pytest.raises(VerificationError):
                open_release(models, key.public)
    finally:
        path.write_bytes(original)


def test_a_downgrade_is_refused_however_well_it_is_signed(models, key):
    assert open_release(models / "2", key.public, minimum_version=2).manifest.version == 2
    with pytest.raises(VerificationError, match=r"version 2 or newer, found 1: a downgrade"):
        open_release(models / "1", key.public, minimum_version=2)


def test_an_old_release_in_the_place_of_a_new_one_is_still_old(models, key):
    shutil.rmtree(models / "2")
    shutil.copytree(models / "1", models / "3")

    with pytest.raises(VerificationError, match="downgrade"):
        open_release(models, key.public, minimum_version=2)


@pytest.mark.parametrize("name", ["secret", "manifest.sig", "model.onnx.bak"])
def test_a_signed_name_is_followed_only_within_the_release(models, key, name):
    release = models / "2"
    (models / "secret").write_bytes(b"outside")
    file = parse_manifest((release / "manifest.json").read_bytes()).file
    sign_again(release, key, file=replace(file, name=name))

    with pytest.raises(VerificationError):
        open_release(release, key.public)


@pytest.mark.parametrize("file", FILES)
def test_a_file_without_end_is_not_read(models, key, file):
    with (models / "2" / file).open("r+b") as grown:
        grown.truncate(500_000_000)  # a sparse file: costs no disk

    tracemalloc.start()
    try:
        with pytest.raises(VerificationError, match="at most"):
            open_release(models, key.public)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 5_000_000


def test_a_signed_statement_that_is_no_manifest_is_refused(models, key):
    release = models / "2"
    for statement in (b"", b"{}", b"\xff", (release / "manifest.json").read_bytes() + b" "):
        (release / "manifest.json").write_bytes(statement)
        (release / "manifest.sig").write_bytes(key.sign(signed_message(statement)))
        with pytest.raises(VerificationError, match="malformed manifest"):
            open_release(release, key.public)


def test_a_folder_without_releases_is_named(tmp_path, key):
    with pytest.raises(VerificationError, match="found neither"):
        open_release(tmp_path, key.public)
    with pytest.raises(VerificationError, match="cannot read the release folder"):
        open_release(tmp_path / "nowhere", key.public)


def test_the_weights_are_not_printed(models, key):
    assert len(repr(open_release(models, key.public))) < 1500
