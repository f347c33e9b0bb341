"""A Context survives its process, sealed, until it is old."""

import os

import pytest

from experiments.edge.contexts import KEPT, KEPT_DAYS, Contexts
from fedcore.errors import ConfigurationError
from fedcore.sealed import Seal

DAY = 24 * 3600
SEAL = Seal(bytes(range(32)))


@pytest.fixture
def contexts(tmp_path):
    return Contexts(tmp_path / "contexts", SEAL)


@pytest.fixture
def said():
    return []


def test_what_was_saved_last_is_loaded(contexts, said):
    assert contexts.load(5, said.append) is None
    contexts.save(5, b"first")
    contexts.save(5, b"second")
    assert contexts.load(5, said.append) == b"second"
    assert not said


def test_a_file_holds_nothing_to_read(contexts):
    contexts.save(5, b"the keys of a round")
    assert b"keys" not in (contexts.folder / "5").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda contexts: (contexts.folder / "5").write_bytes(b"half a fi"),
        lambda contexts: (contexts.folder / "6").replace(contexts.folder / "5"),
        lambda contexts: Contexts(contexts.folder, Seal(bytes(32))).save(5, b"foreign"),
    ],
    ids=["truncated", "that of another series", "that of another device"],
)
def test_one_that_does_not_open_is_left_out_and_told(contexts, said, damage):
    contexts.save(5, b"five")
    contexts.save(6, b"six")
    damage(contexts)
    assert contexts.load(5, said.append) is None
    assert "is left out" in said[0]


def test_a_disk_that_takes_nothing_stops_the_answer(contexts):
    contexts.folder.write_text("a file where the folder should be")
    with pytest.raises(ConfigurationError, match="nothing may be answered"):
        contexts.save(5, b"five")


def test_old_ones_and_those_too_many_are_removed(contexts, said):
    now = 1000 * DAY
    for series in range(KEPT + 3):
        contexts.save(series, b"kept")
        os.utime(contexts.folder / str(series), (now - series, now - series))
    os.utime(contexts.folder / "2", (now - (KEPT_DAYS + 1) * DAY,) * 2)
    (contexts.folder / "1.new").write_bytes(b"half")
    contexts.clean(now)
    left = {path.name for path in contexts.folder.iterdir()}
    assert left == {str(series) for series in range(KEPT + 1)} - {"2"}


def test_there_may_be_nothing_to_clean(contexts):
    contexts.clean(0)
    assert not contexts.folder.exists()
