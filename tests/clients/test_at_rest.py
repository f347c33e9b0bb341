"""Where a device has a key for its files, nothing that it keeps can be read without."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from clients.at_rest import seal_of
from clients.feedback_store import store_of
from clients.journal import Answer, journal_of
from fedcore import durable
from fedcore.errors import ConfigurationError, PeerProtocolError
from tests.clients.test_feedback_store import LAST

FIRST = Answer(round_number=1, attempt=1)
SECOND = Answer(round_number=2, attempt=1)


def device(folder, key=bytes(range(32))):
    """The Context of a device whose key and files lie in `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{key[:2].hex()}.key"
    path.write_bytes(key)
    path.chmod(0o600)
    config = {
        "journal": str(folder / "answered"),
        "feedback": str(folder / "unsent"),
        "state-key": str(path),
    }
    return Context(1, 1000, config, RecordDict(), {})


@pytest.fixture
def used(tmp_path):
    context = device(tmp_path / "device")
    journal_of(context).claim("run-1", FIRST)
    store_of(context).save(LAST)
    return context


def test_what_is_kept_is_read_again_by_the_same_device(used):
    assert journal_of(used).last("run-1") == FIRST
    assert store_of(used).load().payload == LAST.payload
    with pytest.raises(PeerProtocolError, match="answers later ones only"):
        journal_of(used).claim("run-1", FIRST)


def test_neither_file_says_anything_without_the_key(used):
    for name in ("journal", "feedback"):
        data = Path(used.node_config[name]).read_bytes()
        assert data.startswith(b"fedcore sealed 1\n")
        assert b"run-1" not in data
        assert LAST.payload not in data
        assert LAST.whole.tobytes() not in data


def test_another_key_answers_nothing(used, tmp_path):
    other = device(tmp_path / "device", key=bytes(32))
    with pytest.raises(ConfigurationError, match="is damaged, so nothing may be answered"):
        journal_of(other).claim("run-1", SECOND)
    with pytest.raises(ConfigurationError, match="is damaged"):
        store_of(other).load()


@pytest.mark.parametrize("kept", [0, 1, 16, -1])
def test_a_truncated_journal_answers_nothing(used, kept):
    path = journal_of(used).path
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigurationError, match="nothing may be answered"):
        journal_of(used).claim("run-1", SECOND)


def test_files_in_each_others_place_are_refused(used):
    journal, unsent = journal_of(used).path, store_of(used).path
    first, second = journal.read_bytes(), unsent.read_bytes()
    journal.write_bytes(second)
    unsent.write_bytes(first)
    with pytest.raises(ConfigurationError, match="damaged"):
        journal_of(used).claim("run-1", SECOND)
    with pytest.raises(ConfigurationError, match="damaged"):
        store_of(used).load()


def test_a_journal_in_the_clear_does_not_replace_a_sealed_one(used, tmp_path):
    plain = replace(journal_of(used), seal=None, path=tmp_path / "plain")
    plain.claim("run-1", FIRST)
    journal_of(used).path.write_bytes(plain.path.read_bytes())
    with pytest.raises(ConfigurationError, match="damaged"):
        journal_of(used).claim("run-1", SECOND)


def test_a_crash_between_write_and_rename_leaves_what_was_there(used, monkeypatch):
    def crash(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable.Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            journal_of(used).claim("run-1", SECOND)
        with pytest.raises(KeyboardInterrupt):
            store_of(used).save(replace(LAST, whole=np.zeros(12, np.float32)))
    assert journal_of(used).last("run-1") == FIRST
    np.testing.assert_array_equal(store_of(used).load().whole, LAST.whole)
    journal_of(used).claim("run-1", SECOND)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda path: path.chmod(0o644), "can be read or changed by others"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(bytes(31)), "has 32 bytes, got 31"),
    ],
    ids=["open to others", "missing", "too short"],
)
def test_a_key_that_is_none_is_refused(tmp_path, break_it, said):
    context = device(tmp_path / "broken", key=bytes([7]) * 32)
    path = tmp_path / "broken" / "0707.key"
    break_it(path)
    with pytest.raises(ConfigurationError, match=said):
        seal_of(context.node_config)


def test_a_device_without_a_key_writes_in_the_clear():
    assert seal_of({}) is None
