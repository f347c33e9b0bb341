"""What the network sees: how long everything is.

Lengths may depend on the plan and on who dropped out, never on what a client trained.
"""

from dataclasses import replace

import numpy as np
import pytest

from fedcore.codec import Clip, NoRotation, Quantize, RandomK
from fedcore.crypto import ReplayedEntropy
from fedcore.pipeline import Modular, SeedHelper
from fedcore.ring import pack
from fedcore.secagg import run_round
from fedcore.secagg.seed_helper.loopback import run_helper_round
from tests.attacks.rounds import bound_round, exact, noisy, uploads_of

CLIENTS, DIM = 5, 40
PLANS = {
    "default": exact(),
    "sparse": exact(sparsify=RandomK(0.25), error_feedback=True),
    "uniform": exact(quantize=Quantize(7), rotate=NoRotation(), clip=Clip(1.0)),
    "narrow": exact(quantize=Modular(9), clip=Clip(1.0)),
    "noisy": noisy(1.0, clip=Clip(1.0)),
    "helper": exact(secagg=SeedHelper()),
}
RNG = np.random.default_rng(0)
TRAINED = {
    "nothing": np.zeros((CLIENTS, DIM)),
    "anything": RNG.normal(size=(CLIENTS, DIM)),
    "one coordinate": np.eye(CLIENTS, DIM),
    "the largest": np.full((CLIENTS, DIM), 3e38),
    "the smallest": np.full((CLIENTS, DIM), -3e38),
    "no numbers": np.full((CLIENTS, DIM), np.nan),
}
METRICS = [0.0, 1.0, -1e300, float("inf")]


def sizes(bound, deltas, metric):
    """Bytes of each upload, and of all that each client sends and receives."""
    uploads = uploads_of(bound, deltas, repr(metric), loss=metric)
    inputs = {client: upload.vector for client, upload in enumerate(uploads)}
    packed = {len(pack(vector, bound.ring)) for vector in inputs.values()}
    if bound.helper is not None:
        result = run_helper_round(inputs, bound.helper, {3}, entropy=ReplayedEntropy(b"sizes"))
    else:
        drops = {3: "upload"} if bound.minimum_survivors < CLIENTS else {}
        result = run_round(inputs, bound.secagg, drops, entropy=ReplayedEntropy(b"sizes"))
    return (
        tuple(packed),
        tuple(sorted(result.sent_bytes.items())),
        tuple(sorted(result.received_bytes.items())),
        tuple(upload.metric_names for upload in uploads),
    )


@pytest.mark.parametrize("name", PLANS)
def test_nothing_that_travels_is_longer_or_shorter_for_what_was_trained(name):
    bound = bound_round(replace(PLANS[name], dropout=0.2), CLIENTS, DIM)
    seen = {sizes(bound, deltas, metric) for deltas in TRAINED.values() for metric in METRICS}
    assert len(seen) == 1
    (packed, sent, _, _) = seen.pop()
    assert len(packed) == 1
    assert all(size >= packed[0] for client, size in sent if client != 3)


def test_a_plan_alone_decides_how_long_an_upload_is():
    lengths = {
        name: len(pack(uploads_of(bound, TRAINED["anything"])[0].vector, bound.ring))
        for name, plan in PLANS.items()
        for bound in [bound_round(plan, CLIENTS, DIM)]
    }
    for name, plan in PLANS.items():
        bound = bound_round(plan, CLIENTS, DIM)
        assert lengths[name] == -(-bound.dim * bound.ring.bits // 8)
    assert len(set(lengths.values())) > 3
