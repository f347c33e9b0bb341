import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedcore.errors import ConfigurationError
from fedcore.vectors import Entry, Layout

# Values that float32 holds exactly, so that flattening loses nothing.
ELEMENTS = {
    "float16": st.floats(-1000, 1000, width=16),
    "float32": st.floats(-1e6, 1e6, width=32),
    "float64": st.floats(-1e6, 1e6, width=32),
    "int8": st.integers(-128, 127),
    "int64": st.integers(-(2**24), 2**24),
    "uint8": st.integers(0, 255),
    "bool": st.booleans(),
}
shapes = array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
one_array = st.sampled_from(sorted(ELEMENTS)).flatmap(
    lambda dtype: arrays(dtype, shapes, elements=ELEMENTS[dtype])
)
models = st.dictionaries(st.text(max_size=6), one_array, max_size=5)

MODEL = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "bias": np.array([0.5, -0.5]),
    "count": np.array(7),
}


@settings(deadline=None)
@given(models)
def test_unflatten_undoes_flatten_for_every_shape_and_type(model):
    layout = Layout.of(model)
    vector = layout.flatten(model)
    assert vector.dtype == np.float32
    assert vector.shape == (layout.dim,) == (sum(array.size for array in model.values()),)
    back = layout.unflatten(vector)
    assert list(back) == list(model)
    for name, array in model.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back[name], array)


@settings(deadline=None)
@given(models, st.data())
def test_flatten_undoes_unflatten_for_real_models(model, data):
    real = {name: array.astype(np.float32) for name, array in model.items()}
    layout = Layout.of(real)
    vector = data.draw(arrays(np.float32, layout.dim, elements=st.floats(-9, 9, width=32)))
    np.testing.assert_array_equal(layout.flatten(layout.unflatten(vector)), vector)


def test_arrays_lie_in_the_order_of_the_mapping_and_row_by_row():
    layout = Layout.of(MODEL)
    assert layout.entries == (
        Entry("weight", (2, 3), "float32"),
        Entry("bias", (2,), "float64"),
        Entry("count", (), "int64"),
    )
    assert layout.flatten(MODEL).tolist() == [0, 1, 2, 3, 4, 5, 0.5, -0.5, 7]
    assert Layout.of({}).flatten({}).shape == (0,)


def test_counters_are_rounded_to_whole_numbers():
    layout = Layout.of({"count": np.array([0, 0, 0, 0])})
    back = layout.unflatten(np.array([2.4, 2.6, -1.6, 1e6], np.float32))
    assert back["count"].tolist() == [2, 3, -2, 1_000_000]


def test_neither_direction_shares_memory_with_its_input():
    model = {"weight": np.zeros(3, np.float32)}
    layout = Layout.of(model)
    vector = layout.flatten(model)
    back = layout.unflatten(vector)
    vector += 1
    assert model["weight"].tolist() == back["weight"].tolist() == [0, 0, 0]


def test_types_may_differ_from_the_layout_since_the_wire_has_its_own():
    layout = Layout.of({"weight": np.zeros(2, np.float32)})
    assert layout.flatten({"weight": np.array([1, 2])}).tolist() == [1, 2]


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"weight": MODEL["weight"], "bias": MODEL["bias"]},
        {**MODEL, "extra": np.zeros(1)},
        {**MODEL, "weight": MODEL["weight"].T},
        {**MODEL, "count": np.array([7])},
        {"bias": MODEL["bias"], "weight": MODEL["weight"], "count": MODEL["count"]},
        {"Weight": MODEL["weight"], "bias": MODEL["bias"], "count": MODEL["count"]},
    ],
    ids=["nothing", "missing", "extra", "transposed", "not a scalar", "order", "name"],
)
def test_another_model_is_refused(other):
    with pytest.raises(
        ConfigurationError,
        match=r"expected arrays \[weight\[2, 3\], bias\[2\], count\[\]\], found .*the same model",
    ):
        Layout.of(MODEL).flatten(other)


def test_a_refusal_does_not_list_a_whole_large_model():
    layout = Layout.of({f"layer{i}": np.zeros(1) for i in range(100)})
    with pytest.raises(ConfigurationError, match=r"layer5\[1\], and 94 more\], found \[\]"):
        layout.flatten({})


@pytest.mark.parametrize("shape", [(8,), (10,), (3, 3), (9, 1), ()])
def test_a_vector_of_another_shape_is_refused(shape):
    with pytest.raises(ConfigurationError, match=r"expected a vector of shape \(9,\), found"):
        Layout.of(MODEL).unflatten(np.zeros(shape))
