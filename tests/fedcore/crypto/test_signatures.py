import hashlib
import pickle

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto.entropy import ReplayedEntropy, SystemEntropy
from fedcore.crypto.signatures import SigningKey, VerifyKey
from fedcore.errors import ConfigurationError, VerificationError

# RFC 8032, section 7.1: seed, public key, message, signature.
RFC8032 = {
    "TEST 1": (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
            "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    "TEST 2": (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        (
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
            "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
        ),
    ),
    "TEST 3": (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
            "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
    "TEST SHA(abc)": (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        hashlib.sha512(b"abc").hexdigest(),
        (
            "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
            "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704"
        ),
    ),
}
# The order of the base point; a signature is a point and a scalar below it.
ORDER = 2**252 + 27742317777372353535851937790883648493

KEY = SigningKey.generate(ReplayedEntropy(b"signatures"))
messages = st.binary(max_size=200)


@pytest.mark.parametrize("name", RFC8032)
def test_known_answer(name):
    seed, public, message, signature = map(bytes.fromhex, RFC8032[name])
    key = SigningKey(seed)

    assert key.public.raw == public
    assert key.sign(message) == signature
    VerifyKey(public).verify(message, signature)


@given(message=messages, bit=st.integers(0, 64 * 8 - 1))
def test_a_signature_with_any_bit_flipped_is_refused(message, bit):
    signature = bytearray(KEY.sign(message))
    signature[bit // 8] ^= 1 << bit % 8

    with pytest.raises(VerificationError, match="does not belong to this message"):
        KEY.public.verify(message, bytes(signature))


@given(first=messages, second=messages)
def test_a_signature_verifies_for_its_own_message_only(first, second):
    signature = KEY.sign(first)

    KEY.public.verify(first, signature)
    if first != second:
        with pytest.raises(VerificationError):
            KEY.public.verify(second, signature)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 1000])
def test_a_signature_of_another_length_is_refused(size):
    with pytest.raises(VerificationError, match=f"{size} bytes"):
        KEY.public.verify(b"message", (KEY.sign(b"message") * 16)[:size])


def test_a_second_encoding_of_a_signature_is_refused():
    signature = KEY.sign(b"message")
    scalar = int.from_bytes(signature[32:], "little")
    malleated = signature[:32] + (scalar + ORDER).to_bytes(32, "little")

    with pytest.raises(VerificationError):
        KEY.public.verify(b"message", malleated)


def test_another_key_does_not_verify():
    other = SigningKey.generate(SystemEntropy()).public

    with pytest.raises(VerificationError):
        other.verify(b"message", KEY.sign(b"message"))


def test_a_public_key_that_is_no_curve_point_verifies_nothing():
    with pytest.raises(VerificationError):
        VerifyKey(b"\x02" + bytes(31)).verify(b"message", KEY.sign(b"message"))


def test_the_seed_is_never_shown():
    assert repr(KEY) == "SigningKey()"
    assert KEY.seed.hex() not in f"{KEY} {KEY!r}"


def test_keys_come_from_the_entropy_they_are_given():
    entropy = ReplayedEntropy(b"seed")

    assert SigningKey.generate(entropy).public == SigningKey.generate(entropy).public
    assert SigningKey.generate(entropy).public != SigningKey.generate(entropy.child("b")).public


def test_pem_files_hold_the_key_that_was_written():
    assert SigningKey.from_pem(KEY.to_pem()).seed == KEY.seed
    assert VerifyKey.from_pem(KEY.public.to_pem()) == KEY.public
    assert b"PRIVATE" not in KEY.public.to_pem()


def test_a_public_key_serves_as_an_identity():
    copy = pickle.loads(pickle.dumps(KEY.public))

    assert {KEY.public: "publisher"}[copy] == "publisher"


@pytest.mark.parametrize(
    "pem", [b"", b"hello", KEY.to_pem()[:60], bytes(range(256))], ids=["no", "text", "cut", "bytes"]
)
@pytest.mark.parametrize("kind", [SigningKey, VerifyKey])
def test_a_file_without_a_key_is_refused(kind, pem):
    with pytest.raises(ConfigurationError, match="expected a PEM file"):
        kind.from_pem(pem)


def test_a_key_of_the_wrong_kind_is_refused():
    exchange = X25519PrivateKey.generate()
    public = exchange.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    private = exchange.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )

    with pytest.raises(ConfigurationError):
        VerifyKey.from_pem(public)
    with pytest.raises(ConfigurationError):
        VerifyKey.from_pem(KEY.to_pem())
    with pytest.raises(ConfigurationError):
        SigningKey.from_pem(private)


def test_an_encrypted_private_key_is_refused():
    pem = serialization.load_pem_private_key(KEY.to_pem(), password=None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )

    with pytest.raises(ConfigurationError, match="unencrypted"):
        SigningKey.from_pem(pem)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
@pytest.mark.parametrize("kind", [SigningKey, VerifyKey])
def test_a_key_of_the_wrong_length_is_refused(kind, size):
    with pytest.raises(ConfigurationError, match=f"32 bytes, got {size}"):
        kind(bytes(size))


def test_a_key_whose_name_of_a_curve_has_one_bit_wrong_is_refused():
    """OpenSSL then finds an X448 key of the wrong length, and its error is no ValueError."""
    pem = SigningKey(bytes(32)).to_pem().replace(b"MC4CAQAwBQYDK2Vw", b"MC4CAQAwBQYDK2Vv")
    with pytest.raises(ConfigurationError, match="an unencrypted Ed25519 private key"):
        SigningKey.from_pem(pem)
