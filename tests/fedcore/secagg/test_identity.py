"""Certificates and identities: what the root signed, and nothing else."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto import ReplayedEntropy, transcript_hash
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.secagg.fields import Reader
from fedcore.secagg.identity import (
    Certificate,
    Credential,
    Identity,
    is_signed,
    survivors_statement,
)

ROOT = SigningKey.generate(ReplayedEntropy(b"root"))
OTHER_ROOT = SigningKey.generate(ReplayedEntropy(b"other root"))
DEVICE = SigningKey.generate(ReplayedEntropy(b"device"))
AUTHORITY = ROOT.public.raw
NOW, EXPIRY = 1_800_000_000, 1_900_000_000
GOOD = Certificate.issue(ROOT, name="sensor-1", key=DEVICE.public.raw, expires_at=EXPIRY)
BYTES = GOOD.to_bytes()

names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
times = st.integers(1, (1 << 62) - 1)


@given(name=names, key=st.binary(min_size=32, max_size=32), expires_at=times)
def test_what_the_root_issued_is_accepted_until_it_expires(name, key, expires_at):
    certificate = Certificate.issue(ROOT, name=name, key=key, expires_at=expires_at)
    certificate.check(AUTHORITY, 0)
    certificate.check(AUTHORITY, expires_at - 1)
    for late in (expires_at, expires_at + 1, 1 << 62):
        with pytest.raises(PeerProtocolError, match=r"expired .* enroll the device again"):
            certificate.check(AUTHORITY, late)


@given(name=names, key=st.binary(min_size=32, max_size=32), expires_at=times)
def test_a_certificate_survives_its_bytes(name, key, expires_at):
    certificate = Certificate.issue(ROOT, name=name, key=key, expires_at=expires_at)
    assert Certificate.from_bytes(certificate.to_bytes()) == certificate


def test_the_layout_is_the_documented_one():
    fields = [b"\x08", b"sensor-1", DEVICE.public.raw, EXPIRY.to_bytes(8, "little")]
    assert b"".join([*fields, GOOD.signature]) == BYTES
    assert len(GOOD.signature) == 64
    statement = transcript_hash(
        "fedcore/v1/certificate", b"sensor-1", DEVICE.public.raw, EXPIRY.to_bytes(8, "little")
    )
    ROOT.public.verify(statement, GOOD.signature)


@pytest.mark.parametrize(
    "authority",
    [OTHER_ROOT.public.raw, DEVICE.public.raw, bytes(32), b"\xff" * 32, b"", bytes(31)],
    ids=["another root", "the device itself", "zeros", "no point", "empty", "short"],
)
def test_a_certificate_of_anybody_but_the_pinned_root_is_refused(authority):
    with pytest.raises(PeerProtocolError, match="certificate of sensor-1 is not signed by the key"):
        GOOD.check(authority, NOW)


def test_a_device_cannot_certify_another():
    forged = Certificate.issue(DEVICE, name="sensor-2", key=b"k" * 32, expires_at=EXPIRY)
    with pytest.raises(PeerProtocolError, match="not signed"):
        forged.check(AUTHORITY, NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "sensor-2"},
        {"key": OTHER_ROOT.public.raw},
        {"expires_at": EXPIRY + 1},
        {"signature": bytes(64)},
        {"signature": GOOD.signature[:63]},
        {"signature": b""},
    ],
    ids=["name", "key", "expiry", "zero signature", "short signature", "no signature"],
)
def test_a_certificate_with_another_field_is_refused(change):
    with pytest.raises(PeerProtocolError, match="not signed"):
        replace(GOOD, **change).check(AUTHORITY, NOW)


@given(place=st.integers(0, len(BYTES) - 1), mask=st.integers(1, 255))
def test_a_certificate_with_any_byte_altered_is_refused(place, mask):
    altered = bytearray(BYTES)
    altered[place] ^= mask
    with pytest.raises(PeerProtocolError):
        Certificate.from_bytes(bytes(altered)).check(AUTHORITY, NOW)


def test_every_single_bit_counts():
    for bit in range(8 * len(BYTES)):
        altered = bytearray(BYTES)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerProtocolError):
            Certificate.from_bytes(bytes(altered)).check(AUTHORITY, NOW)


def test_every_prefix_and_every_extension_is_refused():
    for size in range(len(BYTES)):
        with pytest.raises(PeerProtocolError, match=r"more bytes at offset|a certificate's name"):
            Certificate.from_bytes(BYTES[:size])
    with pytest.raises(PeerProtocolError, match="a certificate ends after"):
        Certificate.from_bytes(BYTES + b"\0")


@given(data=st.binary(max_size=200))
def test_any_bytes_are_one_certificate_or_a_protocol_error(data):
    try:
        certificate = Certificate.from_bytes(data)
    except PeerProtocolError:
        return
    assert certificate.to_bytes() == data


@given(tail=st.binary(min_size=104, max_size=104), name=st.binary(max_size=64))
def test_a_name_is_one_that_could_be_issued_or_refused(name, tail):
    data = bytes([len(name)]) + name + tail
    try:
        certificate = Certificate.from_bytes(data)
    except PeerProtocolError:
        with pytest.raises(ConfigurationError):
            Certificate.issue(ROOT, name=name.decode("latin-1"), key=b"k" * 32, expires_at=1)
        return
    assert certificate.name.encode("ascii") == name
    Certificate.issue(ROOT, name=certificate.name, key=b"k" * 32, expires_at=1)


def test_certificates_follow_each_other_in_a_message():
    other = Certificate.issue(ROOT, name="b", key=b"k" * 32, expires_at=EXPIRY)
    reader = Reader(BYTES + other.to_bytes() + b"rest")
    assert (Certificate.read(reader), Certificate.read(reader)) == (GOOD, other)
    assert reader.rest() == b"rest"


@pytest.mark.parametrize(
    "name", ["", "-x", ".", "..", "a b", "a/b", "ü", "a\n", "a\0", "x" * 65, "_x"]
)
def test_a_name_that_could_mislead_is_not_issued(name):
    with pytest.raises(ConfigurationError, match="name must be 1 to 64 letters"):
        Certificate.issue(ROOT, name=name, key=b"k" * 32, expires_at=EXPIRY)


@pytest.mark.parametrize(
    ("key", "expires_at"), [(b"", 1), (b"k" * 31, 1), (b"k" * 33, 1), (b"k" * 32, 0),
                            (b"k" * 32, -1), (b"k" * 32, 1 << 62)],
)  # fmt: skip
def test_a_key_or_date_that_is_none_is_not_issued(key, expires_at):
    with pytest.raises(ConfigurationError, match=r"must be 32 bytes and expires_at a Unix time"):
        Certificate.issue(ROOT, name="x", key=key, expires_at=expires_at)


# Identities.


def test_an_identity_holds_the_key_of_its_certificate():
    identity = Identity(GOOD, DEVICE)
    assert identity.key.public.raw == identity.certificate.key


@pytest.mark.parametrize("key", [ROOT, OTHER_ROOT])
def test_an_identity_with_the_key_of_somebody_else_is_refused(key):
    with pytest.raises(ConfigurationError, match="must belong to the certificate's key: enroll"):
        Identity(GOOD, key)


def test_no_printed_identity_shows_its_secret():
    identity = Identity(GOOD, DEVICE)
    for text in (repr(identity), str(identity), f"{identity}", repr([identity]), repr(DEVICE)):
        assert DEVICE.seed.hex() not in text
        assert repr(DEVICE.seed)[2:-1] not in text
        assert "seed" not in text


# Credentials: whose keys an advertisement holds, in which round.

TERMS = {"digest": b"d" * 32, "client": 3, "mask_key": b"m" * 32, "share_key": b"s" * 32}
CREDENTIAL = Credential.sign(Identity(GOOD, DEVICE), **TERMS)


def test_a_credential_holds_for_what_was_signed():
    CREDENTIAL.check(**TERMS)
    assert CREDENTIAL.certificate == GOOD


@pytest.mark.parametrize(
    "change",
    [
        {"digest": b"e" * 32},
        {"client": 4},
        {"mask_key": b"n" * 32},
        {"share_key": b"t" * 32},
        {"mask_key": TERMS["share_key"], "share_key": TERMS["mask_key"]},
    ],
    ids=["another round", "another client", "another mask key", "another share key", "swapped"],
)
def test_a_credential_for_anything_else_is_refused(change):
    with pytest.raises(PeerProtocolError, match="is not signed by the key"):
        CREDENTIAL.check(**(TERMS | change))


def test_a_substituted_key_is_noticed_whichever_bit_differs():
    for field in ("mask_key", "share_key"):
        for bit in range(256):
            key = bytearray(TERMS[field])
            key[bit // 8] ^= 1 << bit % 8
            with pytest.raises(PeerProtocolError):
                CREDENTIAL.check(**(TERMS | {field: bytes(key)}))


def test_a_credential_under_the_certificate_of_another_device_is_refused():
    other = Certificate.issue(ROOT, name="b", key=OTHER_ROOT.public.raw, expires_at=EXPIRY)
    with pytest.raises(PeerProtocolError, match="the advertisement of client 3 is not signed"):
        replace(CREDENTIAL, certificate=other).check(**TERMS)


def test_a_credential_is_the_certificate_and_a_signature():
    data = CREDENTIAL.to_bytes()
    assert data == BYTES + CREDENTIAL.signature
    reader = Reader(data + b"rest")
    assert Credential.read(reader) == CREDENTIAL
    assert reader.rest() == b"rest"
    for size in range(len(data)):
        with pytest.raises(PeerProtocolError):
            Credential.read(Reader(data[:size]))


@given(
    one=st.frozensets(st.integers(0, 65_519), max_size=6),
    other=st.frozensets(st.integers(0, 65_519), max_size=6),
)
def test_an_endorsement_is_for_one_set_of_survivors_in_one_round(one, other):
    signature = DEVICE.sign(survivors_statement(b"d" * 32, one))
    key = DEVICE.public.raw
    assert is_signed(key, survivors_statement(b"d" * 32, sorted(one, reverse=True)), signature)
    assert is_signed(key, survivors_statement(b"d" * 32, other), signature) == (one == other)
    assert not is_signed(key, survivors_statement(b"e" * 32, one), signature)


def test_a_signature_for_one_purpose_serves_no_other():
    statements = [
        transcript_hash("fedcore/v1/certificate", b"x" * 32),
        transcript_hash("fedcore/v1/advertisement", b"x" * 32),
        survivors_statement(b"x" * 32, ()),
    ]
    assert len(set(statements)) == 3
    assert not is_signed(DEVICE.public.raw, survivors_statement(b"d" * 32, {3}), GOOD.signature)
    endorsement = DEVICE.sign(survivors_statement(TERMS["digest"], {3}))
    with pytest.raises(PeerProtocolError):
        replace(CREDENTIAL, signature=endorsement).check(**TERMS)
