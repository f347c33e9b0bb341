from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import PeerProtocolError
from fedcore.pipeline import Envelope, typed
from fedcore.pipeline.envelope import STAGES

ENVELOPE = Envelope("share", 3, "phone", b"plan bytes", b"message bytes", "num-examples", 2)
FIELDS = ENVELOPE.to_fields()
anything = st.none() | st.integers() | st.text(max_size=9) | st.binary(max_size=9) | st.floats()


@pytest.mark.parametrize("stage", STAGES)
def test_an_envelope_survives_the_record(stage):
    envelope = replace(ENVELOPE, stage=stage)
    assert Envelope.from_fields(envelope.to_fields()) == envelope


@pytest.mark.parametrize("name", sorted(FIELDS))
@pytest.mark.parametrize("value", [None, 1.5, ["x"], object])
def test_an_entry_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(PeerProtocolError, match=f"{name!r} as .*, found {type(value).__name__}"):
        Envelope.from_fields(FIELDS | {name: value})


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_missing_entry_is_refused_by_name(name):
    with pytest.raises(PeerProtocolError, match=repr(name)):
        Envelope.from_fields({key: value for key, value in FIELDS.items() if key != name})


@pytest.mark.parametrize("stage", ["", "unmask", "Upload", "x" * 10_000])
def test_an_unknown_stage_is_refused_in_one_short_line(stage):
    with pytest.raises(PeerProtocolError, match="stage must be one of") as caught:
        Envelope.from_fields(FIELDS | {"stage": stage})
    assert len(str(caught.value)) < 200


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=5), anything))
def test_any_record_is_an_envelope_or_a_protocol_error(fields):
    try:
        envelope = Envelope.from_fields(fields)
    except PeerProtocolError:
        return
    assert envelope.to_fields().items() <= fields.items()


def test_an_envelope_does_not_print_its_payload():
    assert "bytes'" not in repr(ENVELOPE)
    assert "phone" in repr(ENVELOPE)


def test_a_typed_entry_comes_back_as_it_is():
    assert typed({"a": b"x"}, "a", bytes) == b"x"
