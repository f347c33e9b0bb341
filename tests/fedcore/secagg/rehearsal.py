"""A round that a test can stop between any two messages, look into and tamper with.

`Rehearsal` drives the real states of both ends, one stage at a time. With a plan that
names an authority its clients are enrolled, sign their keys and endorse the survivors.
`refusal` is `pytest.raises` that also searches the error, and every error behind it,
for secrets.
"""

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pytest

from fedcore.crypto import Entropy, ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.secagg import (
    Certificate,
    ClientState,
    Identity,
    Outcome,
    Plan,
    encode,
    invite,
    join,
    roster_digest,
    step,
)
from fedcore.secagg.messages import Invitation, Reply, Request
from fedcore.secagg.plan import NOBODY
from fedcore.secagg.server import (
    AwaitingAdvertisements,
    AwaitingEndorsements,
    AwaitingInputs,
    AwaitingReveals,
    AwaitingShares,
    ServerState,
)

RECEIVE = {
    AwaitingAdvertisements: AwaitingAdvertisements.on_advertisement,
    AwaitingShares: AwaitingShares.on_shares,
    AwaitingInputs: AwaitingInputs.on_input,
    AwaitingEndorsements: AwaitingEndorsements.on_endorsement,
    AwaitingReveals: AwaitingReveals.on_reveal,
}
STAGES = ("advertise", "share", "upload", "endorse", "reveal")
# Key material looks like one of these: a long hexadecimal word, or the repr of bytes. Only
# the beginning of a public key may be printed, by the name of what it is.
SECRET_LOOKING = re.compile(r"(?<!public key )[0-9a-fA-F]{16}|\\x[0-9a-f]{2}")
ROOT = SigningKey.generate(ReplayedEntropy(b"the root that enrolls"))
AUTHORITY = ROOT.public.raw
NOW, EXPIRY = 1_800_000_000, 1_900_000_000


def complete_plan(clients: int = 5, **changes: object) -> Plan:
    """A complete graph with the lowest threshold, 6 coordinates of 16 bits."""
    values = {
        "clients": clients,
        "neighbours": clients - 1,
        "threshold": (clients - 1) // 2 + 1,
        "minimum_survivors": 2,
        "ring_bits": 16,
        "dim": 6,
    }
    return Plan(**(values | changes))


def signed_plan(clients: int = 5, **changes: object) -> Plan:
    """`complete_plan`, whose clients `ROOT` enrolled."""
    return seated(complete_plan(clients, **({"authority": AUTHORITY} | changes)))


def seated(plan: Plan) -> Plan:
    """`plan` for the devices that rehearsals have, if it is for enrolled ones."""
    return replace(plan, roster=roster_digest(keys_of(plan))) if plan.authenticated else plan


def keys_of(plan: Plan) -> tuple[bytes, ...]:
    """The identity keys of its clients."""
    count = plan.clients if plan.authenticated else 0
    return tuple(identity_of(client).certificate.key for client in range(count))


def enroll(
    key: SigningKey, name: str = "device", root: SigningKey = ROOT, expires_at: int = EXPIRY
) -> Identity:
    """What `root` gives the device that holds `key`."""
    certificate = Certificate.issue(root, name=name, key=key.public.raw, expires_at=expires_at)
    return Identity(certificate, key)


@lru_cache(maxsize=256)
def identity_of(client: int) -> Identity:
    """The identity that `client` has in every rehearsal, whatever its size."""
    return enroll(_keys_by_rank()[client], f"device-{client}")


@lru_cache
def _keys_by_rank() -> list[SigningKey]:
    """So many keys that the first of them have the same ranks in every rehearsal."""
    keys = [SigningKey.generate(ReplayedEntropy(b"device %d" % number)) for number in range(256)]
    return sorted(keys, key=lambda key: key.public.raw)


def stages_of(plan: Plan) -> tuple[str, ...]:
    """The stages of a round: only identities can endorse."""
    return tuple(name for name in STAGES if name != "endorse" or plan.authenticated)


