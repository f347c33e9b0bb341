"""Writes the rounds on record again: `python -m tests.fedcore.secagg.record`.

`tests/vectors/secagg_v1.json` is for other implementations. It changes only with the
protocol, and then on purpose: say so in the change log. Each round follows from its plan
and its seeds alone; `replay` plays it, and `test_known_answers` compares.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedcore.crypto import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.secagg import Certificate, Identity, Plan
from fedcore.secagg.messages import Reply, Request
from tests.fedcore.secagg.rehearsal import (
    AUTHORITY,
    NOW,
    ROOT,
    Rehearsal,
    identity_of,
    seated,
    stages_of,
)

FILE: Final = Path(__file__).parents[2] / "vectors" / "secagg_v1.json"
INPUTS: Final = [[0, 1, 2, 4095], [10, 20, 30, 40], [4095, 4095, 0, 1], [7, 7, 7, 7]]
TINY = "four clients on the complete graph, client 3 drops out before its upload"
SIGNED = "four clients with identities, client 3 drops out before its upload"
LARGER: Final[Mapping[str, tuple[Plan, dict[int, str]]]] = {
    "five clients, one drops out before its upload": (Plan(5, 4, 3, 3, 16, 6), {4: "upload"}),
    "six clients, one drops out before its keys, one before its reveal": (
        Plan(6, 5, 3, 3, 33, 7),
        {0: "advertise", 2: "reveal"},
    ),
    "nine clients on a sparse graph, one drops out before its shares": (
        Plan(9, 6, 4, 5, 20, 9),
        {5: "share"},
    ),
    "two clients, one bit": (Plan(2, 1, 1, 2, 1, 3), {}),
    "twelve clients with identities on a sparse graph, three drop out on the way": (
        Plan(12, 8, 5, 6, 20, 9, authority=AUTHORITY),
        {1: "upload", 4: "endorse", 7: "reveal"},
    ),
}


def replay(vector: Mapping[str, Any]) -> Rehearsal:
    """The round that `vector` describes, before its first message."""
    plan = Plan.from_bytes(bytes.fromhex(vector["plan"]))
    return Rehearsal(
        plan,
        ReplayedEntropy(bytes.fromhex(vector["seed"])),
        {c: np.array(x, plan.ring.dtype) for c, x in enumerate(vector.get("inputs", []))},
        {client: _identity(device) for client, device in enumerate(vector.get("devices", []))},
    )


def play(vector: Mapping[str, Any]) -> Rehearsal:
    """The same, finished."""
    return replay(vector).advance(absent={int(c): stage for c, stage in vector["absent"].items()})


def messages(rehearsal: Rehearsal) -> list[dict[str, object]]:
    """Everything that was said."""
    said: list[tuple[int, Request | Reply]] = rehearsal.log
    return [
        {"message": type(message).__name__, "client": client, "bytes": data.hex()}
        for (client, message), data in zip(said, rehearsal.transcript(), strict=True)
    ]


def secrets(vector: Mapping[str, Any]) -> list[dict[str, str]]:
    """The secrets of each client, taken from its states on the way."""
    rehearsal = replay(vector)
    joined = dict(rehearsal.advance("share").states)
    shared = dict(rehearsal.advance("upload").states)
    return [
        {
            "mask_secret": joined[client].mask_secret.hex(),
            "share_secret": joined[client].share_secret.hex(),
            "self_mask_seed": shared[client].self_mask_seed.hex(),
        }
        for client in range(rehearsal.plan.clients)
    ]


def digest_of(rehearsal: Rehearsal) -> str:
    """One hash over everything that was said."""
    return hashlib.sha256(b"".join(rehearsal.transcript())).hexdigest()


def record() -> dict[str, object]:
    """All rounds, as the file has them."""
    return {
        "algorithm": "fedcore secure aggregation, protocol version 2: X25519, HKDF-SHA256, "
        "AES-256-GCM boxes, AES-256-CTR masks, Shamir over 65521, Ed25519",
        "entropy": "ReplayedEntropy(seed), child client=<index>; clients answer by increasing "
        "index",
        "round": _in_full(TINY, Plan(4, 3, 2, 3, 12, 4), {3: "upload"}),
        "authenticated": _in_full(
            SIGNED, Plan(4, 3, 2, 3, 12, 4, authority=AUTHORITY), {3: "upload"}
        ),
        "transcripts": [_in_short(name, *recipe) for name, recipe in LARGER.items()],
    }


def _in_full(name: str, plan: Plan, absent: Mapping[int, str]) -> dict[str, object]:
    vector = _describe(name, plan, absent, b"secagg_v1 tiny") | {"inputs": INPUTS}
    if plan.authenticated:
        vector |= {
            "root_seed": ROOT.seed.hex(),
            "now": NOW,
            "devices": [
                {"certificate": who.certificate.to_bytes().hex(), "seed": who.key.seed.hex()}
                for who in map(identity_of, range(plan.clients))
            ],
        }
    rehearsal = play(vector)
    assert rehearsal.outcome is not None
    return vector | {
        "digest": rehearsal.plan.digest().hex(),
        "secrets": secrets(vector),
        "messages": messages(rehearsal),
        "total": rehearsal.outcome.total.tolist(),
        "survivors": sorted(rehearsal.outcome.survivors),
    }


def _in_short(name: str, plan: Plan, absent: Mapping[int, str]) -> dict[str, object]:
    vector = _describe(name, plan, absent, b"secagg_v1 hash")
    rehearsal = play(vector)
    return vector | {"messages": len(rehearsal.log), "sha256": digest_of(rehearsal)}


def _describe(name: str, plan: Plan, absent: Mapping[int, str], seed: bytes) -> dict[str, Any]:
    assert set(absent.values()) <= set(stages_of(plan))
    context = hashlib.sha256(name.encode()).digest()
    bound = seated(replace(plan, context=context))
    return {
        "name": name,
        "seed": seed.hex(),
        "plan": bound.to_bytes().hex(),
        "absent": {str(client): stage for client, stage in sorted(absent.items())},
    }


def _identity(device: Mapping[str, str]) -> Identity:
    certificate = Certificate.from_bytes(bytes.fromhex(device["certificate"]))
    return Identity(certificate, SigningKey(bytes.fromhex(device["seed"])))


if __name__ == "__main__":
    text = json.dumps(record(), indent=2)
    FILE.write_text(re.sub(r"\[[\d,\s]*\]", lambda row: " ".join(row[0].split()), text) + "\n")
