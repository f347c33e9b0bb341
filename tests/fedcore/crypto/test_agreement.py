import hmac
import json
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import KEY_BYTES, KeyPair, ReplayedEntropy, agree
from fedcore.errors import PeerProtocolError

FOLDER = Path(__file__).parents[2] / "vectors"
X25519 = json.loads((FOLDER / "x25519_rfc7748.json").read_text())
HKDF_RFC = json.loads((FOLDER / "hkdf_rfc5869.json").read_text())["vectors"]
AGREE = json.loads((FOLDER / "agree_v1.json").read_text())["vectors"]

laws = settings(deadline=None, max_examples=30)
secrets = st.binary(min_size=32, max_size=32)


def name(vector):
    return vector["name"]


def x25519(scalar, u):
    public = X25519PublicKey.from_public_bytes(u)
    return X25519PrivateKey.from_private_bytes(scalar).exchange(public)


def hkdf_one_block(point, salt, info):
    """Return 32 bytes of RFC 5869 written with the standard library."""
    extracted = hmac.digest(salt or bytes(32), point, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


@pytest.mark.parametrize("vector", X25519["vectors"], ids=name)
def test_the_curve_answers_as_in_rfc_7748(vector):
    scalar, u = bytes.fromhex(vector["scalar"]), bytes.fromhex(vector["u"])
    for _ in range(vector["iterations"]):
        scalar, u = x25519(scalar, u), scalar
    assert scalar.hex() == vector["output"]


@pytest.mark.parametrize("vector", HKDF_RFC, ids=name)
def test_the_key_derivation_answers_as_in_rfc_5869(vector):
    ikm, salt, info, okm = (
        bytes.fromhex(vector[field]) for field in ("ikm", "salt", "info", "okm")
    )
    assert HKDF(hashes.SHA256(), len(okm), salt=salt, info=info).derive(ikm) == okm
    assert hkdf_one_block(ikm, salt, info) == okm[:32]


@pytest.mark.parametrize("vector", X25519["vectors"][:2] + X25519["vectors"][-2:], ids=name)
def test_agreement_is_hkdf_over_the_shared_point(vector):
    scalar, u, point = (bytes.fromhex(vector[field]) for field in ("scalar", "u", "output"))
    key = agree(scalar, u, salt=b"context", info=b"purpose")
    assert key == hkdf_one_block(point, b"context", b"purpose")


@pytest.mark.parametrize("vector", AGREE, ids=name)
def test_known_answer(vector):
    secret, peer, salt, info = (
        bytes.fromhex(vector[field]) for field in ("secret", "peer", "salt", "info")
    )
    assert agree(secret, peer, salt=salt, info=info).hex() == vector["key"]


def test_the_public_key_is_the_secret_times_the_base_point():
    for vector in X25519["vectors"]:
        if vector["name"].startswith("6.1 public key"):
            pair = KeyPair.from_secret(bytes.fromhex(vector["scalar"]))
            assert pair.public.hex() == vector["output"]


@laws
@given(a=secrets, b=secrets, salt=st.binary(max_size=40), info=st.binary(max_size=40))
def test_both_ends_agree_and_every_context_has_its_own_key(a, b, salt, info):
    ours, theirs = KeyPair.from_secret(a), KeyPair.from_secret(b)
    key = agree(a, theirs.public, salt=salt, info=info)
    assert key == agree(b, ours.public, salt=salt, info=info)
    assert len(key) == KEY_BYTES
    assert key != agree(a, theirs.public, salt=salt + b"\x01", info=info)
    assert key != agree(a, theirs.public, salt=salt, info=info + b"\x00")
    assert key != x25519(a, theirs.public)


@pytest.mark.parametrize("point", X25519["low_order"], ids=name)
def test_a_point_of_low_order_is_refused(point):
    with pytest.raises(PeerProtocolError, match="point of large order"):
        agree(sha256(b"secret").digest(), bytes.fromhex(point["u"]), salt=b"", info=b"")


@given(st.binary(max_size=70).filter(lambda key: len(key) != KEY_BYTES))
def test_a_public_key_of_wrong_length_is_refused(key):
    with pytest.raises(PeerProtocolError, match="32 bytes"):
        agree(sha256(b"secret").digest(), key, salt=b"", info=b"")


def test_pairs_follow_from_entropy_and_purpose_and_hide_their_secret():
    entropy = ReplayedEntropy(b"seed")
    pair = KeyPair.generate(entropy, "mask-key")
    assert pair == KeyPair.generate(entropy, "mask-key")
    assert pair == KeyPair.from_secret(entropy.draw("mask-key", KEY_BYTES))
    assert pair.public != KeyPair.generate(entropy, "share-key").public
    assert repr(pair) == f"KeyPair(public={pair.public!r})"
