"""The public parameters of one secure aggregation round.

Every client checks a plan before it joins, and every key of the round is derived
from its digest: two clients that were told different things share no key, and
what they upload stays noise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from fedcore.crypto import DIGEST_BYTES, transcript_hash
from fedcore.errors import ConfigurationError
from fedcore.ring import Ring
from fedcore.secagg.graph import neighbourhood
from fedcore.secagg.parameters import Threat, choose_degree

PROTOCOL_VERSION: Final = 2
SUITE: Final = 1
"""X25519, HKDF-SHA256, AES-256-CTR, AES-256-GCM, Ed25519, Shamir over 65521: the only one."""
MOST_CLIENTS: Final = 65_520
"""Evaluation points of the secret sharing."""
NOBODY: Final = bytes(DIGEST_BYTES)
"""In place of an authority and of a roster: the round is not authenticated."""
_KEYS_BYTES: Final = 3 * DIGEST_BYTES
_FORMAT: Final = struct.Struct("<HHIIIIBQ")


@dataclass(frozen=True, slots=True)
class Plan:
    """What all parties of a round agree on.

    Attributes:
        clients: Number invited; they are called 0..clients-1.
        neighbours: Degree of the graph: even, or clients - 1.
        threshold: Shares that reconstruct a secret; more than half of `neighbours`,
            so that two contradictory requests cannot both be answered.
        minimum_survivors: A sum over fewer clients is never revealed.
        ring_bits: Entries are added modulo 2^ring_bits.
        dim: Length of the vectors.
        context: 32 bytes that bind the run, round, attempt, codec and model.
        authority: Public key of the root that enrolled the clients, 32 bytes; zeros for
            a simulation, in which nobody signs anything.
        roster: Hash of the invited devices' identity keys, from which their indices follow,
            32 bytes (see `fedcore.secagg.seating`); zeros until they are known. No list
            has that hash, so no enrolled device joins.

    Raises:
        ConfigurationError: The values contradict each other.
    """

    clients: int
    neighbours: int
    threshold: int
    minimum_survivors: int
    ring_bits: int
    dim: int
    context: bytes = bytes(DIGEST_BYTES)
    authority: bytes = NOBODY
    roster: bytes = NOBODY

    def __post_init__(self) -> None:
        if not 2 <= self.clients <= MOST_CLIENTS:
            msg = f"secagg.clients must be in 2..{MOST_CLIENTS}, got {self.clients}"
            raise ConfigurationError(msg)
        if self.neighbours != self.clients - 1 and (
            self.neighbours % 2 or not 2 <= self.neighbours < self.clients
        ):
            msg = (
                f"secagg.neighbours must be even and below {self.clients}, or "
                f"{self.clients - 1} for the complete graph, got {self.neighbours}"
            )
            raise ConfigurationError(msg)
        if not self.neighbours < 2 * self.threshold <= 2 * self.neighbours:
            msg = (
                f"secagg.threshold must be more than half of {self.neighbours} neighbours "
                f"and at most all of them, got {self.threshold}"
            )
            raise ConfigurationError(msg)
        if not 2 <= self.minimum_survivors <= self.clients:
            msg = (
                f"secagg.minimum_survivors must be in 2..{self.clients}, "
                f"got {self.minimum_survivors}"
            )
            raise ConfigurationError(msg)
        Ring(self.ring_bits)
        if not 1 <= self.dim < 1 << 40:
            msg = f"secagg.dim must be positive and below 2^40, got {self.dim}"
            raise ConfigurationError(msg)
        for name in ("context", "authority", "roster"):
            if len(getattr(self, name)) != DIGEST_BYTES:
                msg = f"secagg.{name} must be {DIGEST_BYTES} bytes, got {len(getattr(self, name))}"
                raise ConfigurationError(msg)
        if self.roster != NOBODY and not self.authenticated:
            msg = "secagg.roster names certified devices: name their secagg.authority too"
            raise ConfigurationError(msg)

    @property
    def authenticated(self) -> bool:
        """Whether clients sign their keys and agree on the survivors."""
        return self.authority != NOBODY

    @property
    def ring(self) -> Ring:
        """Where the entries live."""
        return Ring(self.ring_bits)

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        return (
            self.context
            + self.authority
            + self.roster
            + _FORMAT.pack(
                PROTOCOL_VERSION,
                SUITE,
                self.clients,
                self.neighbours,
                self.threshold,
                self.minimum_survivors,
                self.ring_bits,
                self.dim,
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """Return the plan that `data` encodes.

        Raises:
            ConfigurationError: Wrong length, version or suite, or values out of range.
        """
        if len(data) != _KEYS_BYTES + _FORMAT.size:
            msg = f"a plan takes {_KEYS_BYTES + _FORMAT.size} bytes, found {len(data)}"
            raise ConfigurationError(msg)
        version, suite, clients, neighbours, threshold, minimum, bits, dim = _FORMAT.unpack(
            data[_KEYS_BYTES:]
        )
        if version != PROTOCOL_VERSION:
            msg = (
                f"expected protocol version {PROTOCOL_VERSION}, found {version}: "
                "update the older side"
            )
            raise ConfigurationError(msg)
        if suite != SUITE:
            msg = f"expected suite {SUITE}, found {suite}: there is no other in this version"
            raise ConfigurationError(msg)
        starts = range(0, _KEYS_BYTES, DIGEST_BYTES)
        hashes = (data[start : start + DIGEST_BYTES] for start in starts)
        return cls(clients, neighbours, threshold, minimum, bits, dim, *hashes)

    def digest(self) -> bytes:
        """Return the 32 bytes from which every key of the round is derived."""
        return transcript_hash("fedcore/v1/secagg-plan", self.to_bytes())

    def neighbours_of(self, client: int) -> frozenset[int]:
        """Return with whom `client` shares its secrets."""
        return neighbourhood(client, self.clients, self.neighbours, self.digest())


def make_plan(
    clients: int,
    dim: int,
    ring_bits: int,
    *,
    threat: Threat | None = None,
    minimum_survivors: int | None = None,
    context: bytes = bytes(DIGEST_BYTES),
    authority: bytes = NOBODY,
    roster: bytes = NOBODY,
) -> Plan:
    """Return the plan for a cohort; graph and threshold follow from `threat`.

    Args:
        clients: Number invited.
        dim: Length of the vectors.
        ring_bits: Entries are added modulo 2^ring_bits.
        threat: What to withstand; the defaults of `Threat` if None.
        minimum_survivors: Default: as many as `threat.dropout` leaves.
        context: 32 bytes that bind the rest of the round.
        authority: Public key of the root that enrolled the clients, 32 bytes.
        roster: Hash of the list of their identity keys, 32 bytes.

    Raises:
        ConfigurationError: No parameters withstand `threat` with so many clients.

    Example:
        >>> plan = make_plan(clients=20, dim=1000, ring_bits=16)
        >>> plan.neighbours, plan.threshold, plan.minimum_survivors
        (19, 11, 18)
    """
    threat = threat or Threat()
    degree = choose_degree(clients, threat)
    if minimum_survivors is None:
        minimum_survivors = max(2, clients - int(threat.dropout * clients))
    return Plan(
        clients=clients,
        neighbours=degree.neighbours,
        threshold=degree.threshold,
        minimum_survivors=minimum_survivors,
        ring_bits=ring_bits,
        dim=dim,
        context=context,
        authority=authority,
        roster=roster,
    )
