import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import TAG_BYTES, seal, unseal
from fedcore.errors import PeerProtocolError

FOLDER = Path(__file__).parents[2] / "vectors"
GCM = json.loads((FOLDER / "aes256_gcm.json").read_text())["vectors"]
SEAL = json.loads((FOLDER / "seal_v1.json").read_text())

keys = st.binary(min_size=32, max_size=32)
texts = st.binary(max_size=100)
directions = st.integers(0, 1)
laws = settings(deadline=None)


def name(vector):
    return vector["name"]


def parse(vector):
    return {
        field: value if isinstance(value, int) else bytes.fromhex(value)
        for field, value in vector.items()
        if field != "name"
    }


@pytest.mark.parametrize("vector", GCM, ids=name)
def test_the_cipher_answers_as_in_its_specification(vector):
    v = parse(vector)
    assert AESGCM(v["key"]).encrypt(v["nonce"], v["plaintext"], v["associated"]) == v["box"]


@pytest.mark.parametrize("vector", GCM[:2], ids=name)
def test_the_first_direction_is_the_zero_nonce_of_the_specification(vector):
    v = parse(vector)
    assert seal(v["key"], v["plaintext"], direction=0, associated=b"") == v["box"]


@pytest.mark.parametrize("vector", SEAL["vectors"], ids=name)
def test_known_answer(vector):
    v = parse(vector)
    context = {"direction": v["direction"], "associated": v["associated"]}
    assert seal(v["key"], v["plaintext"], **context) == v["box"]
    assert unseal(v["key"], v["box"], **context) == v["plaintext"]


@pytest.mark.parametrize("vector", SEAL["refused"], ids=name)
def test_known_refusal(vector):
    with pytest.raises(PeerProtocolError, match="failed authentication"):
        unseal(**parse(vector))


@laws
@given(key=keys, text=texts, associated=texts, direction=directions)
def test_a_box_opens_to_what_was_sealed(key, text, associated, direction):
    box = seal(key, text, direction=direction, associated=associated)
    assert len(box) == len(text) + TAG_BYTES
    assert unseal(key, box, direction=direction, associated=associated) == text


@laws
@given(
    data=st.data(),
    key=keys,
    text=texts,
    associated=st.binary(min_size=1, max_size=60),
    direction=directions,
    where=st.sampled_from(("key", "box", "associated", "direction")),
)
def test_any_flipped_bit_is_refused(data, key, text, associated, direction, where):
    box = seal(key, text, direction=direction, associated=associated)
    arguments = {"key": key, "box": box, "associated": associated, "direction": direction}
    if where == "direction":
        arguments["direction"] = 1 - direction
    else:
        flipped = bytearray(arguments[where])
        bit = data.draw(st.integers(0, 8 * len(flipped) - 1))
        flipped[bit // 8] ^= 1 << bit % 8
        arguments[where] = bytes(flipped)
    with pytest.raises(PeerProtocolError):
        unseal(**arguments)


@given(key=keys, box=texts, associated=texts, direction=directions)
def test_arbitrary_bytes_are_refused(key, box, associated, direction):
    with pytest.raises(PeerProtocolError):
        unseal(key, box, direction=direction, associated=associated)
