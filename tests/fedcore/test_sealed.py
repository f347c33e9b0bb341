"""A sealed file opens for its device, under its name, whole, or not at all."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore import durable
from fedcore.errors import ConfigurationError
from fedcore.sealed import OVERHEAD, BrokenSealError, Seal

SEAL = Seal(bytes(range(32)))
OTHER = Seal(bytes(32))


@given(st.binary(max_size=200), st.text(max_size=20))
def test_what_was_sealed_opens_under_its_name(data, name):
    box = SEAL.close(name, data)
    assert SEAL.open(name, box) == data
    assert len(box) == len(data) + OVERHEAD


def test_two_boxes_of_the_same_bytes_have_nothing_in_common_but_the_format():
    first, second = SEAL.close("answers", bytes(64)), SEAL.close("answers", bytes(64))
    assert first != second
    assert first[-80:] != second[-80:]


def test_the_key_of_another_device_opens_nothing():
    with pytest.raises(BrokenSealError, match="not sealed by this device's key"):
        OTHER.open("answers", SEAL.close("answers", b"secret"))


def test_a_file_under_the_name_of_another_does_not_open():
    with pytest.raises(BrokenSealError):
        SEAL.open("answers", SEAL.close("unsent updates", b"secret"))


def test_no_truncated_file_opens():
    box = SEAL.close("answers", b"secret")
    for length in range(len(box)):
        with pytest.raises(BrokenSealError):
            SEAL.open("answers", box[:length])


def test_no_altered_byte_goes_unnoticed():
    box = SEAL.close("answers", b"secret")
    for index in range(len(box)):
        altered = box[:index] + bytes([box[index] ^ 1]) + box[index + 1 :]
        with pytest.raises(BrokenSealError):
            SEAL.open("answers", altered)


def test_neither_the_key_nor_the_data_is_shown():
    assert "\\x1f" not in repr(SEAL)
    with pytest.raises(BrokenSealError) as caught:
        OTHER.open("answers", SEAL.close("answers", b"secret"))
    assert "secret" not in str(caught.value)


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ConfigurationError, match="has 32 bytes, got 16"):
        Seal(bytes(16))


def test_a_crash_between_write_and_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "answers"
    SEAL.write(path, "answers", b"old")

    def crash(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable.Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            SEAL.write(path, "answers", b"new")
    assert SEAL.open("answers", path.read_bytes()) == b"old"
    # What the crash left behind is in nobody's way.
    SEAL.write(path, "answers", b"newer")
    assert SEAL.open("answers", path.read_bytes()) == b"newer"
    assert [file.name for file in tmp_path.iterdir()] == ["answers"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
