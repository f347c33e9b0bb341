from math import inf

import pytest

from fedcore.crypto.entropy import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.manifest import Description, InputSpec, Metrics, Provenance


@pytest.fixture(scope="session")
def key():
    return SigningKey.generate(ReplayedEntropy(b"publisher"))


@pytest.fixture(scope="session")
def provenance():
    return Provenance("run-1", seed=0, rounds=5, epsilon=inf, delta=0.0, config_digest="cd" * 32)


@pytest.fixture(scope="session")
def description(provenance):
    return Description(
        name="digits",
        created_at="2026-01-31T12:00:00Z",
        inputs=InputSpec((3,), 0.0, 1.0),
        labels=("a", "b", "c"),
        metrics=Metrics(1.0, 1.0, 1.0),
        provenance=provenance,
    )
