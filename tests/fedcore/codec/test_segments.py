import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import ClipSegments, Reals
from fedcore.codec.clip import clip_norm
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError

ENTROPY = ReplayedEntropy(b"segments")
norms = st.floats(1e-3, 1e3)


def encode(stage, x):
    return stage.bind(Reals(len(x))).encode(x, ENTROPY)


@given(
    norms=st.lists(norms, min_size=1, max_size=5),
    sizes=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    data=st.data(),
)
def test_each_segment_is_clipped_by_itself_and_the_whole_keeps_the_stated_norm(norms, sizes, data):
    sizes = [max(1, sizes[0]), *sizes[1 : len(norms)]]
    stops = np.cumsum(sizes)
    x = data.draw(arrays(np.float64, int(stops[-1]), elements=st.floats(-1e4, 1e4)))
    stage = ClipSegments(tuple(norms), tuple(stops.tolist()))
    bound = stage.bind(Reals(len(x)))
    y = bound.encode(x, ENTROPY)
    parts = np.split(y, stops[:-1])
    for part, source, norm in zip(parts, np.split(x, stops[:-1]), norms, strict=True):
        np.testing.assert_array_equal(part, clip_norm(source, norm))
        assert np.linalg.norm(part) <= norm * (1 + 1e-12)
    assert bound.target.norm == pytest.approx(np.linalg.norm(norms))
    assert np.linalg.norm(y) <= bound.target.norm * (1 + 1e-12)
    assert stage.exceeded(x) == (not np.array_equal(x, y))


def test_one_exploding_layer_leaves_the_others_as_they_are():
    y = encode(ClipSegments((1.0, 1.0), (1, 3)), np.array([1e6, 0.3, 0.4]))
    np.testing.assert_array_equal(y, [1.0, 0.3, 0.4])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_layer_that_is_not_finite_becomes_zero_and_counts_as_clipped(bad):
    stage = ClipSegments((1.0, 1.0), (1, 3))
    x = np.array([bad, 0.3, 0.4])
    np.testing.assert_array_equal(encode(stage, x), [0.0, 0.3, 0.4])
    assert stage.exceeded(x)


@pytest.mark.parametrize(
    ("norms", "stops", "named"),
    [
        ((), (), "one norm and one end each"),
        ((1.0,), (1, 2), "one norm and one end each"),
        ((1.0, 0.0), (1, 2), "must be positive"),
        ((1.0, np.inf), (1, 2), "must be positive"),
        ((1.0, 1.0), (2, 1), "follow one another"),
    ],
)
def test_segments_that_are_none_are_refused(norms, stops, named):
    with pytest.raises(ConfigurationError, match=named):
        ClipSegments(norms, stops)


def test_segments_of_another_vector_are_refused():
    with pytest.raises(ConfigurationError, match="end at 4, where the vector ends, got 3"):
        ClipSegments((1.0,), (3,)).bind(Reals(4))
