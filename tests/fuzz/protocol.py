"""Decoders of what devices, coordinator and helper send each other, and of its parts.

The corpus is what was said in real rounds: with and without identities, complete and with
clients that disappear, and with a seed helper. States are fuzzed behind the decoders: a
message that parses may still be none that the protocol allows.
"""

import json
from functools import partial

import numpy as np

from fedcore.crypto import KeyPair, ReplayedEntropy, combine, seal, split, unseal
from fedcore.errors import (
    ConfigurationError,
    LocalProtocolError,
    PeerProtocolError,
    RoundAbortedError,
)
from fedcore.pipeline import Bonawitz, Buffer, ByClass, NoSecAgg, RoundPlan, SeedHelper
from fedcore.pipeline.envelope import Envelope
from fedcore.ring import Ring, pack, unpack
from fedcore.secagg import Certificate, Plan, decode, dump_state, encode, load_state
from fedcore.secagg.identity import Credential
from fedcore.secagg.messages import Invitation, Reply
from fedcore.secagg.seed_helper import HelperPlan, open_round
from fedcore.secagg.seed_helper.messages import CloseRequest, MaskSum, SeedBox, Voucher
from fedcore.secagg.seed_helper.sealing import seal_seed, unseal_seed
from strategies.helper_rounds import AnsweredInMemory, HelperRounds
from tests.fedcore.pipeline.rounds import private_plan, round_plan
from tests.fedcore.secagg.rehearsal import (
    NOW,
    Rehearsal,
    at_stage,
    complete_plan,
    enroll,
    identity_of,
    signed_plan,
    stages_of,
    whole_round,
)
from tests.fuzz.law import Target

ENTROPY = ReplayedEntropy(b"fuzz")
OPEN = complete_plan(7, ring_bits=12, dim=9)
SIGNED = signed_plan(7, ring_bits=16, dim=9)
GONE = {1: "upload", 3: "reveal"}


def protocol_targets() -> list[Target]:
    """All of this file."""
    return [
        *_wire(OPEN, "open"),
        *_wire(SIGNED, "signed"),
        *_states(OPEN, "open"),
        *_states(SIGNED, "signed"),
        *_stored(),
        *_plans(),
        *_helper(),
        *_parts(),
        _envelope(),
    ]


def _wire(plan: Plan, label: str) -> list[Target]:
    """Every kind of message that was said in rounds of `plan`."""
    said: dict[type, set[bytes]] = {}
    for absent in ({}, GONE):
        for _, message in whole_round(plan, absent).log:
            said.setdefault(type(message), set()).add(encode(message, plan))
    return [
        Target(
            f"{label} {kind.__name__}",
            sorted(corpus),
            partial(decode, kind=kind, plan=None if kind is Invitation else plan),
            PeerProtocolError,
            encode=lambda message, plan=plan: encode(message, plan),
        )
        for kind, corpus in said.items()
    ]


def _states(plan: Plan, label: str) -> list[Target]:
    """What coordinator and device do with a message, in each of their states."""
    targets = []
    for stage in stages_of(plan):
        round_ = at_stage(stage, plan).listen()
        client, request = next(iter(round_.requests.items()))
        requests = [encode(entry, plan) for entry in round_.requests.values()]
        replies = [encode(reply, plan) for reply in round_.replies.values()]
        if stage != "advertise":  # its state is the one before the answer
            before = at_stage(stage, plan)
            targets.append(
                Target(
                    f"{label} device asked to {stage}",
                    requests[:1],
                    partial(_answer, before, client, type(request)),
                    PeerProtocolError,
                    relatives=requests[1:],
                    also=(RoundAbortedError,),
                    share=2,
                )
            )
        if stage != "upload":  # a sum is added to in place: its state takes one input
            targets.append(
                Target(
                    f"{label} coordinator answered to {stage}",
                    replies[:1],
                    partial(_receive, round_, client, type(round_.replies[client])),
                    PeerProtocolError,
                    relatives=replies[1:],
                    share=2,
                )
            )
    return targets


def _answer(round_: Rehearsal, client: int, kind: type, data: bytes) -> object:
    return round_.answer(client, decode(data, kind, round_.plan))


def _receive(round_: Rehearsal, client: int, kind: type[Reply], data: bytes) -> object:
    return round_.receive(client, decode(data, kind, round_.plan))


def _stored() -> list[Target]:
    """What a device reads back between two messages."""
    corpus = set()
    for plan in (OPEN, SIGNED):
        for stage in stages_of(plan):
            corpus |= {dump_state(state) for state in at_stage(stage, plan).states.values()}
        corpus |= {dump_state(state) for state in whole_round(plan, GONE).states.values()}
    return [Target("stored state", sorted(corpus), load_state, LocalProtocolError, dump_state)]


def _plans() -> list[Target]:
    """The public parameters."""
    runs = (
        round_plan(),
        round_plan(private_plan()),
        round_plan(private_plan(secagg=Bonawitz(authority="ab" * 32)), clients=50, attempt=2),
        round_plan(private_plan(secagg=NoSecAgg())),
        round_plan(private_plan(secagg=SeedHelper(public_key="cd" * 32))),
        round_plan(
            private_plan(),
            buffer=Buffer(versions=("ab" * 32, "cd" * 32), staleness=(0, 0, 1, 1, 0)),
        ),
        round_plan(private_plan(shares=ByClass(widths=(0.5, 1.0), steps=(1.0, 1.0)))),
    )
    plans = (OPEN, SIGNED, complete_plan(40, neighbours=12, threshold=7))
    return [
        Target(
            "round plan",
            [plan.to_bytes() for plan in runs],
            RoundPlan.from_bytes,
            PeerProtocolError,
            RoundPlan.to_bytes,
            text=True,
        ),
        Target(
            "plan",
            [plan.to_bytes() for plan in plans],
            Plan.from_bytes,
            ConfigurationError,
            Plan.to_bytes,
        ),
    ]


