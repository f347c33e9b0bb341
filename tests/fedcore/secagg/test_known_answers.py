"""Whole rounds whose every byte is on record, and a second reading of the paper.

`tests/vectors/secagg_v1.json` holds all messages and all secrets of two tiny rounds, one of
them authenticated, and the hash of all messages of larger ones; `record` writes it. The
masked inputs, commitments and signatures are computed here once more from the secrets
alone, straight from RFC 7748, RFC 5869, RFC 8032, FIPS 180-4 and SP 800-38A, so that the
file means the same to another implementation.
"""

import hashlib
import json
from itertools import takewhile

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcore.secagg import Plan
from tests.fedcore.secagg.record import FILE, digest_of, messages, play, record, secrets

VECTORS = json.loads(FILE.read_text(encoding="utf-8"))
ROUND, SIGNED = VECTORS["round"], VECTORS["authenticated"]
in_both = pytest.mark.parametrize("vector", [ROUND, SIGNED], ids=["unsigned", "signed"])


@in_both
def test_known_answer(vector):
    rehearsal = play(vector)
    assert rehearsal.plan.digest().hex() == vector["digest"]
    assert secrets(vector) == vector["secrets"]
    assert messages(rehearsal) == vector["messages"]
    assert rehearsal.outcome.total.tolist() == vector["total"]
    assert sorted(rehearsal.outcome.survivors) == vector["survivors"]


@in_both
def test_the_sum_on_record_is_that_of_the_survivors(vector):
    columns = zip(*(vector["inputs"][client] for client in vector["survivors"]), strict=True)
    assert [sum(column) % 2**12 for column in columns] == vector["total"]


@pytest.mark.parametrize("vector", VECTORS["transcripts"], ids=lambda vector: vector["name"])
def test_all_messages_of_a_round_have_the_recorded_hash(vector):
    rehearsal = play(vector)
    assert len(rehearsal.log) == vector["messages"]
    assert digest_of(rehearsal) == vector["sha256"]


def test_the_file_is_what_its_recorder_writes():
    assert record() == VECTORS


def said(vector, kind):
    """The encoded messages of one kind, without their header, by client."""
    return {
        line["client"]: bytes.fromhex(line["bytes"])[4:]
        for line in vector["messages"]
        if line["message"] == kind
    }


def bound(label, *parts):
    """A transcript hash: SHA-256 over each part behind its length in eight bytes."""
    parts = (label.encode(), *parts)
    return hashlib.sha256(
        b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    ).digest()


def u32(number):
    return number.to_bytes(4, "little")


def signature(seed, label, *parts):
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed)).sign(bound(label, *parts))


def public_of(seed):
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(seed))
    return key.public_key().public_bytes_raw()


@in_both
def test_a_digest_is_the_hash_of_the_plan(vector):
    plan = bytes.fromhex(vector["plan"])
    assert bound("fedcore/v1/secagg-plan", plan).hex() == vector["digest"]
    devices = [bytes.fromhex(device["certificate"]) for device in vector.get("devices", [])]
    keys = b"".join(data[1 + data[0] :][:32] for data in devices)
    assert all(
        body == u32(client) + plan + keys for client, body in said(vector, "Invitation").items()
    )


@in_both
def test_a_commitment_is_the_hash_of_the_round_the_client_and_its_seed(vector):
    digest = bytes.fromhex(vector["digest"])
    commitments = {client: body[:32] for client, body in said(vector, "EncryptedShares").items()}
    assert commitments == {
        client: bound(
            "fedcore/v1/self-mask", digest, u32(client), bytes.fromhex(known["self_mask_seed"])
        )
        for client, known in enumerate(vector["secrets"])
    }


def test_a_certificate_is_what_the_root_signed():
    authority = bytes.fromhex(SIGNED["plan"])[32:64]
    assert public_of(SIGNED["root_seed"]) == authority
    for client, device in enumerate(SIGNED["devices"]):
        name, key = b"device-%d" % client, public_of(device["seed"])
        time = (1_900_000_000).to_bytes(8, "little")
        signed = signature(SIGNED["root_seed"], "fedcore/v1/certificate", name, key, time)
        assert device["certificate"] == (bytes([len(name)]) + name + key + time + signed).hex()
        assert int.from_bytes(time, "little") > SIGNED["now"]


