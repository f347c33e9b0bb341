import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import Clip, Quantize, RandomK
from fedcore.errors import ConfigurationError
from fedcore.pipeline import ByExamples, NoSecAgg, RunPlan, Uniform, left_out, make_upload
from fedcore.privacy import DistributedSkellam
from fedcore.ring import pack
from tests.fedcore.pipeline.rounds import bound_round, entropy_of, local, private_plan

FEEDBACK = RunPlan(
    clip=Clip(1.0),
    sparsify=RandomK(0.3),
    error_feedback=True,
    weighting=Uniform(),
    secagg=NoSecAgg(),
)
small = st.floats(-100, 100, width=32)


@given(
    delta=arrays(np.float32, 12, elements=small),
    residual=arrays(np.float32, 12, elements=small),
    norm=st.floats(0.01, 100),
    number=st.integers(1, 5),
)
def test_with_feedback_what_is_sent_and_what_is_kept_add_up(delta, residual, norm, number):
    run = RunPlan(
        clip=Clip(norm), sparsify=RandomK(0.3), error_feedback=True, weighting=Uniform(),
        secagg=NoSecAgg(),
    )  # fmt: skip
    bound = bound_round(run, round_number=number)
    x = delta.astype(np.float64) + residual
    sent = bound.kept.decode(bound.kept.encode(x, entropy_of(0)))
    upload = make_upload(bound, local(delta), residual, entropy_of(0))
    kept = left_out(bound, upload.whole, upload.payload)
    np.testing.assert_allclose(sent + kept, x, rtol=1e-6, atol=1e-5)
    assert np.linalg.norm(sent) <= norm * (1 + 1e-9)
    assert np.count_nonzero(sent) <= bound.update_dim


def test_with_feedback_everything_is_sent_in_the_end():
    rng = np.random.default_rng(0)
    delta = rng.normal(size=12).astype(np.float32) * 0.05
    sent, residual = np.zeros(12), None
    for number in range(1, 60):
        bound = bound_round(FEEDBACK, round_number=number)
        update = local(delta if number == 1 else np.zeros(12))
        upload = make_upload(bound, update, residual, entropy_of(0))
        sent += bound.codec.decode(upload.vector[: bound.update_dim])
        residual = left_out(bound, upload.whole, upload.payload)
    np.testing.assert_allclose(sent, delta, atol=1e-4)
    np.testing.assert_allclose(residual, 0, atol=1e-7)


def test_without_feedback_nothing_is_kept():
    bound = bound_round(RunPlan(sparsify=RandomK(0.3)))
    assert make_upload(bound, local(np.ones(12)), None, entropy_of(0)).whole is None


def test_a_diverged_update_does_not_poison_the_residual():
    bound = bound_round(FEEDBACK)
    delta = np.full(12, np.nan)
    delta[:3] = [np.inf, -np.inf, 1.0]
    upload = make_upload(bound, local(delta), np.ones(12, np.float32), entropy_of(0))
    assert np.isfinite(upload.whole).all()
    assert np.isfinite(left_out(bound, upload.whole, upload.payload)).all()


def test_one_byte_stream_gives_one_upload_and_another_gives_another():
    bound = bound_round(RunPlan(quantize=Quantize(8), clip=Clip(10.0)), dim=200)
    update = local(np.linspace(-0.5, 0.5, 200), 5, loss=1.0)
    one, again, other = (
        make_upload(bound, update, None, entropy_of(client)).vector for client in (0, 0, 1)
    )
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()


@pytest.mark.parametrize(
    "run",
    [
        private_plan(),
        private_plan(privacy=DistributedSkellam(noise_multiplier=1.0, delta=1e-5)),
        private_plan(metric_slots=0),
    ],
)
def test_under_noise_neither_metrics_nor_example_counts_are_in_the_upload(run):
    bound = bound_round(run, dim=100)
    delta = np.linspace(-1, 1, 100)
    uploads = [
        make_upload(bound, update, None, entropy_of(0))
        for update in (
            local(delta, 1, loss=0.5),
            local(delta, 999, loss=7.0, accuracy=1.0),
            local(delta, 0),
        )
    ]
    assert {pack(upload.vector, bound.ring) for upload in uploads} == {
        pack(uploads[0].vector, bound.ring)
    }
    assert {upload.metric_names for upload in uploads} == {()}
    assert uploads[0].vector.shape == (bound.update_dim,)


def test_uploads_weighted_alike_hide_the_number_of_examples():
    bound = bound_round(RunPlan(weighting=Uniform()))
    one, many = (
        make_upload(bound, local(np.ones(12), count), None, entropy_of(0)).vector
        for count in (1, 500)
    )
    assert one.tobytes() == many.tobytes()


def test_uploads_weighted_by_examples_count_them():
    bound = bound_round(RunPlan(weighting=ByExamples(1000)))
    tallies = [
        bound.tally.decode(
            make_upload(bound, local(np.zeros(12), count), None, entropy_of(0)).vector[12:]
        )
        for count in (0, 1, 999, 1000, 1001, 10**9)
    ]
    assert [sums[0] for sums in tallies] == [0, 1, 999, 1000, 1000, 1000]


@pytest.mark.parametrize("found", [11, 13, 0])
def test_an_update_of_another_model_is_refused(found):
    with pytest.raises(ConfigurationError, match="expected an update of 12 entries"):
        make_upload(bound_round(), local(np.zeros(found)), None, entropy_of(0))


def test_more_metrics_than_slots_are_refused_by_name():
    bound = bound_round(RunPlan(metric_slots=1))
    with pytest.raises(ConfigurationError, match=r"metric_slots=1.*\['accuracy', 'loss'\]"):
        make_upload(bound, local(np.zeros(12), 1, loss=1.0, accuracy=1.0), None, entropy_of(0))


def test_without_slots_metrics_stay_on_the_device():
    bound = bound_round(RunPlan(metric_slots=0))
    upload = make_upload(bound, local(np.zeros(12), 7, loss=1.0), None, entropy_of(0))
    assert upload.metric_names == ()
    assert bound.tally.decode(upload.vector[12:]) == (7, 0)


def test_free_slots_are_zero_and_huge_metrics_are_cut_instead_of_wrapping():
    bound = bound_round(RunPlan(metric_slots=3), clients=5)
    upload = make_upload(bound, local(np.zeros(12), 1000, a=1e300, b=-1e300), None, entropy_of(0))
    _, _, a, b, free = bound.tally.decode(upload.vector[12:])
    assert (a, b, free) == (bound.tally.limit, -bound.tally.limit, 0)
