"""The only door to randomness: named draws, real or replayed.

Protocol, codec and privacy code never asks the operating system for bytes. It
is handed an `Entropy` and names what each draw is for. `SystemEntropy` ignores
the name and asks the kernel. `ReplayedEntropy` derives the bytes from a seed and
the name alone: it has no position, so the result does not depend on the order
of calls, on the number of workers, or on which other draws were made. That is
what makes a simulation repeatable bit for bit, masked or not.

A replayed run has no secrets. Only simulations and tests may construct one;
nothing that a device receives over the network can.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcore.errors import LocalProtocolError


class Entropy(Protocol):
    """A source of secret uniform bytes."""

    def draw(self, purpose: str, size: int, /) -> bytes:
        """Return `size` uniform bytes for `purpose`; a purpose is used once."""
        ...

    def child(self, name: str, /) -> Entropy:
        """Return the source for a part of the work, e.g. ``"round=3/client=7"``."""
        ...


@dataclass(frozen=True, slots=True)
class SystemEntropy:
    """The operating system's generator: what every real device uses."""

    def draw(self, purpose: str, size: int, /) -> bytes:
        """Return `size` bytes from the kernel."""
        del purpose
        return os.urandom(size)

    def child(self, name: str, /) -> SystemEntropy:
        """Return itself: the kernel needs no separation."""
        del name
        return self


@dataclass(frozen=True, slots=True)
class ReplayedEntropy:
    """Bytes that follow from (seed, path, purpose): for simulation and tests only.

    Attributes:
        seed: Any length; treat it as public.
        path: Names of the enclosing `child` calls.

    Example:
        >>> a = ReplayedEntropy(b"seed").child("client=1")
        >>> a.draw("rounding", 4) == a.draw("rounding", 4)
        True
        >>> a.draw("rounding", 4) == a.draw("noise", 4)
        False
    """

    seed: bytes = field(repr=False)
    path: str = ""

    def draw(self, purpose: str, size: int, /) -> bytes:
        """Return `size` bytes: HKDF-SHA256 to a key, AES-256-CTR to the length.

        Raises:
            LocalProtocolError: `purpose` has a slash, so it could be a child's draw.
        """
        if "/" in purpose:
            msg = f"a purpose is one name without a slash, got {purpose!r}: name a child for a path"
            raise LocalProtocolError(msg)
        info = f"fedcore/replay/{self.path}/{purpose}".encode()
        key = HKDF(hashes.SHA256(), length=32, salt=None, info=info).derive(self.seed)
        encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        return encryptor.update(bytes(size))

    def child(self, name: str, /) -> ReplayedEntropy:
        """Return the source whose draws are separated from all others by `name`."""
        return ReplayedEntropy(self.seed, f"{self.path}/{name}")


def generator(entropy: Entropy, purpose: str) -> np.random.Generator:
    """Return a numpy generator seeded with 32 bytes of `entropy`.

    For randomness whose secrecy protects nobody (rounding, shuffling, initial
    weights). Noise for privacy and masks draw from a cipher instead.
    """
    seed = np.frombuffer(entropy.draw(purpose, 32), dtype="<u4")
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed.tolist())))
