"""Pruned models are the described ones, and what they lose is what counted least."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import ConfigurationError
from fedcore.models import (
    Cnn,
    Cnn1d,
    LeNet,
    Logistic,
    Mlp,
    NoPruning,
    Structured,
    TwoNN,
    build,
    fitting_widths,
    hidden_widths,
    parameter_count,
    prune,
    pruned_widths,
    widths_of,
)

MODELS = [
    (Mlp(hidden=(20, 12)), (1, 8, 8)),
    (TwoNN(), (7,)),
    (LeNet(), (1, 28, 28)),
    (Cnn(), (2, 14, 12)),
    (Cnn1d(channels=10, kernel=3, hidden=9), (3, 16)),
]
IDS = [config.kind for config, _ in MODELS]


def state(model):
    return {name: array.numpy() for name, array in model.state_dict().items()}


@pytest.mark.parametrize(("config", "shape"), MODELS, ids=IDS)
def test_a_pruned_model_is_the_one_that_the_configuration_describes(config, shape):
    model = build(config, shape, 10, seed=1)
    widths = pruned_widths(config, Structured(ratio=0.6))
    small, described = prune(model, shape, widths), build(config, shape, 10, 0, widths)
    assert [(name, array.shape) for name, array in state(small).items()] == [
        (name, array.shape) for name, array in state(described).items()
    ]
    assert [type(layer) for layer in small] == [type(layer) for layer in described]
    assert parameter_count(small) < parameter_count(model)
    assert widths_of(state(small)) == widths
    assert widths_of(state(model)) == hidden_widths(config)


@pytest.mark.parametrize(("config", "shape"), MODELS, ids=IDS)
def test_channels_of_zeros_go_first_and_nobody_notices(config, shape):
    model = build(config, shape, 10, seed=1)
    widths = pruned_widths(config, Structured(ratio=0.5))
    rng = np.random.default_rng(0)
    layers = [layer for layer in model if hasattr(layer, "weight")][:-1]
    with torch.no_grad():
        for layer, width in zip(layers, widths, strict=True):
            dead = rng.permutation(len(layer.weight))[width:]
            layer.weight[dead] = 0
            layer.bias[dead] = 0
        _silence_readers(model, layers)
    small = prune(model, shape, widths)
    x = torch.from_numpy(rng.random((5, *shape), dtype=np.float32))
    with torch.no_grad():
        expected, found = model(x), small(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 0


def _silence_readers(model, layers):
    """Zero the weights that read a dead channel: a group is judged as a whole."""
    weighted = [layer for layer in model if hasattr(layer, "weight")]
    for layer, reader in zip(layers, weighted[1:], strict=True):
        dead = layer.weight.flatten(1).abs().sum(1) == 0
        maps = reader.weight.reshape(len(reader.weight), len(layer.weight), -1)
        maps[:, dead] = 0
        reader.weight.copy_(maps.reshape(reader.weight.shape))


def test_the_weakest_units_go_and_the_others_keep_their_order():
    model = build(Mlp(hidden=(6,)), (4,), 3, seed=0)
    strength = torch.tensor([5.0, 1.0, 3.0, 6.0, 2.0, 4.0])
    with torch.no_grad():
        model.fc1.weight.copy_(torch.ones(6, 4) * strength[:, None])
        model.output.weight.copy_(torch.ones(3, 6) * strength)
    small = prune(model, (4,), (3,))
    assert small.fc1.weight[:, 0].tolist() == [5.0, 6.0, 4.0]
    assert small.output.weight[0].tolist() == [5.0, 6.0, 4.0]
    assert small.fc1.bias.tolist() == model.fc1.bias[[0, 3, 5]].tolist()


def test_pruning_leaves_the_model_that_it_was_given():
    model = build(LeNet(), (1, 28, 28), 10, seed=3)
    before = {name: array.copy() for name, array in state(model).items()}
    one, two = (prune(model, (1, 28, 28), (3, 8, 60, 42)) for _ in range(2))
    for name, array in state(model).items():
        np.testing.assert_array_equal(array, before[name])
    for name, array in state(one).items():
        np.testing.assert_array_equal(array, state(two)[name])


@pytest.mark.parametrize("widths", [(3,), (3, 8, 60, 85), (0, 8, 60, 42), (3, 8, 60, 42, 10)])
def test_widths_that_do_not_fit_are_refused(widths):
    with pytest.raises(ConfigurationError, match=r"at most \[6, 16, 120, 84\]"):
        prune(build(LeNet(), (1, 28, 28), 10, seed=3), (1, 28, 28), widths)


def test_a_model_is_built_with_a_width_for_each_hidden_layer():
    with pytest.raises(ConfigurationError, match=r"has 4 hidden layers, got widths \[3, 8\]"):
        build(LeNet(), (1, 28, 28), 10, 0, (3, 8))


@given(
    width=st.integers(1, 600),
    ratio=st.floats(0.01, 0.99),
    multiple=st.integers(1, 64),
)
def test_what_stays_is_a_multiple_that_is_no_less_than_asked(width, ratio, multiple):
    try:
        pruned = pruned_widths(Mlp(hidden=(width,)), Structured(ratio, 0, multiple))
    except ConfigurationError:
        assert width * ratio < max(multiple, 1) + 1e-6 or width == 1
        return
    (left,) = pruned
    assert left < width
    assert left % multiple == 0
    assert left >= width * (1 - ratio) - 1e-6
    assert left - multiple < max(1, width * (1 - ratio))


def test_round_shares_are_taken_exactly():
    assert pruned_widths(Mlp(hidden=(20, 10)), Structured(ratio=0.9)) == (2, 1)
    assert pruned_widths(Mlp(hidden=(128,)), Structured(ratio=0.5, multiple=8)) == (64,)
    assert pruned_widths(LeNet(), Structured(ratio=0.5, multiple=8)) == (6, 8, 64, 48)
    assert pruned_widths(LeNet(), NoPruning()) is None


@pytest.mark.parametrize(
    ("config", "pruning"),
    [(Logistic(), Structured()), (Mlp(hidden=(6,)), Structured(0.5, 0, 8)),
     (Mlp(hidden=(1,)), Structured(0.9))],
)  # fmt: skip
def test_pruning_that_removes_nothing_is_refused(config, pruning):
    with pytest.raises(ConfigurationError, match=r"as they are: raise the ratio"):
        pruned_widths(config, pruning)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"ratio": 0.0}, "ratio"), ({"ratio": 1.0}, "ratio"), ({"after_round": -1}, "after_round"),
     ({"multiple": 0}, "multiple")],
)  # fmt: skip
def test_ranges_of_pruning_are_checked(values, message):
    with pytest.raises(ConfigurationError, match=rf"pruning\.{message} must be"):
        Structured(**values)


def test_only_the_two_sizes_of_the_configuration_are_ever_built():
    config, pruning = Mlp(hidden=(20,)), Structured(ratio=0.5)
    sizes = {width: state(build(config, (4,), 3, 0, (width,))) for width in (20, 10, 5, 4000)}
    fits = {width: fitting_widths(config, pruning, arrays) for width, arrays in sizes.items()}
    assert fits == {20: None, 10: (10,), 5: None, 4000: None}
    assert fitting_widths(config, NoPruning(), sizes[10]) is None
