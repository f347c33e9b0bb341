"""Ed25519 signatures: who said it, and that nobody changed a word.

A signature covers bytes and nothing else, so a caller that signs statements of
more than one kind puts a context before each message; otherwise a signature for
one purpose could be shown where another is expected.

Signing is deterministic [RFC8032, section 5.1.6]: it needs no randomness, and
the same key and message always give the same 64 bytes. A key is its 32-byte
seed; everything else is derived from it.

[RFC8032] https://www.rfc-editor.org/rfc/rfc8032
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedcore.crypto.entropy import Entropy
from fedcore.errors import ConfigurationError, VerificationError

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """A public key; safe to print, to compare and to use as an identity.

    Attributes:
        raw: 32 bytes, the encoded curve point.
    """

    raw: bytes

    def __post_init__(self) -> None:
        """Refuse anything that cannot be a key.

        Raises:
            ConfigurationError: `raw` is not 32 bytes long.
        """
        _check_length("a public key", self.raw)

    def verify(self, message: bytes, signature: bytes) -> None:
        """Return if `signature` was made for `message` by the owner of this key.

        Raises:
            VerificationError: It was not.
        """
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            msg = (
                f"the signature ({len(signature)} bytes) does not belong to this message and "
                f"public key {self.raw.hex()[:16]}...: do not use the message"
            )
            raise VerificationError(msg) from None

    def to_pem(self) -> bytes:
        """Return the key as a PEM SubjectPublicKeyInfo block."""
        return Ed25519PublicKey.from_public_bytes(self.raw).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @classmethod
    def from_pem(cls, pem: bytes) -> VerifyKey:
        """Return the key in a PEM SubjectPublicKeyInfo block.

        Raises:
            ConfigurationError: `pem` holds no Ed25519 public key.
        """
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm, InternalError):
            key = None
        if not isinstance(key, Ed25519PublicKey):
            msg = "expected a PEM file with an Ed25519 public key: pass the publisher's .pub file"
            raise ConfigurationError(msg)
        return cls(key.public_bytes_raw())


@dataclass(frozen=True, slots=True, eq=False)
class SigningKey:
    """A private key. Not comparable; compare `public` instead.

    Attributes:
        seed: 32 secret bytes.

    Example:
        >>> from fedcore.crypto.entropy import SystemEntropy
        >>> key = SigningKey.generate(SystemEntropy())
        >>> key.public.verify(b"model v7", key.sign(b"model v7"))
        >>> key
        SigningKey()
    """

    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse anything that cannot be a key.

        Raises:
            ConfigurationError: `seed` is not 32 bytes long.
        """
        _check_length("a signing seed", self.seed)

    @classmethod
    def generate(cls, entropy: Entropy) -> SigningKey:
        """Return a new key; each call needs an `entropy` of its own."""
        return cls(entropy.draw("signing-key", KEY_BYTES))

    @property
    def public(self) -> VerifyKey:
        """The key that checks what this one signs."""
        return VerifyKey(self._private().public_key().public_bytes_raw())

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature of `message`."""
        return self._private().sign(message)

    def to_pem(self) -> bytes:
        """Return the key as an unencrypted PEM PKCS#8 block: store it with mode 0600."""
        return self._private().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    @classmethod
    def from_pem(cls, pem: bytes) -> SigningKey:
        """Return the key in an unencrypted PEM PKCS#8 block.

        Raises:
            ConfigurationError: `pem` holds no Ed25519 private key.
        """
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (TypeError, ValueError, UnsupportedAlgorithm, InternalError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            msg = "expected a PEM file with an unencrypted Ed25519 private key"
            raise ConfigurationError(msg)
        return cls(key.private_bytes_raw())

    def _private(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.seed)


def _check_length(what: str, value: bytes) -> None:
    if len(value) != KEY_BYTES:
        msg = f"{what} must be {KEY_BYTES} bytes, got {len(value)}"
        raise ConfigurationError(msg)
