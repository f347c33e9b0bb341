"""What a file takes is what torch says of the model that it was made from."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedcore.models import Cnn, Cnn1d, LeNet, Logistic, Mlp, build, parameter_count
from fedcore.release import export_onnx, int8_file, measure
from fedcore.release.size import count

MODELS = [
    (Logistic(), (1, 8, 8)),
    (Mlp(hidden=(20, 12)), (7,)),
    (LeNet(), (1, 28, 28)),
    (Cnn(), (2, 14, 12)),
    (Cnn1d(channels=10, kernel=3, hidden=9), (3, 16)),
]


@pytest.mark.parametrize(("config", "shape"), MODELS, ids=[config.kind for config, _ in MODELS])
def test_both_files_have_the_weights_and_operations_that_torch_counts(config, shape, tmp_path):
    model = build(config, shape, 10, seed=0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape))
    expected = (parameter_count(model), counter.get_total_flops() // 2)
    export_onnx(model, shape, tmp_path / "float.onnx")
    calibration = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)
    file, float_bytes = int8_file(model, calibration)
    assert count((tmp_path / "float.onnx").read_bytes()) == expected
    assert count(file) == expected
    assert float_bytes == (tmp_path / "float.onnx").stat().st_size


def test_constants_that_were_not_trained_are_no_weights(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU6(), nn.Linear(3, 2, bias=False))
    export_onnx(model, (4,), tmp_path / "float.onnx")
    assert count((tmp_path / "float.onnx").read_bytes()) == (4 * 3 + 3 + 3 * 2, 4 * 3 + 3 * 2)


def test_a_file_is_measured_on_test_examples():
    model = build(Mlp(hidden=(8,)), (4,), 3, seed=0)
    x = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    with torch.no_grad():
        y = model(torch.from_numpy(x)).argmax(1).numpy()
    file, _ = int8_file(model, x)
    right = measure(file, x, y)
    assert right.accuracy >= 0.9
    assert measure(file, x, (y + 1) % 3).accuracy <= 0.1
    assert (right.parameters, right.macs, right.onnx_bytes) == (67, 56, len(file))
