"""What a client can do to the sum, and what honest clients can not.

Under masks nobody can tell what a client adds. That one client suffices to spoil a round
is a limit, stated here and in docs/threat_model.md. That honest clients never spoil one,
whatever their training produced, is a promise.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.codec import Clip, Hadamard, NoRotation, Quantize
from fedcore.crypto import ReplayedEntropy
from fedcore.pipeline import LocalUpdate, Modular, decode_sum, make_upload
from fedcore.secagg import run_round
from tests.attacks.rounds import bound_round, exact, uploads_of

PLANS = {
    "uniform": exact(clip=Clip(1.0), rotate=NoRotation(), quantize=Quantize(8)),
    "modular": exact(clip=Clip(1.0), quantize=Modular(16)),
}


@pytest.mark.parametrize("name", PLANS)
def test_one_client_can_set_the_mean_far_beyond_every_clip(name):
    """Not prevented: the round ends as if all were well."""
    bound = bound_round(PLANS[name], 5, 12)
    honest = [np.full(12, 0.1)] * 5
    vectors = {c: upload.vector for c, upload in enumerate(uploads_of(bound, honest))}
    fair = run_round(vectors, bound.secagg, entropy=ReplayedEntropy(b"fair"))
    before = decode_sum(bound, fair.total, 5, {()}).delta
    assert np.abs(before - 0.1).max() < 0.05
    # What it may not add honestly: a quarter of the ring at every coordinate of the update.
    vectors[0][: bound.update_dim] += bound.ring.dtype.type(1 << (bound.ring.bits - 2))
    foul = run_round(vectors, bound.secagg, entropy=ReplayedEntropy(b"foul"))
    mean = decode_sum(bound, foul.total, 5, {()})
    assert (mean.survivors, mean.weight) == (5, 5)
    assert np.linalg.norm(mean.delta - before) > 2.0  # five honest clients: at most 2 / 5 each
    wrapped = bound.ring.lift(foul.total) - bound.ring.lift(fair.total)
    assert (wrapped[: bound.update_dim] == 1 << (bound.ring.bits - 2)).all()


def test_a_huge_number_wraps_the_sum_to_the_opposite_sign():
    """Not prevented: half a ring more, and what was the largest sum is the smallest."""
    bound = bound_round(PLANS["uniform"], 5, 3)
    vectors = {c: u.vector for c, u in enumerate(uploads_of(bound, [np.eye(3)[0]] * 5))}
    fair = run_round(vectors, bound.secagg, entropy=ReplayedEntropy(b"fair"))
    assert bound.ring.lift(fair.total)[0] == 5 * 127
    vectors[0][0] += bound.ring.dtype.type(1 << (bound.ring.bits - 1))
    foul = run_round(vectors, bound.secagg, entropy=ReplayedEntropy(b"foul"))
    assert bound.ring.lift(foul.total)[0] == 5 * 127 - (1 << (bound.ring.bits - 1))
    assert (foul.total[1:] == fair.total[1:]).all()


extremes = st.sampled_from([0.0, -0.0, 1e-30, 1.0, -1.0, 3e38, -3e38])
poison = st.sampled_from([float("inf"), -float("inf"), float("nan")])


@settings(max_examples=150)
@given(data=st.data())
def test_honest_updates_at_their_extreme_never_wrap_the_sum(data):
    """The sum in the ring is that of the integers, whatever the training returned."""
    clients, dim = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 9))
    rotate = data.draw(st.sampled_from([NoRotation(), Hadamard()]))
    quantize = Quantize(data.draw(st.integers(2, 16)))
    bound = bound_round(
        exact(clip=Clip(data.draw(st.sampled_from([1e-3, 1.0, 1e6]))), rotate=rotate,
              quantize=quantize, metric_slots=1), clients, dim
    )  # fmt: skip
    aligned = data.draw(st.booleans())
    rows = st.lists(extremes | poison, min_size=dim, max_size=dim)
    one = data.draw(rows)
    deltas = [one if aligned else data.draw(rows) for _ in range(min(clients, 4))]
    deltas = (deltas * clients)[:clients]
    loss = data.draw(st.sampled_from([1e300, -1e300, 1.0, float("nan")]))
    uploads = [
        make_upload(
            bound,
            LocalUpdate(np.array(delta, np.float32), 2**40, {"loss": loss}),
            None,
            ReplayedEntropy(b"%d" % client),
        )
        for client, delta in enumerate(deltas)
    ]
    each = [bound.ring.lift(upload.vector[: bound.update_dim]) for upload in uploads]
    wide = np.sum([upload.vector.astype(np.uint64) for upload in uploads], axis=0)
    total = bound.ring.reduce(wide)
    assert (bound.ring.lift(total[: bound.update_dim]) == np.sum(each, axis=0)).all()
    mean = decode_sum(bound, total, clients, {("loss",)})
    assert mean.weight == clients
    assert np.isfinite(mean.delta).all()
    assert np.sign(mean.metrics["loss"]) == (0 if np.isnan(loss) else np.sign(loss))


@pytest.mark.parametrize("clients", [5, 40])
def test_modular_sums_of_fully_aligned_updates_wrap_as_rarely_as_stated(clients):
    """`Modular` promises 1e-4 a coordinate, not never: its ring holds four deviations."""
    dim, rounds, wrapped = 4096, 8, 0
    rng = np.random.default_rng(0)
    for number in range(1, rounds + 1):
        bound = bound_round(
            exact(clip=Clip(1.0), quantize=Modular(16), metric_slots=0), clients, dim, number
        )
        delta = rng.normal(size=dim)
        uploads = uploads_of(bound, [delta] * clients, number)
        vectors = [upload.vector[: bound.update_dim] for upload in uploads]
        exactly = np.sum([bound.ring.lift(vector) for vector in vectors], axis=0)
        wide = np.sum([vector.astype(np.uint64) for vector in vectors], axis=0)
        wrapped += np.count_nonzero(bound.ring.lift(bound.ring.reduce(wide)) != exactly)
    expected = 1e-4 * dim * rounds
    assert wrapped <= expected + 4 * np.sqrt(expected)
