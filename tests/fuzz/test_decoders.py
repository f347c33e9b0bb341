"""A hundred thousand inputs for all decoders, and that the judge is not blind."""

import re
from pathlib import Path

import numpy as np
import pytest

from fedcore.errors import PeerProtocolError
from tests.fuzz import law
from tests.fuzz.campaign import all_targets, inputs, shares
from tests.fuzz.law import Target, examine, limits

INPUTS = 100_000
PARTS = 4
ROOT = Path(__file__).parents[2]
READERS = re.compile(
    r"^class (\w+)|^    def (from_bytes|from_json|from_fields|from_pem)\b", re.MULTILINE
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return all_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_decoder_returns_a_value_or_raises_the_error_it_documents(targets, part):
    tried, findings = 0, []
    with limits():
        for target, count in list(zip(targets, shares(targets, INPUTS), strict=True))[part::PARTS]:
            for data in inputs(target, count, seed=0):
                tried += 1
                _, reason = examine(target, data)
                if reason is not None:
                    findings.append((target.name, reason, data))
    assert findings == []
    assert tried > INPUTS // (2 * PARTS)


def test_what_real_rounds_and_runs_wrote_is_taken(targets):
    assert sum(shares(targets, INPUTS)) >= INPUTS
    with limits():
        for target in targets:
            for data in target.corpus:
                assert examine(target, data) == (True, None), target.name


def test_the_inputs_are_many_and_different_and_those_of_their_seed(targets):
    for target in targets:
        some = list(inputs(target, 50, seed=1))
        assert some == list(inputs(target, 50, seed=1))
        assert some != list(inputs(target, 50, seed=2))
        assert len(set(some)) > 20


def test_every_class_that_is_read_from_bytes_is_fuzzed():
    fuzzed = "".join(file.read_text() for file in Path(__file__).parent.glob("*.py"))
    readers = set()
    for file in (ROOT / "fedcore").rglob("*.py"):
        owner = ""
        for name, method in READERS.findall(file.read_text(encoding="utf-8")):
            owner = name or owner
            if method:
                readers.add(f"{owner}.{method}")
    assert len(readers) > 10
    through = {"Envelope.from_fields": "Envelope.from_fields("}
    assert {name for name in readers if through.get(name, name) not in fuzzed} == set()


def refuse(data):
    raise PeerProtocolError


def crash(data):
    return data[10]


def loop(data):
    while True:
        pass


def swallow(data):
    try:
        loop(data)
    except Exception:  # noqa: BLE001 - that a decoder may do this is the point
        return


@pytest.mark.parametrize(
    ("decode", "encode", "verdict"),
    [
        (bytes, None, None),
        (refuse, None, None),
        (crash, None, "IndexError: index out of range"),
        (lambda data: np.zeros(1 << 40, np.uint8), None, "MemoryError: Unable to allocate"),
        (bytes, lambda value: value + b"!", "its value is written otherwise"),
        (loop, None, "not done after"),
        (swallow, None, "not done after"),
    ],
)
def test_whatever_else_a_decoder_does_is_found(monkeypatch, decode, encode, verdict):
    monkeypatch.setattr(law, "PATIENCE_SECONDS", 0.5)
    target = Target("toy", [b"abc"], decode, PeerProtocolError, encode)
    with limits():
        _, reason = examine(target, b"abc")
    assert reason == verdict if verdict is None else verdict in reason