@dataclass
class Rehearsal:
    """One round; `advance` plays a stage, and leaves what was said in `log`."""

    plan: Plan
    entropy: Entropy = field(default_factory=lambda: ReplayedEntropy(b"rehearsal"))
    vectors: Mapping[int, np.ndarray] = field(default_factory=dict)
    identities: dict[int, Identity] = field(default_factory=dict)
    states: dict[int, ClientState] = field(default_factory=dict)
    replies: dict[int, Reply] = field(default_factory=dict)
    log: list[tuple[int, Request | Reply]] = field(default_factory=list)
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.server: ServerState
        self.requests: dict[int, Request]
        if self.plan.roster == NOBODY:
            self.plan = seated(self.plan)
        self.server, self.requests = invite(self.plan, keys_of(self.plan))
        if not self.vectors:
            self.vectors = {
                client: self.plan.ring.reduce(np.arange(self.plan.dim) + 100 * client)
                for client in range(self.plan.clients)
            }
        if self.plan.authenticated and not self.identities:
            self.identities = {client: identity_of(client) for client in range(self.plan.clients)}

    def answer(self, client: int, request: Request) -> tuple[ClientState, Reply]:
        """What `client` would do; nothing is recorded, so a test may ask twice."""
        entropy = self.entropy.child(f"client={client}")
        identity = self.identities.get(client)
        if isinstance(request, Invitation):
            return join(request, entropy, identity=identity, now=NOW)
        return step(
            self.states[client],
            request,
            entropy=entropy,
            vector=self.vectors[client].copy(),  # a step overwrites it
            identity=identity,
            now=NOW,
        )

    def listen(self, absent: frozenset[int] | set[int] = frozenset()) -> "Rehearsal":
        """Let the clients answer; the server has not heard them yet."""
        self.replies = {}
        for client, request in self.requests.items():
            self.log.append((client, request))
            if client not in absent:
                self.states[client], self.replies[client] = self.answer(client, request)
                self.log.append((client, self.replies[client]))
        return self

    def receive(self, client: int, message: Reply) -> ServerState:
        """The server's state after `message`; nothing is recorded."""
        receive = RECEIVE[type(self.server)]
        if isinstance(self.server, AwaitingAdvertisements):
            return receive(self.server, client, message, NOW)
        return receive(self.server, client, message)

    def hear(self, *, backwards: bool = False) -> "Rehearsal":
        """Let the server take the answers and close the stage."""
        for client in sorted(self.replies, reverse=backwards):
            self.server = self.receive(client, self.replies[client])
        endorsing = self.plan.authenticated and isinstance(self.server, AwaitingInputs)
        closed = self.server.endorse() if endorsing else self.server.close()
        if isinstance(closed, Outcome):
            self.outcome = closed
        else:
            self.server, self.requests = closed
        return self

    def advance(
        self, until: str | None = None, absent: Mapping[int, str] | None = None, **order: bool
    ) -> "Rehearsal":
        """Play from where we are until the requests of stage `until` lie ready, or to the end."""
        start = list(RECEIVE).index(type(self.server))
        for name in STAGES[start : None if until is None else STAGES.index(until)]:
            if name not in stages_of(self.plan):
                continue
            gone = {
                client
                for client, since in (absent or {}).items()
                if STAGES.index(since) <= STAGES.index(name)
            }
            self.listen(gone).hear(**order)
        return self

    def transcript(self) -> list[bytes]:
        return [encode(message, self.plan) for _, message in self.log]


def whole_round(
    plan: Plan,
    absent: Mapping[int, str] | None = None,
    *,
    backwards: bool = False,
    **fields: object,
) -> Rehearsal:
    """All stages."""
    return Rehearsal(plan, **fields).advance(absent=absent, backwards=backwards)


def at_stage(stage: str, plan: Plan | None = None, **absent: str) -> Rehearsal:
    """A round whose requests of `stage` lie ready; `absent` is spelled c3="upload".

    To have a stage "endorse" the plan must name an authority.
    """
    gone = {int(name[1:]): since for name, since in absent.items()}
    return Rehearsal(plan or complete_plan()).advance(stage, gone)


@contextmanager
def refusal(
    error: type[Exception], match: str | None = None
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """`pytest.raises`, for errors that give nothing away."""
    with pytest.raises(error, match=match) as caught:
        yield caught
    link: BaseException | None = caught.value
    while link is not None:
        assert not SECRET_LOOKING.search(f"{link!s} {link!r} {link.args!r}")
        link = link.__cause__ or link.__context__


def numbers(*values: int) -> bytes:
    """Little-endian words of four bytes, as the wire has them."""
    return struct.pack(f"<{len(values)}I", *values)


def mutations(seed: bytes, count: int, rng: np.random.Generator, keep: int = 4) -> Iterator[bytes]:
    """`count` descendants of `seed`: flipped, cut, extended, spliced, overwritten, random."""
    edges = [0, 1, 2, 4, 5, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 2**31, 2**32 - 1]
    for _ in range(count):
        data = bytearray(seed)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, len(data) + 1))
            match int(rng.integers(0, 7)):
                case 0 if at < len(data):
                    data[at] ^= 1 << int(rng.integers(0, 8))
                case 1:
                    del data[at:]
                case 2:
                    data += rng.bytes(int(rng.integers(1, 40)))
                case 3:
                    data[at : at + 4] = numbers(edges[rng.integers(0, len(edges))])
                case 4:
                    start = int(rng.integers(0, len(data) + 1))
                    data[at:at] = data[start : start + int(rng.integers(1, 100))]
                case 5:
                    del data[at : at + int(rng.integers(1, 100))]
                case _:
                    data[keep:] = rng.bytes(int(rng.integers(0, 200)))
        yield bytes(data)
