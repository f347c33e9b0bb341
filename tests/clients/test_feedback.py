"""Updates of rounds that came to nothing: each is sent in the end, and none is sent twice."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from clients.feedback import Feedback
from fedcore.codec import Clip, PublicTopK, Qsgd, RandomK, Sketch, SparseTernary, TopK
from fedcore.errors import LocalProtocolError
from fedcore.pipeline import NoSecAgg, PerLayerClip, RunPlan, Uniform, bind_round, left_out
from fedcore.pipeline.clipping import Layer
from fedcore.pipeline.upload import LocalUpdate, make_upload
from tests.fedcore.pipeline.rounds import entropy_of, round_plan

DIM = 12
RUN = RunPlan(
    clip=Clip(0.7), sparsify=RandomK(0.3), error_feedback=True, weighting=Uniform(),
    secagg=NoSecAgg(),
)  # fmt: skip
PER_LAYER = {"layers": (Layer("w", 8), Layer("b", 4))}
RUNS = {
    "clipped": (replace(RUN, sparsify=RunPlan().sparsify), {}),
    "random_k": (RUN, {}),
    "sketch": (replace(RUN, sparsify=Sketch(0.4)), {}),
    "public_top_k": (replace(RUN, sparsify=PublicTopK(0.25)), {}),
    "per_layer": (replace(RUN, clip=PerLayerClip(0.7)), PER_LAYER),
    "partly_dense": (replace(RUN, sparsify=RandomK(0.3, dense_below=5)), PER_LAYER),
    "top_k": (replace(RUN, sparsify=RunPlan().sparsify, quantize=TopK(0.25, 8)), {}),
    "ternary": (replace(RUN, sparsify=RunPlan().sparsify, quantize=SparseTernary(0.25)), {}),
    "qsgd": (replace(RUN, sparsify=RunPlan().sparsify, quantize=Qsgd(1, 4)), {}),
}
OF_EVERY_KIND = pytest.mark.parametrize("kind", RUNS)


class Device:
    """A node that is restarted before every message, and keeps count of what it sent."""

    def __init__(self, kind="random_k"):
        self.run, self.changes = RUNS[kind]
        self.context = Context(1, 1000, {}, RecordDict(), {})
        self.counted, self.sent = 0, np.zeros(DIM)

    @property
    def feedback(self):
        self.context = pickle.loads(pickle.dumps(self.context))
        return Feedback(self.context)

    def plan(self, number, attempt=1):
        changes = self.changes
        if isinstance(self.run.sparsify, PublicTopK):
            last = np.arange(DIM) * (-1.0) ** number
            changes = changes | {"support": self.run.sparsify.choose(last, DIM, number)}
        return round_plan(self.run, round_number=number, attempt=attempt, **changes)

    def upload(self, number, delta, attempt=1, *, counts):
        """Answer an attempt, which may go into the model."""
        plan = self.plan(number, attempt)
        bound, earlier = bind_round(plan), self.feedback.start(plan, self.counted)
        update = LocalUpdate(np.asarray(delta, np.float32), 1, {})
        upload = make_upload(bound, update, earlier, entropy_of(number, attempt))
        self.feedback.keep(plan, upload, earlier)
        if counts:
            self.counted = number
            self.sent += (
                bound.compressor.decompress(upload.payload, DIM)
                if bound.compressor is not None
                else bound.codec.decode(upload.vector[: bound.update_dim])
            )

    def kept(self, number):
        """What the update of a round to come is added to."""
        kept = self.feedback.start(self.plan(number), self.counted)
        return np.zeros(DIM) if kept is None else kept


@OF_EVERY_KIND
@given(data=st.data())
def test_what_was_sent_and_what_is_kept_are_all_updates_once(kind, data):
    device, expected = Device(kind), np.zeros(DIM)
    numbers = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6, unique=True))
    rng = np.random.default_rng(len(numbers))
    for number in sorted(numbers):
        attempts = data.draw(st.integers(1, 3))
        for attempt in range(1, attempts + 1):
            delta = rng.normal(size=DIM).astype(np.float32)
            counts = attempt == attempts and data.draw(st.booleans())
            device.upload(number, delta, attempt, counts=counts)
        expected += delta
    np.testing.assert_allclose(device.sent + device.kept(31), expected, atol=2e-5)


@OF_EVERY_KIND
def test_after_lost_rounds_a_device_gets_where_one_without_losses_is(kind):
    steady, dropped = Device(kind), Device(kind)
    deltas = np.random.default_rng(3).normal(size=(8, DIM)) * 0.2
    for number in range(1, 301):
        delta = deltas[number - 1] if number <= len(deltas) else np.zeros(DIM)
        steady.upload(number, delta, counts=True)
        dropped.upload(number, delta, counts=number not in (1, 2, 5, 8, 9))
    for device in (steady, dropped):
        np.testing.assert_allclose(device.sent + device.kept(301), deltas.sum(axis=0), atol=2e-5)
    if kind not in {"ternary", "qsgd"}:  # these two never end: they round the rest as coarsely
        np.testing.assert_allclose(dropped.sent, steady.sent, atol=0.02)


def test_an_upload_that_counted_leaves_what_it_did_not_send():
    device = Device()
    device.upload(1, np.ones(DIM), counts=True)
    bound = bind_round(device.plan(1))
    np.testing.assert_array_equal(device.kept(2), left_out(bound, np.ones(DIM, np.float32), b""))
    assert 0 < np.abs(device.kept(2)).sum() < DIM


def test_an_upload_that_did_not_count_leaves_everything():
    device = Device()
    device.upload(1, np.ones(DIM), counts=True)
    before = device.kept(3)
    device.upload(3, np.ones(DIM), counts=False)
    np.testing.assert_array_equal(device.kept(4), before + 1)


def test_another_attempt_starts_from_what_the_first_one_started_from():
    device = Device()
    device.upload(1, np.ones(DIM), 1, counts=False)
    assert device.feedback.start(device.plan(1, 2), 0) is None
    device.upload(2, np.ones(DIM), counts=True)
    before = device.kept(3)
    for attempt in (1, 2, 3):
        np.testing.assert_array_equal(device.kept(3), before)
        device.upload(3, np.full(DIM, 10.0 * attempt), attempt, counts=False)
    np.testing.assert_array_equal(device.kept(4), before + 30)


def test_what_may_have_counted_is_not_sent_again():
    """The coordinator knows of a later round: it took over, or this memory is an old copy."""
    device = Device()
    device.upload(3, np.ones(DIM), counts=True)
    left = device.kept(9)
    device.counted = 7
    np.testing.assert_array_equal(device.kept(9), left)


def test_a_number_below_every_round_is_none():
    device = Device()
    device.upload(1, np.ones(DIM), counts=False)
    device.counted = -5
    np.testing.assert_array_equal(device.kept(2), np.ones(DIM))


def test_another_run_starts_from_nothing():
    device = Device()
    device.upload(1, np.ones(DIM), counts=False)
    assert device.feedback.start(replace(device.plan(2), run_id="another"), 0) is None


def test_without_feedback_nothing_is_kept():
    device = Device()
    device.run = replace(RUN, error_feedback=False)
    device.upload(1, np.ones(DIM), counts=True)
    assert list(device.context.state) == []
    device.run = RUN
    device.upload(1, np.ones(DIM), counts=True)
    assert device.feedback.start(replace(device.plan(2), run=RunPlan()), 0) is None


def test_it_takes_the_memory_of_two_models():
    device = Device()
    for number in (1, 2, 3):
        device.upload(number, np.ones(DIM), counts=number != 2)
    vectors = device.context.state["fedcore.feedback"]
    assert {name: array.shape for name, array in vectors.items()} == {
        "whole": (DIM,),
        "before": (DIM,),
    }
    assert {array.dtype for array in vectors.values()} == {"float32"}
    assert device.context.state["fedcore.feedback.sent"]["payload"] == b""


def test_a_residual_of_another_size_is_refused():
    device = Device()
    device.upload(1, np.ones(DIM), counts=True)
    with pytest.raises(LocalProtocolError, match=r"shape \(12,\).*needs \(13,\)"):
        device.feedback.start(round_plan(RUN, round_number=2, dim=13), 1)


@pytest.mark.parametrize(("field", "value"), [("plan", b"{}"), ("plan", 3), ("payload", "text")])
def test_a_damaged_memory_is_our_own_mistake(field, value):
    device = Device()
    device.upload(1, np.ones(DIM), counts=True)
    device.context.state["fedcore.feedback.sent"][field] = value
    with pytest.raises(LocalProtocolError, match="what this device kept of its last upload"):
        device.feedback.start(device.plan(2), 1)


@OF_EVERY_KIND
@given(told=st.lists(st.integers(-3, 12), min_size=10, max_size=10), seed=st.integers(0, 99))
def test_whatever_a_coordinator_says_nothing_longer_than_the_clip_is_sent(kind, told, seed):
    """A lie about `counted` changes what is sent, and neither its bound nor the next draw."""
    device, rng = Device(kind), np.random.default_rng(seed)
    for number, device.counted in enumerate(told, 1):
        plan = device.plan(number)
        bound, earlier = bind_round(plan), device.feedback.start(plan, device.counted)
        update = LocalUpdate(rng.normal(size=DIM).astype(np.float32), 1, {})
        upload = make_upload(bound, update, earlier, entropy_of(number))
        sent = bound.kept.encode(upload.whole.astype(np.float64), entropy_of(number))
        assert np.linalg.norm(sent) <= plan.norm * (1 + 1e-9)
        assert upload.vector.shape == (bound.dim,)
        device.feedback.keep(plan, upload, earlier)