def _helper() -> list[Target]:
    """What goes to the seed helper and comes back, and its service behind the decoders."""
    key = KeyPair.generate(ENTROPY.child("helper"), "helper-key")
    plan = HelperPlan(4, 2, 12, 9, context=bytes(range(32)), helper_key=key.public)
    digest = plan.digest()
    sealed = [seal_seed(ENTROPY.draw(f"seed {i}", 32), digest, i, key.public) for i in range(4)]
    boxes = [SeedBox(i, box).to_bytes() for i, box in enumerate(sealed)]
    for client in (0, 1):
        voucher = Voucher.make(identity_of(client), digest, client, sealed[client])
        boxes.append(SeedBox(client, sealed[client], voucher).to_bytes())
    closes = [CloseRequest(digest, frozenset(who)).to_bytes() for who in ({0, 1, 2, 3}, {1, 3})]
    sums = [MaskSum(digest, plan.ring.reduce(np.arange(9) * i)).to_bytes(plan) for i in (1, 777)]
    filled = open_round(plan, key)
    for box in boxes[:4]:
        filled = filled.on_box(SeedBox.from_bytes(box), now=NOW)
    target = partial(Target, error=PeerProtocolError)
    return [
        Target(
            "helper plan",
            [plan.to_bytes()],
            HelperPlan.from_bytes,
            ConfigurationError,
            HelperPlan.to_bytes,
        ),
        target("seed box", boxes, SeedBox.from_bytes, encode=SeedBox.to_bytes),
        target("close request", closes, CloseRequest.from_bytes, encode=CloseRequest.to_bytes),
        target(
            "mask sum",
            sums,
            lambda data: MaskSum.from_bytes(data, plan),
            encode=lambda value: value.to_bytes(plan),
        ),
        target(
            "sealed seed",
            sealed[:1],
            lambda data: unseal_seed(data, digest, 0, key.secret),
            relatives=sealed[1:],
            share=2,
        ),
        target(
            "helper asked to open",
            [plan.to_bytes()],
            lambda data: _helper_rounds(key).open(data, "coordinator"),
        ),
        target(
            "helper given a box",
            boxes,
            lambda data: _opened(key, plan).deposit(digest, data, "coordinator"),
            share=2,
        ),
        target(
            "helper asked to close",
            closes,
            lambda data: filled.close(CloseRequest.from_bytes(data).survivors),
            also=(RoundAbortedError,),
        ),
    ]


def _helper_rounds(key: KeyPair) -> HelperRounds:
    return HelperRounds(key, AnsweredInMemory(), now=lambda: 0.0)


def _opened(key: KeyPair, plan: HelperPlan) -> HelperRounds:
    rounds = _helper_rounds(key)
    rounds.open(plan.to_bytes(), "coordinator")
    return rounds


def _parts() -> list[Target]:
    """What messages are made of."""
    certificates = [identity_of(client).certificate.to_bytes() for client in range(3)]
    certificates.append(enroll(identity_of(0).key, "x" * 64, expires_at=1).certificate.to_bytes())
    box = seal(bytes(32), b"s" * 72, direction=0, associated=b"who")
    (shares,) = split([bytes(range(32))], [1, 2, 3], 3, ENTROPY.child("shares"))
    packings = [
        _packed(Ring(bits), dim)
        for bits, dim in ((1, 9), (3, 7), (8, 5), (12, 9), (31, 4), (64, 2))
    ]
    return [
        Target(
            "certificate",
            certificates,
            Certificate.from_bytes,
            PeerProtocolError,
            Certificate.to_bytes,
        ),
        Target(
            "credential",
            [Credential.of_node(identity_of(0), 7).to_bytes()],
            Credential.from_bytes,
            PeerProtocolError,
            Credential.to_bytes,
        ),
        Target(
            "box of shares",
            [box],
            lambda data: unseal(bytes(32), data, direction=0, associated=b"who"),
            PeerProtocolError,
        ),
        Target("shares", [b"".join(shares)], _combined, PeerProtocolError),
        *packings,
    ]


def _packed(ring: Ring, dim: int) -> Target:
    x = ring.reduce(np.arange(1, dim + 1) * 0x1234567)
    return Target(
        f"{dim} elements of {ring.bits} bits",
        [pack(x, ring), pack(ring.zeros(dim), ring)],
        lambda data: unpack(data, dim, ring),
        PeerProtocolError,
        lambda value: pack(value, ring),
        share=2,
    )


def _combined(data: bytes) -> bytes:
    shares = [data[at : at + 36] for at in range(0, len(data), 36)]
    return combine(dict(enumerate(shares, start=1)), 3)


def _envelope() -> Target:
    """A record as Flower hands it over: names, and values of any type."""
    plan = round_plan().to_bytes().decode("ascii")
    records = [
        {"stage": stage, "round": 3, "label": "device-1", "plan": {"bytes": plan},
         "message": {"bytes": "fC"}, "weight-key": "num-examples", "counted": 2}
        for stage in ("advertise", "share", "reveal")
    ]  # fmt: skip
    return Target(
        "envelope",
        [json.dumps(record).encode() for record in records],
        _read_envelope,
        PeerProtocolError,
        text=True,
    )


def _read_envelope(data: bytes) -> Envelope:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PeerProtocolError from error
    if not isinstance(document, dict):
        raise PeerProtocolError
    fields = {
        name: str(value["bytes"]).encode("utf-8", "surrogatepass")
        if isinstance(value, dict) and "bytes" in value
        else value
        for name, value in document.items()
    }
    return Envelope.from_fields(fields)
