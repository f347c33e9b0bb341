"""A seed on its way to the helper, through hands that must not read it.

Hybrid public key encryption [RFC9180] in base mode, one message per key:
DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM.

    sealed = enc(32) ciphertext(32) tag(16)
    info   = "fedcore/v1/helper-seed" plan digest(32) client(u32)

The info string is part of the key schedule, so a box opens for one round, one client
and one helper only. The ephemeral key inside is the library's, from the operating
system: two boxes with the same seed differ, and nothing of the sum depends on it.

[RFC9180] https://www.rfc-editor.org/rfc/rfc9180
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from fedcore.crypto import KEY_BYTES, SEED_BYTES, TAG_BYTES
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.secagg.fields import write_u32

SEALED_BYTES: Final = KEY_BYTES + SEED_BYTES + TAG_BYTES
_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def seal_seed(seed: bytes, digest: bytes, client: int, helper_key: bytes) -> bytes:
    """Return 80 bytes that only the owner of `helper_key` can open.

    Raises:
        ConfigurationError: `helper_key` is no valid public key (low order).
    """
    try:
        public = X25519PublicKey.from_public_bytes(helper_key)
        return _SUITE.encrypt(seed, public, info=_info(digest, client))
    except ValueError as error:
        msg = "the helper's public key must be 32 bytes of a point of large order: pin another"
        raise ConfigurationError(msg) from error


def unseal_seed(sealed: bytes, digest: bytes, client: int, secret: bytes) -> bytes:
    """Return the seed that `client` sealed for this round.

    Raises:
        PeerProtocolError: Made for another round, client or helper, or altered.
    """
    private = X25519PrivateKey.from_private_bytes(secret)
    try:
        seed = _SUITE.decrypt(sealed, private, info=_info(digest, client))
    except (InvalidTag, ValueError) as error:
        msg = (
            f"the box of client {client} does not open: made for another round, client or "
            "helper, or altered; leave this client out"
        )
        raise PeerProtocolError(msg) from error
    if len(seed) != SEED_BYTES:
        msg = f"client {client} must seal {SEED_BYTES} bytes, found {len(seed)}"
        raise PeerProtocolError(msg)
    return seed


def _info(digest: bytes, client: int) -> bytes:
    return b"fedcore/v1/helper-seed" + digest + write_u32(client)