def test_an_advertisement_is_two_keys_a_certificate_and_the_signature_of_its_owner():
    for client, body in said(SIGNED, "Advertisement").items():
        device, known = SIGNED["devices"][client], SIGNED["secrets"][client]
        keys = [
            X25519PrivateKey.from_private_bytes(bytes.fromhex(known[name]))
            for name in ("mask_secret", "share_secret")
        ]
        publics = [key.public_key().public_bytes_raw() for key in keys]
        digest = bytes.fromhex(SIGNED["digest"])
        signed = signature(
            device["seed"], "fedcore/v1/advertisement", digest, u32(client), *publics
        )
        assert body == b"".join(publics) + bytes.fromhex(device["certificate"]) + signed


def test_an_endorsement_is_a_signature_over_the_survivors_in_order():
    survivors = b"".join(u32(client) for client in SIGNED["survivors"])
    endorsements = said(SIGNED, "Endorsement")
    assert sorted(endorsements) == SIGNED["survivors"]
    for client, body in endorsements.items():
        seed = SIGNED["devices"][client]["seed"]
        digest = bytes.fromhex(SIGNED["digest"])
        assert body == signature(seed, "fedcore/v1/survivors", digest, survivors)
    for client, body in said(SIGNED, "Endorsements").items():
        peers = [peer for peer in SIGNED["survivors"] if peer != client]
        assert body == u32(len(peers)) + b"".join(u32(p) + endorsements[p] for p in peers)


def test_endorsements_come_after_the_survivors_and_before_any_reveal():
    order = [line["message"] for line in SIGNED["messages"] if line["client"] == 1]
    assert list(takewhile(lambda kind: kind != "Reveal", order))[-4:] == [
        "MaskedInput",
        "Survivors",
        "Endorsement",
        "Endorsements",
    ]
    assert not {"Endorsement", "Endorsements"} & {line["message"] for line in ROUND["messages"]}


def stream(seed, dim, mask):
    """AES-256-CTR from counter zero as little-endian words of 16 bits."""
    cipher = Cipher(algorithms.AES(bytes.fromhex(seed)), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(cipher.update(bytes(2 * dim)), "<u2").astype(int) & mask


def pairwise_seed(own, peer, digest, low, high):
    """HKDF-SHA256 of the X25519 point; the salt is the plan, the info names the pair."""
    secret, public = (
        X25519PrivateKey.from_private_bytes(bytes.fromhex(key["mask_secret"]))
        for key in (own, peer)
    )
    info = b"fedcore/v1/mask/" + u32(low) + b"/" + u32(high)
    return HKDF(hashes.SHA256(), 32, salt=digest, info=info).derive(
        secret.exchange(public.public_key())
    )


@in_both
def test_a_masked_input_is_what_the_paper_says(vector):
    plan = Plan.from_bytes(bytes.fromhex(vector["plan"]))
    digest, mask, known = bytes.fromhex(vector["digest"]), 2**plan.ring_bits - 1, vector["secrets"]
    assert plan.ring.dtype == np.uint16
    uploads = said(vector, "MaskedInput")
    assert sorted(uploads) == vector["survivors"]
    for client, encoded in uploads.items():
        y = np.array(vector["inputs"][client])
        y += stream(known[client]["self_mask_seed"], plan.dim, mask)
        for peer in set(range(plan.clients)) - {client}:
            low, high = sorted((client, peer))
            seed = pairwise_seed(known[client], known[peer], digest, low, high).hex()
            y += (1 if client < peer else -1) * stream(seed, plan.dim, mask)
        bits = "".join(f"{word & mask:0{plan.ring_bits}b}"[::-1] for word in y.tolist())
        body = int(bits[::-1], 2).to_bytes(len(bits) // 8, "little")
        assert encoded == body
