"""The public parameters of one round with a seed helper.

The box in which a client sends its seed is bound to the plan's digest. A device that
was told another model, another cohort or a lower minimum made its box for another
round, and the helper cannot open it in this one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from fedcore.crypto import DIGEST_BYTES, KEY_BYTES, transcript_hash
from fedcore.errors import ConfigurationError
from fedcore.ring import Ring
from fedcore.secagg.plan import MOST_CLIENTS

PROTOCOL_VERSION: Final = 1
_FORMAT: Final = struct.Struct("<HIIBQ")
PLAN_BYTES: Final = DIGEST_BYTES + KEY_BYTES + _FORMAT.size


@dataclass(frozen=True, slots=True)
class HelperPlan:
    """What coordinator, helper and clients agree on.

    Attributes:
        clients: Number invited; they are called 0..clients-1.
        minimum_survivors: A sum over fewer clients is never revealed.
        ring_bits: Entries are added modulo 2^ring_bits.
        dim: Length of the vectors.
        context: 32 bytes that bind the run, round, attempt, codec and model.
        helper_key: The helper's X25519 public key, 32 bytes. Devices compare it with
            the one they pin.

    Raises:
        ConfigurationError: A value is out of range.
    """

    clients: int
    minimum_survivors: int
    ring_bits: int
    dim: int
    context: bytes
    helper_key: bytes

    def __post_init__(self) -> None:
        if not 2 <= self.clients <= MOST_CLIENTS:
            msg = f"helper_plan.clients must be in 2..{MOST_CLIENTS}, got {self.clients}"
            raise ConfigurationError(msg)
        if not 2 <= self.minimum_survivors <= self.clients:
            msg = (
                f"helper_plan.minimum_survivors must be in 2..{self.clients}, "
                f"got {self.minimum_survivors}"
            )
            raise ConfigurationError(msg)
        Ring(self.ring_bits)
        if not 1 <= self.dim < 1 << 40:
            msg = f"helper_plan.dim must be positive and below 2^40, got {self.dim}"
            raise ConfigurationError(msg)
        for name, value, size in (
            ("context", self.context, DIGEST_BYTES),
            ("helper_key", self.helper_key, KEY_BYTES),
        ):
            if len(value) != size:
                msg = f"helper_plan.{name} must be {size} bytes, got {len(value)}"
                raise ConfigurationError(msg)

    @property
    def ring(self) -> Ring:
        """Where the entries live."""
        return Ring(self.ring_bits)

    def to_bytes(self) -> bytes:
        """Return the canonical encoding."""
        numbers = _FORMAT.pack(
            PROTOCOL_VERSION, self.clients, self.minimum_survivors, self.ring_bits, self.dim
        )
        return self.context + self.helper_key + numbers

    @classmethod
    def from_bytes(cls, data: bytes) -> HelperPlan:
        """Return the plan that `data` encodes.

        Raises:
            ConfigurationError: Wrong length or version, or values out of range.
        """
        if len(data) != PLAN_BYTES:
            msg = f"a helper plan takes {PLAN_BYTES} bytes, found {len(data)}"
            raise ConfigurationError(msg)
        version, clients, minimum, bits, dim = _FORMAT.unpack(data[DIGEST_BYTES + KEY_BYTES :])
        if version != PROTOCOL_VERSION:
            msg = (
                f"expected helper protocol version {PROTOCOL_VERSION}, found {version}: "
                "update the older side"
            )
            raise ConfigurationError(msg)
        context, helper_key = data[:DIGEST_BYTES], data[DIGEST_BYTES : DIGEST_BYTES + KEY_BYTES]
        return cls(clients, minimum, bits, dim, context, helper_key)

    def digest(self) -> bytes:
        """Return the 32 bytes that name the round and to which every box is bound."""
        return transcript_hash("fedcore/v1/helper-plan", self.to_bytes())
