"""A model in training rounds as its release does, and keeps nothing of it."""

import numpy as np
import pytest
import torch

from fedcore.models import Cnn1d, LeNet, Mlp, build
from fedcore.release import export_onnx, quantize_int8, run_onnx
from fedcore.training import fake_int8

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
    assert np.abs(released - rounded).mean() < 0.2 * error  # values on a rounding edge may differ
    assert np.median(np.abs(released - rounded)) < 1e-2 * error
