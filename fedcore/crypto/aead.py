"""Authenticated encryption under keys that seal one message in each direction.

AES-256-GCM (NIST SP 800-38D). A key is derived for one pair of clients and one
round, and each of the two sends one box: the nonce is the direction, so no nonce
repeats under a key. The associated data names round, sender and recipient once
more, so that a box opens only where it was meant to.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedcore.errors import PeerProtocolError

TAG_BYTES = 16
_NONCE_BYTES = 12


def seal(key: bytes, plaintext: bytes, *, direction: int, associated: bytes) -> bytes:
    """Encrypt; the box is `TAG_BYTES` longer than `plaintext`.

    Args:
        key: 32 bytes, for one pair and one round.
        plaintext: Any length.
        direction: 0 or 1; each is used once under a key.
        associated: Authenticated with the box, not contained in it.
    """
    return AESGCM(key).encrypt(_nonce(direction), plaintext, associated)


def unseal(key: bytes, box: bytes, *, direction: int, associated: bytes) -> bytes:
    """Decrypt a box.

    Raises:
        PeerProtocolError: The box was made for somebody else, or altered.
    """
    try:
        return AESGCM(key).decrypt(_nonce(direction), box, associated)
    except InvalidTag as error:
        msg = "an encrypted share failed authentication: wrong key, context or altered bytes"
        raise PeerProtocolError(msg) from error


def _nonce(direction: int) -> bytes:
    return direction.to_bytes(_NONCE_BYTES, "little")
