"""Whole rounds whose every byte is on record, and a second reading of the paper.

`tests/vectors/secagg_v1.json` holds all messages and all secrets of a tiny round,
and the hash of all messages of larger ones. The masked inputs are computed here
once more from the secrets alone, straight from RFC 7748, RFC 5869 and SP 800-38A,
so that the file means the same to another implementation.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcore.crypto import ReplayedEntropy
from fedcore.secagg import Plan, encode
from tests.fedcore.secagg.rehearsal import Rehearsal, whole_round

FILE = Path(__file__).parents[2] / "vectors" / "secagg_v1.json"
VECTORS = json.loads(FILE.read_text(encoding="utf-8"))
ROUND = VECTORS["round"]


def replay(vector):
    plan = Plan.from_bytes(bytes.fromhex(vector["plan"]))
    entropy = ReplayedEntropy(bytes.fromhex(vector["seed"]))
    inputs = {c: np.array(x, plan.ring.dtype) for c, x in enumerate(vector.get("inputs", []))}
    absent = {int(client): stage for client, stage in vector["absent"].items()}
    return whole_round(plan, absent, entropy=entropy, vectors=inputs)


def on_record(rehearsal):
    return [
        {"message": type(message).__name__, "client": client, "bytes": data.hex()}
        for (client, message), data in zip(rehearsal.log, rehearsal.transcript(), strict=True)
    ]


def secrets_on_record(vector):
    """The secrets of each client, taken from its states on the way."""
    plan = Plan.from_bytes(bytes.fromhex(vector["plan"]))
    rehearsal = Rehearsal(plan, ReplayedEntropy(bytes.fromhex(vector["seed"])))
    joined = dict(rehearsal.advance("share").states)
    shared = dict(rehearsal.advance("upload").states)
    return [
        {
            "mask_secret": joined[client].mask_secret.hex(),
            "share_secret": joined[client].share_secret.hex(),
            "self_mask_seed": shared[client].self_mask_seed.hex(),
        }
        for client in range(plan.clients)
    ]


def test_known_answer():
    rehearsal = replay(ROUND)
    assert rehearsal.plan.digest().hex() == ROUND["digest"]
    assert secrets_on_record(ROUND) == ROUND["secrets"]
    assert on_record(rehearsal) == ROUND["messages"]
    assert rehearsal.outcome.total.tolist() == ROUND["total"]
    assert sorted(rehearsal.outcome.survivors) == ROUND["survivors"]


@pytest.mark.parametrize("vector", VECTORS["transcripts"], ids=lambda vector: vector["name"])
def test_all_messages_of_a_round_have_the_recorded_hash(vector):
    rehearsal = replay(vector)
    whole = b"".join(encode(message, rehearsal.plan) for _, message in rehearsal.log)
    assert len(rehearsal.log) == vector["messages"]
    assert hashlib.sha256(whole).hexdigest() == vector["sha256"]


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
    info = b"fedcore/v1/mask/" + low.to_bytes(4, "little") + b"/" + high.to_bytes(4, "little")
    return HKDF(hashes.SHA256(), 32, salt=digest, info=info).derive(
        secret.exchange(public.public_key())
    )


def test_a_masked_input_is_what_the_paper_says():
    plan = Plan.from_bytes(bytes.fromhex(ROUND["plan"]))
    digest, mask, secrets = bytes.fromhex(ROUND["digest"]), 2**plan.ring_bits - 1, ROUND["secrets"]
    assert plan.ring.dtype == np.uint16
    uploads = {m["client"]: m["bytes"] for m in ROUND["messages"] if m["message"] == "MaskedInput"}
    assert sorted(uploads) == ROUND["survivors"]
    for client, encoded in uploads.items():
        y = np.array(ROUND["inputs"][client])
        y += stream(secrets[client]["self_mask_seed"], plan.dim, mask)
        for peer in set(range(plan.clients)) - {client}:
            low, high = sorted((client, peer))
            seed = pairwise_seed(secrets[client], secrets[peer], digest, low, high).hex()
            y += (1 if client < peer else -1) * stream(seed, plan.dim, mask)
        bits = "".join(f"{word & mask:0{plan.ring_bits}b}"[::-1] for word in y.tolist())
        body = int(bits[::-1], 2).to_bytes(len(bits) // 8, "little")
        assert encoded == (b"fC\x01\x06" + body).hex()
