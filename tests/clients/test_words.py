"""What a device's exceptions tell a coordinator: rules and classes, no data and no paths."""

import pytest
from flwr.app import Context, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from clients import secagg_mod
from clients.journal import AnsweredJournal
from clients.words import HIDDEN, DeviceFailedError, kept_here, without_paths
from fedcore.errors import ConfigurationError, FedcoreError, PeerProtocolError
from tests.clients.coordinator import Coordinator, training_app

SECRET = "Ada Lovelace, 36"


@pytest.mark.parametrize(
    "error",
    [ValueError(SECRET), OSError(28, SECRET, "/people/ada/x"), KeyError(SECRET), RecursionError()],
)
def test_of_an_exception_of_anybody_only_the_class_is_told(error):
    with pytest.raises(DeviceFailedError) as told, kept_here("the app", {}):
        raise error
    assert str(told.value) == f"the app failed with {type(error).__name__}: see the device's log"
    assert told.value.__cause__ is error  # which the log has


def test_a_text_of_ours_is_told_as_it_is():
    with pytest.raises(PeerProtocolError) as told, kept_here("the device", {"journal": "/j"}):
        raise PeerProtocolError("at least 3 and/or 4 of 1/2")
    assert str(told.value) == "at least 3 and/or 4 of 1/2"


def test_the_paths_in_a_text_of_ours_are_not():
    settings = {"journal": "/people/ada lovelace/state/answered", "partition-id": 3}
    with pytest.raises(ConfigurationError) as told, kept_here("the device", settings):
        raise ConfigurationError(
            "/people/ada lovelace/state/answered: no room; /people/ada lovelace/state/.new, ~/x.key"
        )
    assert str(told.value) == f"{HIDDEN}: no room; {HIDDEN}, {HIDDEN}"


@given(st.lists(st.from_regex(r"[\w.-]+( [\w-]+)?", fullmatch=True), min_size=2, max_size=4))
def test_no_part_of_a_configured_path_is_told(parts):
    path = "/" + "/".join(f"~{part}~" for part in parts)
    told = without_paths(f"the file {path} is damaged: mend it", {"journal": path})
    assert told == f"the file {HIDDEN} is damaged: mend it"


def test_a_journal_that_cannot_be_kept_is_told_without_its_path(tmp_path):
    folder = tmp_path / "ada"  # is not there
    app = training_app(journal=lambda _: AnsweredJournal(folder / "answered"))
    coordinator = Coordinator(app)
    with pytest.raises(FedcoreError, match="cannot be kept") as told:
        coordinator.ask(0, coordinator.message("advertise"))
    assert "ada" not in str(told.value)


def test_an_app_that_fails_outside_of_rounds_keeps_its_words_too():
    def evaluate(message, context):
        raise ValueError(SECRET)

    context = Context(1, 2, {}, RecordDict(), {})
    with pytest.raises(DeviceFailedError, match="the app failed with ValueError"):
        secagg_mod()(Message(RecordDict(), 2, "evaluate"), context, evaluate)
