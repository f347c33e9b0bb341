"""A model in training rounds as its release does, and keeps nothing of it."""

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.data import Digits, load
from fedcore.errors import ConfigurationError
from fedcore.models import Cnn1d, LeNet, Mlp, build
from fedcore.release import export_onnx, quantize_int8, run_onnx
from fedcore.training import LocalTraining, evaluate, fake_int8, train

MODELS = [
    (Mlp(hidden=(32, 16)), (1, 8, 8)),
    (LeNet(), (1, 28, 28)),
    (Cnn1d(channels=8, kernel=5, hidden=16), (3, 24)),
]


def inputs(shape, count=200, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, *shape)).astype(np.float32)


@pytest.mark.parametrize(("config", "shape"), MODELS, ids=lambda value: getattr(value, "kind", ""))
def test_the_forward_pass_is_that_of_the_released_file(config, shape, tmp_path):
    model, x = build(config, shape, 10, seed=4), inputs(shape)
    export_onnx(model, shape, tmp_path / "float.onnx")
    quantize_int8(tmp_path / "float.onnx", tmp_path / "int8.onnx", x)
    released = run_onnx((tmp_path / "int8.onnx").read_bytes(), x)
    with torch.no_grad():
        plain = model(torch.from_numpy(x)).numpy()
        rounded = fake_int8(model, x).eval()(torch.from_numpy(x)).numpy()
    error = np.abs(released - plain).mean()
    assert error > 0
    assert (
        np.abs(released - rounded).mean() < 0.4 * error
    )  # a value on a rounding edge may fall to either side
    assert np.quantile(np.abs(released - rounded), 0.1) < 1e-2 * error  # the same otherwise


def test_training_the_view_trains_the_model_towards_the_rounded_loss():
    data = load(Digits())
    x, y = data.x_train[:200], data.y_train[:200]
    model = build(Mlp(hidden=(16,)), data.input_shape, data.classes, seed=1)
    names = list(model.state_dict())
    before = evaluate(fake_int8(model, x).eval(), x, y).loss
    train(fake_int8(model, x), x, y, LocalTraining(epochs=20), np.random.default_rng(0))
    assert evaluate(fake_int8(model, x).eval(), x, y).loss < 0.5 * before
    assert list(model.state_dict()) == names  # nothing more to aggregate


def test_the_gradient_goes_straight_through_the_rounding():
    model, x = build(Mlp(hidden=(8,)), (4,), 3, seed=0), inputs((4,), count=20)
    gradients = []
    for chain in (model, fake_int8(model, x)):
        model.zero_grad()
        chain(torch.from_numpy(x)).square().sum().backward()
        gradients.append(np.concatenate([w.grad.numpy().ravel() for w in model.parameters()]))
    plain, rounded = gradients
    assert not np.array_equal(plain, rounded)
    cosine = plain @ rounded / np.linalg.norm(plain) / np.linalg.norm(rounded)
    assert cosine > 0.99


def test_ranges_widen_in_training_and_stay_in_evaluation():
    model, x = build(Mlp(hidden=(8,)), (4,), 3, seed=0), inputs((4,), count=20)
    view, wider = fake_int8(model, x), torch.from_numpy(10 * x)
    with torch.no_grad():
        clipped = view.eval()(wider)
        widened = view.train()(wider)
        exact = model(wider)
    assert (widened - exact).abs().mean() < 0.1 * (clipped - exact).abs().mean()


def test_layers_that_the_release_does_not_have_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match="found Tanh: choose qat=none"):
        fake_int8(model, inputs((4,)))
