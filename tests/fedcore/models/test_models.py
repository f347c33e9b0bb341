"""Models have the published sizes, follow from their seed, and fit or refuse their input."""

import subprocess
import sys

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

import fedcore.models
from fedcore.errors import ConfigurationError
from fedcore.models import (
    Cnn,
    Cnn1d,
    LeNet,
    Logistic,
    Mlp,
    ModelConfig,
    TwoNN,
    build,
    parameter_count,
)

MNIST = (1, 28, 28)
SIZES = [
    (Logistic(), MNIST, 10, 7_850),
    (Logistic(), (13,), 2, 28),
    (Mlp(), (1, 8, 8), 10, 9_610),
    (Mlp(hidden=(32, 16)), (5,), 3, 5 * 32 + 32 + 32 * 16 + 16 + 16 * 3 + 3),
    (TwoNN(), MNIST, 10, 199_210),  # as printed in McMahan et al., section 3
    (Cnn(), MNIST, 10, 1_663_370),  # as printed in McMahan et al., section 3
    (Cnn(), (3, 32, 32), 10, 2_156_490),
    (LeNet(), MNIST, 10, 61_706),
    (LeNet(), (1, 32, 32), 10, 61_706),
    (Cnn1d(channels=8, kernel=3, hidden=16), (2, 12), 3, 56 + 200 + 400 + 51),
]
ids = [f"{config.kind}{list(shape)}" for config, shape, _, _ in SIZES]


@pytest.mark.parametrize(("config", "shape", "classes", "count"), SIZES, ids=ids)
def test_a_model_has_its_published_size_and_one_logit_a_class(config, shape, classes, count):
    model = build(config, shape, classes, seed=0)
    assert parameter_count(model) == count
    assert model(torch.zeros(3, *shape)).shape == (3, classes)


@pytest.mark.parametrize(("config", "shape", "classes", "count"), SIZES, ids=ids)
def test_a_model_is_a_plain_chain_without_buffers(config, shape, classes, count):
    model = build(config, shape, classes, seed=0)
    plain = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.Flatten}
    assert {type(layer) for layer in model} <= plain
    assert not list(model.buffers())


@pytest.mark.parametrize("config", [TwoNN(), Cnn(), LeNet()])
def test_the_seed_alone_decides_the_weights(config):
    one = build(config, MNIST, 10, seed=7).state_dict()
    torch.manual_seed(123)
    two = build(config, MNIST, 10, seed=7).state_dict()
    other = build(config, MNIST, 10, seed=8).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_building_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    build(LeNet(), MNIST, 10, seed=5)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (Cnn(), (1, 8, 8), r"cnn needs images of at least 12x12 .*, got \[1, 8, 8\]: choose"),
        (Cnn(), (1, 28, 11), "cnn needs images of at least 12x12"),
        (Cnn(), (784,), r"cnn needs images .* got \[784\]"),
        (LeNet(), (1, 27, 28), "lenet needs images of at least 28x28"),
        (Cnn1d(), MNIST, "cnn1d with kernel 5 needs windows"),
        (Cnn1d(kernel=9), (2, 8), "at least 9 samples"),
        (Mlp(), (), "at least one value"),
        (Mlp(), (3, 0), "at least one value"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_before_training(config, shape, message):
    with pytest.raises(ConfigurationError, match=message):
        build(config, shape, 10, seed=0)


@pytest.mark.parametrize(("classes", "seed"), [(1, 0), (0, 0), (2, -1), (2, 2**63)])
def test_too_few_classes_and_seeds_out_of_range_are_refused(classes, seed):
    with pytest.raises(ConfigurationError):
        build(Logistic(), (4,), classes, seed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mlp(hidden=()), "kind=logistic"),
        (lambda: Mlp(hidden=(8, 0)), "model.hidden"),
        (lambda: Cnn1d(channels=0), "model.channels"),
        (lambda: Cnn1d(hidden=0), "model.hidden"),
        (lambda: Cnn1d(kernel=4), "odd"),
    ],
)
def test_a_width_out_of_range_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    "config", [Logistic(), Mlp(hidden=(3, 4)), TwoNN(), Cnn(), LeNet(), Cnn1d()]
)
def test_configuration_is_validated_by_kind(config):
    fields = {name: getattr(config, name) for name in config.__slots__}
    assert TypeAdapter(ModelConfig).validate_python(fields) == config


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'ResNet'"):
        fedcore.models.ResNet  # noqa: B018


def test_checking_a_fit_needs_no_torch():
    code = (
        "import sys; from fedcore.models import Cnn, check_fit; check_fit(Cnn(), (1, 28, 28));"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
