"""How the answers of Flower's command line are read; the real one is asked in `test_deployment`."""

import pytest
from flwr.cli.utils import SUPERLINK_UNAVAILABLE_MESSAGE

from experiments import submission
from experiments.following import UnreachableError
from experiments.parties import CoordinatorKeys
from experiments.processes import Coordinator
from fedcore.errors import ConfigurationError


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Ask a `flwr` that says a text and fails, of a SuperLink that is there, or is not."""

    def ask(text, *, there):
        program = tmp_path / "flwr"
        program.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr(submission, "program", lambda _: str(program))
        monkeypatch.setattr(submission, "answers", lambda *_: there)
        keys = CoordinatorKeys(tmp_path / "coordinator")
        return submission.flwr(Coordinator(keys, tmp_path / "state", 1), "ls", "deployment")

    return ask


def test_a_superlink_that_does_not_answer_is_away(asked):
    with pytest.raises(UnreachableError, match="flwr ls deployment failed: boom"):
        asked("boom", there=False)


def test_a_superlink_that_came_back_since_the_question_was_away(asked):
    with pytest.raises(UnreachableError):
        asked(SUPERLINK_UNAVAILABLE_MESSAGE.replace("'", ""), there=True)


def test_a_superlink_that_is_there_and_refuses_is_not_away(asked):
    with pytest.raises(ConfigurationError, match="unknown run") as found:
        asked("unknown run", there=True)
    assert not isinstance(found.value, UnreachableError)
