"""The three messages of a round with a seed helper, and their canonical bytes.

    SeedBox        client > coordinator > helper    one sealed seed
    CloseRequest   coordinator > helper             whose masks to add up
    MaskSum        helper > coordinator             the sum of those masks

    message     = magic(2) version(1) kind(1) body
    SeedBox     = client(u32) sealed(80) vouched(u8: 0 or 1) [certificate signature(64)]
    CloseRequest = digest(32) count(u32) { client(u32) }       strictly increasing
    MaskSum     = digest(32) packed vector

A decoder returns a message or raises `PeerProtocolError`, never anything else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from fedcore.crypto import DIGEST_BYTES, transcript_hash
from fedcore.errors import PeerProtocolError
from fedcore.ring import pack, packed_size, unpack
from fedcore.secagg.fields import Reader, write_set, write_u32
from fedcore.secagg.identity import SIGNATURE_BYTES, Certificate, Identity, verify
from fedcore.secagg.plan import MOST_CLIENTS
from fedcore.secagg.seed_helper.plan import HelperPlan
from fedcore.secagg.seed_helper.sealing import SEALED_BYTES
from fedcore.vectors import RingVector

_HEADER_BYTES: Final = 4
_BOX: Final = b"fC\x01\x21"
_CLOSE: Final = b"fC\x01\x22"
_SUM: Final = b"fC\x01\x23"


@dataclass(frozen=True, slots=True)
class Voucher:
    """A certified device's word that a box is its own.

    Attributes:
        certificate: Of the device.
        signature: Over round, client and sealed seed, 64 bytes.
    """

    certificate: Certificate
    signature: bytes

    @classmethod
    def make(cls, identity: Identity, digest: bytes, client: int, sealed: bytes) -> Voucher:
        """Sign for one round and client."""
        statement = _statement(digest, client, sealed)
        return cls(identity.certificate, identity.key.sign(statement))

    def check(
        self, digest: bytes, client: int, sealed: bytes, *, authority: bytes, now: int
    ) -> None:
        """Accept a signature of a device that `authority` certified.

        Args:
            digest: Of the plan.
            client: Whose box it is.
            sealed: The sealed seed.
            authority: The root's public key, 32 bytes, as pinned by the helper.
            now: Unix time in seconds.

        Raises:
            PeerProtocolError: Not certified, expired, or signed for something else.
        """
        self.certificate.check(authority, now)
        statement = _statement(digest, client, sealed)
        verify(self.certificate.key, statement, self.signature, f"the box of client {client}")


@dataclass(frozen=True, slots=True)
class SeedBox:
    """One client's seed, readable by the helper only.

    Attributes:
        client: Index in the plan.
        sealed: 80 bytes, see `sealing`.
        voucher: None where the helper does not ask who a client is.
    """

    client: int
    sealed: bytes
    voucher: Voucher | None = None

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        head = _BOX + write_u32(self.client) + self.sealed
        if self.voucher is None:
            return head + b"\x00"
        certificate = self.voucher.certificate.to_bytes()
        return head + b"\x01" + certificate + self.voucher.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> SeedBox:
        """Return the box that `data` encodes; nothing in it is checked yet.

        Raises:
            PeerProtocolError: `data` is not canonical.
        """
        reader = _open(data, _BOX, "a SeedBox")
        client = reader.u32()
        if client >= MOST_CLIENTS:
            msg = f"a client's index must be below {MOST_CLIENTS}, found {client}"
            raise PeerProtocolError(msg)
        sealed, (vouched,) = reader.take(SEALED_BYTES), reader.take(1)
        if vouched > 1:
            msg = f"a box is vouched for (1) or not (0), found {vouched}"
            raise PeerProtocolError(msg)
        voucher = None
        if vouched:
            certificate = Certificate.read(reader)
            voucher = Voucher(certificate, reader.take(SIGNATURE_BYTES))
        reader.end("a SeedBox")
        return cls(client, sealed, voucher)


@dataclass(frozen=True, slots=True)
class CloseRequest:
    """Whose masked input is in the coordinator's total.

    Attributes:
        digest: Of the plan, 32 bytes.
        survivors: Indices in the plan.
    """

    digest: bytes
    survivors: frozenset[int]

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        return _CLOSE + self.digest + write_set(self.survivors)

    @classmethod
    def from_bytes(cls, data: bytes) -> CloseRequest:
        """Return the request that `data` encodes.

        Raises:
            PeerProtocolError: `data` is not canonical.
        """
        reader = _open(data, _CLOSE, "a CloseRequest")
        request = cls(reader.take(DIGEST_BYTES), frozenset(reader.map(lambda: None)))
        reader.end("a CloseRequest")
        return request


@dataclass(frozen=True, slots=True)
class MaskSum:
    """What the survivors' masks add up to.

    Attributes:
        digest: Of the plan, 32 bytes.
        vector: Shape [plan.dim], elements of the plan's ring.
    """

    digest: bytes
    vector: RingVector = field(repr=False)

    def to_bytes(self, plan: HelperPlan) -> bytes:
        """Return the canonical encoding, of `size(plan)` bytes."""
        return _SUM + self.digest + pack(self.vector, plan.ring)

    @classmethod
    def size(cls, plan: HelperPlan) -> int:
        """Return how many bytes a sum of this round takes."""
        return _HEADER_BYTES + DIGEST_BYTES + packed_size(plan.dim, plan.ring_bits)

    @classmethod
    def from_bytes(cls, data: bytes, plan: HelperPlan) -> MaskSum:
        """Return the sum that `data` encodes.

        Raises:
            PeerProtocolError: `data` is not canonical, or belongs to another round.
        """
        reader = _open(data, _SUM, "a MaskSum")
        digest = reader.take(DIGEST_BYTES)
        if digest != plan.digest():
            msg = f"expected the masks of round {plan.digest().hex()[:12]}, found another round's"
            raise PeerProtocolError(msg)
        return cls(digest, unpack(reader.rest(), plan.dim, plan.ring))


def _open(data: bytes, header: bytes, what: str) -> Reader:
    if data[:_HEADER_BYTES] != header:
        found = data[:_HEADER_BYTES].hex()
        msg = f"expected {what} (header {header.hex()}), found {found or 'nothing'}"
        raise PeerProtocolError(msg)
    return Reader(data, _HEADER_BYTES)


def _statement(digest: bytes, client: int, sealed: bytes) -> bytes:
    return transcript_hash("fedcore/v1/helper-box", digest, write_u32(client), sealed)
