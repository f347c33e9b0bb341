"""X25519 key agreement (RFC 7748) followed by HKDF-SHA256 (RFC 5869).

The shared point is never used itself. Two keys that were agreed for different
contexts, e.g. for two rounds, for two models or for two purposes, are
independent, because the context is the salt and the purpose is the info string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcore.crypto.entropy import Entropy
from fedcore.errors import PeerProtocolError

KEY_BYTES = 32
_ANY_SECRET = bytes(range(KEY_BYTES))


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An ephemeral X25519 key pair.

    Attributes:
        secret: 32 bytes.
        public: 32 bytes.
    """

    secret: bytes = field(repr=False)
    public: bytes

    @classmethod
    def generate(cls, entropy: Entropy, purpose: str) -> KeyPair:
        """Return a fresh pair from 32 bytes of `entropy`."""
        return cls.from_secret(entropy.draw(purpose, KEY_BYTES))

    @classmethod
    def from_secret(cls, secret: bytes) -> KeyPair:
        """Return the pair of a 32-byte secret (clamped inside X25519)."""
        private = X25519PrivateKey.from_private_bytes(secret)
        return cls(secret, private.public_key().public_bytes_raw())


class Agreement:
    """One secret, loaded once, to agree with many peers.

    Args:
        secret: Our X25519 secret, 32 bytes.
    """

    def __init__(self, secret: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(secret)

    def key(self, peer: bytes, *, salt: bytes, info: bytes) -> bytes:
        """Return the 32-byte key that both ends derive from their shared point.

        Args:
            peer: The other end's public key, 32 bytes.
            salt: The context; equal on both ends.
            info: The purpose; equal on both ends.

        Raises:
            PeerProtocolError: `peer` is no valid public key (wrong length, low order).
        """
        try:
            point = self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError as error:
            msg = "a peer's public key must be 32 bytes of a point of large order; drop that peer"
            raise PeerProtocolError(msg) from error
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=info).derive(point)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One key that is to be agreed on.

    Attributes:
        secret: Our X25519 secret, 32 bytes.
        peer: The other end's public key, 32 bytes.
        info: The purpose; equal on both ends.
    """

    secret: bytes = field(repr=False)
    peer: bytes
    info: bytes


class AgreeAll(Protocol):
    """`agree_all`, or something that returns the same, e.g. with more cores."""

    def __call__(self, exchanges: Sequence[Exchange], /, *, salt: bytes) -> list[bytes]:
        """Return the key of each exchange."""
        ...


def agree_all(exchanges: Sequence[Exchange], /, *, salt: bytes) -> list[bytes]:
    """Return the 32-byte key of each exchange; neighbours of one secret load it once.

    Args:
        exchanges: In any order.
        salt: The context; equal on both ends.

    Raises:
        PeerProtocolError: A peer's key is no valid public key.
    """
    return [
        agreement.key(exchange.peer, salt=salt, info=exchange.info)
        for secret, group in groupby(exchanges, key=attrgetter("secret"))
        for agreement in (Agreement(secret),)
        for exchange in group
    ]


def check_public_key(key: bytes) -> None:
    """Accept a key that agreement works with.

    Raises:
        PeerProtocolError: Wrong length, or a point of low order.
    """
    Agreement(_ANY_SECRET).key(key, salt=b"", info=b"")


def agree(secret: bytes, peer: bytes, *, salt: bytes, info: bytes) -> bytes:
    """Return the key of one `Agreement`; arguments and errors as there."""
    return Agreement(secret).key(peer, salt=salt, info=info)
