import json
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto import DIGEST_BYTES, transcript_hash

FILE = Path(__file__).parents[2] / "vectors/transcript_v1.json"
VECTORS = json.loads(FILE.read_text())["vectors"]

transcripts = st.tuples(st.text(max_size=8), st.lists(st.binary(max_size=8), max_size=4))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_known_answer(vector):
    parts = [bytes.fromhex(part) for part in vector["parts"]]
    assert transcript_hash(vector["label"], *parts).hex() == vector["digest"]
    framed = b"".join(
        len(part).to_bytes(8, "little") + part for part in (vector["label"].encode(), *parts)
    )
    assert sha256(framed).hexdigest() == vector["digest"]


@given(transcripts, transcripts)
def test_different_lists_have_different_hashes(one, other):
    same = transcript_hash(one[0], *one[1]) == transcript_hash(other[0], *other[1])
    assert same == (one == other)


@given(label=st.text(max_size=8), whole=st.binary(min_size=1, max_size=12), data=st.data())
def test_moving_a_boundary_changes_the_hash(label, whole, data):
    cut = data.draw(st.integers(0, len(whole)))
    split = transcript_hash(label, whole[:cut], whole[cut:])
    assert len(split) == DIGEST_BYTES
    assert split != transcript_hash(label, whole)
