"""The whole chain on real models: train on digits, export, quantise, sign, run elsewhere."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from torch import nn

from fedcore.device import Classifier, open_release
from fedcore.errors import ConfigurationError, DataError, VerificationError
from fedcore.release import (
    check_on_device,
    export_onnx,
    publish,
    quantize_int8,
    release_model,
    run_onnx,
)

LABELS = tuple("0123456789")
TIME = "2026-01-31T12:00:00Z"


@dataclasses.dataclass(frozen=True)
class Digits:
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@pytest.fixture(scope="module")
def digits():
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x, y = (bunch.images[order] / 16).astype(np.float32)[:, None], bunch.target[order]
    x.setflags(write=False)  # as arrays from a shared or mapped file are
    return Digits(x[:1297], y[:1297], x[1297:], y[1297:])


def train(model, digits):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = torch.tensor(digits.x_train), torch.tensor(digits.y_train)
    for batch in torch.arange(len(x)).repeat(8).split(64):
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def logits_of(model, x):
    with torch.no_grad():
        return model(torch.tensor(x)).numpy()


@pytest.fixture(scope="module")
def mlp(digits):
    torch.manual_seed(0)
    return train(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), digits
    )


@pytest.fixture(scope="module")
def chain(digits, key, provenance):
    """Arguments of `release_model`, all but model and folder."""
    return {
        "name": "digits",
        "labels": LABELS,
        "calibration": digits.x_train[:256],
        "x_test": digits.x_test,
        "y_test": digits.y_test,
        "key": key,
        "provenance": provenance,
        "created_at": TIME,
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory, mlp, chain):
    return release_model(mlp, folder=tmp_path_factory.mktemp("models"), **chain)


@pytest.fixture(scope="module")
def cnn_files(tmp_path_factory, digits):
    """A small CNN as torch module, float ONNX and int8 ONNX."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("cnn")
    export_onnx(train(model, digits), (1, 8, 8), folder / "float.onnx")
    quantize_int8(folder / "float.onnx", folder / "int8.onnx", digits.x_train[:256])
    return model, folder / "float.onnx", folder / "int8.onnx"


def test_int8_is_within_one_point_of_the_float_model(report):
    assert report.float_accuracy > 0.93
    assert abs(report.int8_accuracy - report.float_accuracy) <= 0.01
    assert report.agreement >= 0.99


def test_the_device_process_measures_what_the_publisher_measured(report):
    assert report.device.accuracy == report.int8_accuracy
    assert report.device.agreement == report.agreement


def test_the_device_process_is_light(report):
    # This process holds torch; the device's record must not inherit its memory.
    assert report.device.imported_modules_ok
    assert 20 < report.device.ready_memory_mb <= 110
    assert report.device.ready_memory_mb <= report.device.peak_memory_mb
    assert 0 < report.device.latency_ms < report.device.startup_ms


def test_the_released_file_is_about_a_third_of_the_small_float_model(report, mlp):
    parameters = sum(parameter.numel() for parameter in mlp.parameters())

    assert report.float_bytes < 4 * parameters + 1000
    assert report.onnx_bytes < parameters + 5000


def test_the_signed_manifest_says_what_was_measured(report, digits, key, provenance):
    manifest = open_release(report.path, key.public).manifest

    assert manifest.version == report.version == 1
    assert manifest.file.size == report.onnx_bytes
    assert manifest.description.metrics.agreement == report.agreement
    assert manifest.description.metrics.float_accuracy == report.float_accuracy
    assert manifest.description.inputs.shape == (1, 8, 8)
    assert manifest.description.inputs.high == digits.x_train[:256].max() == 1.0
    assert manifest.description.provenance == provenance
    assert manifest.description.created_at == TIME


def test_the_release_predicts_like_the_float_model(report, mlp, digits, key):
    found = Classifier(open_release(report.path, key.public)).predict(digits.x_test)
    expected = logits_of(mlp, digits.x_test)

    # Logits stay float, so no ties: the probabilities follow those of the float model.
    softmax = np.exp(expected - expected.max(1, keepdims=True))
    np.testing.assert_allclose(
        found.probabilities, softmax / softmax.sum(1, keepdims=True), atol=0.1
    )
    assert found.out_of_range == 0


def test_nothing_of_the_exporting_machine_is_in_the_release(report):
    data = (report.path / "model.onnx").read_bytes()

    for trace in (b".py", b"site-packages", b"torch", b"stack_trace"):
        assert trace not in data


def test_exporting_twice_gives_the_same_bytes(tmp_path, mlp, digits, report):
    export_onnx(mlp, (1, 8, 8), tmp_path / "float.onnx")
    quantize_int8(tmp_path / "float.onnx", tmp_path / "int8.onnx", digits.x_train[:256])

    assert (tmp_path / "int8.onnx").read_bytes() == (report.path / "model.onnx").read_bytes()


