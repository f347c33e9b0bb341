from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import Reals, TellingClip
from fedcore.codec.clip import clip_norm
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError

ENTROPY = ReplayedEntropy(b"telling")
vectors = arrays(np.float64, st.integers(1, 12), elements=st.floats(-1e4, 1e4))
scales = st.floats(1e-3, 1e3)


@given(x=vectors, norm=scales, weight=st.floats(1e-3, 2))
def test_the_vector_is_clipped_and_its_answer_stands_behind_it(x, norm, weight):
    bound = TellingClip(norm, weight).bind(Reals(len(x)))
    y = bound.encode(x, ENTROPY)
    np.testing.assert_array_equal(y[:-1], clip_norm(x, norm))
    assert y[-1] == (1 if np.linalg.norm(x) <= norm else -1) * weight * norm
    assert np.linalg.norm(y) <= bound.target.norm * (1 + 1e-12)
    assert bound.target.norm == pytest.approx(norm * sqrt(1 + weight**2))
    assert bound.target == Reals(len(x) + 1, norm=bound.target.norm)
    np.testing.assert_array_equal(bound.decode(y), y[:-1])


@given(xs=st.lists(arrays(np.float64, 3, elements=st.floats(-9, 9)), min_size=1), norm=scales)
def test_the_sum_tells_the_exact_fraction_that_fitted(xs, norm):
    stage = TellingClip(norm, 0.2)
    bound = stage.bind(Reals(3))
    total = sum(bound.encode(x, ENTROPY) for x in xs)
    fitted = np.mean([np.linalg.norm(x) <= norm for x in xs])
    assert stage.fraction(total, len(xs)) == pytest.approx(fitted, abs=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_a_vector_that_is_not_finite_did_not_fit(bad):
    y = TellingClip(2.0, 0.5).bind(Reals(2)).encode(np.array([bad, 1.0]), ENTROPY)
    np.testing.assert_array_equal(y, [0.0, 0.0, -1.0])


@pytest.mark.parametrize(("norm", "weight"), [(0, 1), (1, 0), (np.inf, 1), (1, np.nan), (-1, 1)])
def test_a_clip_or_an_answer_without_a_size_is_refused(norm, weight):
    with pytest.raises(ConfigurationError, match="must be positive and finite"):
        TellingClip(norm, weight)
