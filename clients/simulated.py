"""Enrolled devices of a simulation: root and identities that follow from a seed.

Nothing here protects anybody: whoever knows the seed is the root. It makes a simulation
run the very code, and cost the very bytes, of a fleet with identities.
"""

from __future__ import annotations

from functools import lru_cache, partial

from flwr.app import Context

from clients.identity import IdentitySource
from fedcore.crypto import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.secagg import Certificate, Identity

FAR_FUTURE = 1 << 40
"""Expiry of simulated certificates, Unix time."""


def simulated_root(seed: int) -> SigningKey:
    """Return the root key of the simulation with this seed."""
    return SigningKey.generate(ReplayedEntropy(str(seed).encode()).child("root"))


def simulated_identities(seed: int) -> IdentitySource:
    """Return a source that enrolls every node of a simulation."""
    return partial(_enroll, seed)


def _enroll(seed: int, context: Context) -> Identity:
    return _identity(seed, int(context.node_config["partition-id"]))


@lru_cache(maxsize=65536)
def _identity(seed: int, index: int) -> Identity:
    entropy = ReplayedEntropy(str(seed).encode()).child(f"identity={index}")
    key = SigningKey.generate(entropy)
    certificate = Certificate.issue(
        simulated_root(seed), name=f"device-{index}", key=key.public.raw, expires_at=FAR_FUTURE
    )
    return Identity(certificate, key)