def test_the_callers_model_stays_in_training_mode(report, mlp):
    assert report.version == 1
    assert all(module.training for module in mlp.modules())


def test_the_float_export_computes_what_torch_computes(cnn_files, digits):
    model, float_path, _ = cnn_files

    np.testing.assert_allclose(
        run_onnx(float_path.read_bytes(), digits.x_test), logits_of(model, digits.x_test), atol=1e-4
    )


def test_a_quantised_cnn_agrees_with_its_float_model(cnn_files, digits):
    model, float_path, int8_path = cnn_files
    expected = logits_of(model, digits.x_test).argmax(1)
    found = run_onnx(int8_path.read_bytes(), digits.x_test).argmax(1)

    assert np.mean(expected == found) >= 0.99
    assert int8_path.stat().st_size < float_path.stat().st_size


def test_weights_are_int8_with_one_scale_per_output_channel(cnn_files):
    tensors = {entry.name: entry for entry in onnx.load(cnn_files[2]).graph.initializer}
    weights = [entry for name, entry in tensors.items() if name.endswith("weight_quantized")]

    assert len(weights) == 3
    for weight in weights:
        scales = tensors[weight.name.replace("_quantized", "_scale")]
        assert weight.data_type == TensorProto.INT8
        assert list(scales.dims) == [weight.dims[0]]


def test_quantised_logits_have_no_steps(cnn_files, digits):
    graph = onnx.load(cnn_files[2]).graph
    logits = run_onnx(cnn_files[2].read_bytes(), digits.x_test)

    assert graph.node[-1].op_type == "Gemm"
    assert len(np.unique(logits)) > 256 * logits.shape[1]


def test_an_activation_after_the_last_layer_survives_quantisation(tmp_path):
    weights = numpy_helper.from_array(np.float32([[4, -4], [-4, 4]]), "w")
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["logits"])],
        "ends with relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [weights],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        tmp_path / "float.onnx",
    )
    x = np.random.default_rng(0).random((100, 2), dtype=np.float32)
    quantize_int8(tmp_path / "float.onnx", tmp_path / "int8.onnx", x)

    found = run_onnx((tmp_path / "int8.onnx").read_bytes(), x)
    expected = np.maximum(x @ numpy_helper.to_array(weights), 0)

    np.testing.assert_allclose(found, expected, atol=0.1)
    assert found.min() >= 0


@pytest.mark.parametrize(
    ("model", "shape", "rule"),
    [
        (nn.Linear(3, 4), (5,), "check the input shape"),
        (nn.Flatten(0), (5,), r"must return logits \[n, classes\], got \[10\]"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path, model, shape, rule):
    with pytest.raises(ConfigurationError, match=rule):
        export_onnx(model, shape, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_branches_on_values_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="must not branch on values"):
        export_onnx(Branching(), (5,), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("calibration", np.zeros((0, 1, 8, 8), np.float32), "calibration inputs must be float32"),
        ("calibration", np.zeros((4, 1, 8, 8)), "got float64"),
        ("calibration", np.full((4, 1, 8, 8), np.nan, np.float32), "must be finite"),
        ("calibration", np.zeros((4, 64), np.float32), "like the calibration inputs"),
        ("x_test", np.zeros((3, 1, 8, 8), np.float32), r"integer labels \[n\], found"),
        ("y_test", np.zeros(500), r"integer labels \[n\], found .* float64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, mlp, chain, field, value, rule):
    with pytest.raises(DataError, match=rule):
        release_model(mlp, folder=tmp_path, **{**chain, field: value})
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_device_can_run_is_not_published(tmp_path, mlp, chain):
    # Ten logits, three names: the device finds the file unlike its description.
    with pytest.raises(VerificationError, match=r"status 2: error: model\.onnx must map"):
        release_model(mlp, folder=tmp_path, **{**chain, "labels": ("a", "b", "c")})
    assert list(tmp_path.iterdir()) == []


def test_the_check_reports_a_release_that_was_changed(tmp_path, description, key):
    release = publish(tmp_path / "models", b"weights", description, key)
    (release / "model.onnx").write_bytes(b"weighty")
    (tmp_path / "key.pem").write_bytes(key.public.to_pem())
    x, y = np.zeros((2, 3), np.float32), np.zeros(2, np.int64)

    with pytest.raises(VerificationError, match="must have 7 bytes with SHA-256"):
        check_on_device(tmp_path / "models", tmp_path / "key.pem", x, y, y)


def test_the_report_fits_into_a_summary(report):
    values = json.loads(json.dumps(dataclasses.asdict(report), default=str))

    assert values["path"].endswith("1")
    assert values["device"]["imported_modules_ok"] is True
