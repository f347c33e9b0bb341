"""Who a client is: certificates of a root that the devices pin.

A coordinator that could invent clients could surround a victim with its own and read
the victim's input out of the sum. So every device has an Ed25519 identity (RFC 8032),
enrolled by a root key that the coordinator does not hold: the root signs a certificate
over the device's name, key and date of expiry. Devices pin the root's public key and
accept no key of a round that is not signed by a certified identity.

    certificate = name length(1) name key(32) expires_at(8) signature(64)

[BIK+17, section 6.2] calls this the public key infrastructure.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from fedcore.crypto import transcript_hash
from fedcore.crypto.signatures import SigningKey, VerifyKey
from fedcore.errors import ConfigurationError, PeerProtocolError, VerificationError
from fedcore.secagg.fields import Reader
from fedcore.secagg.seating import IDENTITY_BYTES

SIGNATURE_BYTES: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIME_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Certificate:
    """The root's word that a key belongs to a device.

    Attributes:
        name: Of the device: letters, digits, dot, dash, underscore; at most 64.
        key: Its Ed25519 public key, 32 bytes.
        expires_at: Unix time in seconds, UTC; not valid from then on.
        signature: Of the root, 64 bytes.
    """

    name: str
    key: bytes
    expires_at: int
    signature: bytes

    @classmethod
    def issue(cls, root: SigningKey, *, name: str, key: bytes, expires_at: int) -> Certificate:
        """Return a certificate signed by `root`.

        Raises:
            ConfigurationError: The name, key or date is malformed.
        """
        if not _NAME.fullmatch(name):
            msg = (
                "a device's name must be 1 to 64 letters, digits, dots, dashes or underscores, "
                f"got {name!r:.80}"
            )
            raise ConfigurationError(msg)
        if len(key) != IDENTITY_BYTES or not 0 < expires_at < 1 << 62:
            msg = (
                f"an identity key must be {IDENTITY_BYTES} bytes and expires_at a Unix time, "
                f"got {len(key)} bytes and {expires_at}"
            )
            raise ConfigurationError(msg)
        return cls(name, key, expires_at, root.sign(_statement(name, key, expires_at)))

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        name = self.name.encode("ascii")
        time = self.expires_at.to_bytes(_TIME_BYTES, "little")
        return bytes((len(name),)) + name + self.key + time + self.signature

    @classmethod
    def read(cls, reader: Reader) -> Certificate:
        """Return the next certificate of `reader`; its signature is not checked yet.

        Raises:
            PeerProtocolError: It is malformed.
        """
        (size,) = reader.take(1)
        name = reader.take(size).decode("latin-1")
        if not _NAME.fullmatch(name):
            msg = "a certificate's name must be 1 to 64 letters, digits, dots, dashes, underscores"
            raise PeerProtocolError(msg)
        key = reader.take(IDENTITY_BYTES)
        expires_at = int.from_bytes(reader.take(_TIME_BYTES), "little")
        return cls(name, key, expires_at, reader.take(SIGNATURE_BYTES))

    @classmethod
    def from_bytes(cls, data: bytes) -> Certificate:
        """Return the certificate that `data` encodes, and nothing else.

        Raises:
            PeerProtocolError: It is malformed.
        """
        reader = Reader(data)
        certificate = cls.read(reader)
        reader.end("a certificate")
        return certificate

    def check(self, authority: bytes, now: int) -> None:
        """Accept only what the pinned root signed and what has not expired.

        Args:
            authority: The root's public key, 32 bytes, as pinned by the device.
            now: Unix time in seconds.

        Raises:
            PeerProtocolError: Signed by somebody else, altered, or expired.
        """
        if now >= self.expires_at:
            msg = (
                f"the certificate of {self.name} expired at {self.expires_at}, it is {now}: "
                "enroll the device again"
            )
            raise PeerProtocolError(msg)
        statement = _statement(self.name, self.key, self.expires_at)
        if not is_certified(authority, statement, self.signature):
            msg = f"the certificate of {self.name} is not signed by the key it must be signed by"
            raise PeerProtocolError(msg)


@dataclass(frozen=True, slots=True)
class Identity:
    """What an enrolled device has: its certificate, and the secret key to it."""

    certificate: Certificate
    key: SigningKey = field(repr=False)

    def __post_init__(self) -> None:
        if self.key.public.raw != self.certificate.key:
            msg = "the secret key must belong to the certificate's key: enroll the device again"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Credential:
    """Proof that something is a device's own: the keys of an advertisement, or a node.

    Attributes:
        certificate: Of the device.
        signature: Of its identity key, 64 bytes: over the round, its index and both keys, or
            over the number of its node.
    """

    certificate: Certificate
    signature: bytes

    @classmethod
    def sign(
        cls, identity: Identity, *, digest: bytes, client: int, mask_key: bytes, share_key: bytes
    ) -> Credential:
        """Return the credential of `client` for its two public keys in this round."""
        statement = _advertised(digest, client, mask_key, share_key)
        return cls(identity.certificate, identity.key.sign(statement))

    def check(self, *, digest: bytes, client: int, mask_key: bytes, share_key: bytes) -> None:
        """Check the signature; the certificate is checked on its own.

        Raises:
            PeerProtocolError: It is for other keys, another client or another round.
        """
        verify(
            self.certificate.key,
            _advertised(digest, client, mask_key, share_key),
            self.signature,
            f"the advertisement of client {client}",
        )

    @classmethod
    def of_node(cls, identity: Identity, node_id: int) -> Credential:
        """Return the proof that the device with this identity runs the node `node_id`."""
        return cls(identity.certificate, identity.key.sign(_node(node_id)))

    def check_node(self, node_id: int, authority: bytes, now: int) -> None:
        """Accept a node only of a device that the authority enrolled.

        Certificates are seen by neighbours: without the signature, whoever has seen one
        could answer with it and take its owner's place.

        Raises:
            PeerProtocolError: Not certified, expired, or signed for another node.
        """
        self.certificate.check(authority, now)
        verify(self.certificate.key, _node(node_id), self.signature, f"the answer of {node_id}")

    def to_bytes(self) -> bytes:
        """Return the canonical encoding: the certificate, then the signature."""
        return self.certificate.to_bytes() + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> Credential:
        """Return the credential that `data` encodes, and nothing else.

        Raises:
            PeerProtocolError: It is malformed.
        """
        reader = Reader(data)
        credential = cls.read(reader)
        reader.end("a credential")
        return credential

    @classmethod
    def read(cls, reader: Reader) -> Credential:
        """Return the next credential of `reader`; nothing is checked yet.

        Raises:
            PeerProtocolError: It is malformed.
        """
        return cls(Certificate.read(reader), reader.take(SIGNATURE_BYTES))


def survivors_statement(digest: bytes, survivors: Collection[int]) -> bytes:
    """Return what a client signs to endorse a set of survivors."""
    return transcript_hash(
        "fedcore/v1/survivors",
        digest,
        b"".join(client.to_bytes(4, "little") for client in sorted(survivors)),
    )


def verify(key: bytes, message: bytes, signature: bytes, what: str) -> None:
    """Check an Ed25519 signature.

    Raises:
        PeerProtocolError: It does not fit; `what` says whose it was to be.
    """
    try:
        VerifyKey(key).verify(message, signature)
    except (VerificationError, ValueError) as error:
        msg = f"{what} is not signed by the key it must be signed by"
        raise PeerProtocolError(msg) from error


@lru_cache(maxsize=8192)
def is_certified(authority: bytes, statement: bytes, signature: bytes) -> bool:
    """Tell what `is_signed` tells, and remember: certificates are the same in every round."""
    return is_signed(authority, statement, signature)


def is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    """Tell whether `signature` was made for `message` by the owner of `key`."""
    try:
        verify(key, message, signature, "the message")
    except PeerProtocolError:
        return False
    return True


def _statement(name: str, key: bytes, expires_at: int) -> bytes:
    return transcript_hash(
        "fedcore/v1/certificate",
        name.encode("ascii"),
        key,
        expires_at.to_bytes(_TIME_BYTES, "little"),
    )


def _node(node_id: int) -> bytes:
    return transcript_hash("fedcore/v1/node", node_id.to_bytes(8, "little"))


def _advertised(digest: bytes, client: int, mask_key: bytes, share_key: bytes) -> bytes:
    return transcript_hash(
        "fedcore/v1/advertisement", digest, client.to_bytes(4, "little"), mask_key, share_key
    )
