"""From a torch model to one small ONNX file of 8-bit integers.

    float model ──torch.onnx──▶ float ONNX ──calibrate, quantize──▶ int8 ONNX ──trim──▶ bytes

Weights become int8 with one scale per output channel, activations int8 with one
scale per tensor, taken from the range that calibration inputs produce (static
quantisation, QDQ format): the runtime then computes in integers. The logits stay
float. 256 steps over their whole range would turn near misses into ties, and the
last layer yields float for nothing.

What the exporter adds for its own debugging is removed: in a small model the
stack traces outweigh the weights, and they name files of the exporting machine.

Everything heavy is imported when a function is called.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    import torch

Inputs = npt.NDArray[np.float32]
"""Shape [n, *input_shape]."""

OPSET: Final = 18
INPUT: Final = "x"
OUTPUT: Final = "logits"
_BATCH: Final = 64
# With one of these last, the quantizer folds it into the scale of the logits.
_FOLDED_ACTIVATIONS: Final = {"Relu", "Clip"}


def export_onnx(model: torch.nn.Module, input_shape: tuple[int, ...], path: Path) -> None:
    """Write `model` to `path` as float32 ONNX with a free batch size.

    The caller's model is left as it is: a copy is moved to the CPU and put into
    evaluation mode.

    Args:
        model: Maps float32 [n, *input_shape] to logits [n, classes].
        input_shape: Of one sample, without the batch axis.
        path: Is overwritten.

    Raises:
        ConfigurationError: The model does not take this input, or cannot be traced.
    """
    import torch  # noqa: PLC0415
    from torch.onnx.errors import OnnxExporterError  # noqa: PLC0415

    name = f"{type(model).__name__} for inputs [n, {', '.join(map(str, input_shape))}]"
    traced = copy.deepcopy(model).cpu().eval()
    # Two samples: an example of one would fix the batch size at one.
    example = torch.zeros(2, *input_shape)
    _check_forward(name, traced, example)
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                traced,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except OnnxExporterError as error:
        msg = f"{name} cannot be exported: forward() must not branch on values or on n"
        raise ConfigurationError(msg) from error
    proto = program.model_proto
    _trim(proto)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def quantize_int8(float_path: Path, int8_path: Path, calibration: Inputs) -> None:
    """Write the int8 version of the ONNX model at `float_path` to `int8_path`.

    Args:
        float_path: As written by `export_onnx`.
        int8_path: Is overwritten.
        calibration: Shape [n, *input_shape]. Their range is all that the integers
            can express, and it leaves with the model: use public data that look
            like what devices will see.

    Raises:
        DataError: There are no calibration inputs, or some are not finite.
    """
    import onnx  # noqa: PLC0415

    check_inputs("calibration inputs", calibration)
    with TemporaryDirectory(prefix="fedcore-") as scratch:
        folded = Path(scratch, "folded.onnx")
        raw = Path(scratch, "int8.onnx")
        with _quiet():
            _quantize(float_path, folded, raw, calibration)
        proto = onnx.load(raw)
        last = _producers(onnx.load(folded))[OUTPUT].op_type
    if last not in _FOLDED_ACTIVATIONS:
        _leave_logits_float(proto)
    _trim(proto)
    int8_path.write_bytes(proto.SerializeToString(deterministic=True))


def run_onnx(model: bytes, x: Inputs) -> npt.NDArray[np.float32]:
    """Return the logits [n, classes] of an ONNX model on x [n, *input_shape]."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    parts = [session.run([OUTPUT], {INPUT: part})[0] for part in batches(x)]
    return np.concatenate(parts, dtype=np.float32)


def check_inputs(what: str, x: Inputs) -> None:
    """Return if `x` are usable model inputs.

    Raises:
        DataError: They are none, not float32, or not finite.
    """
    if x.dtype != np.float32 or x.ndim < 2 or len(x) == 0:
        msg = f"{what} must be float32 of shape [n, ...] with n > 0, got {x.dtype} {list(x.shape)}"
        raise DataError(msg)
    if not np.isfinite(x).all():
        msg = f"{what} must be finite, got NaN or infinity: clean the data set"
        raise DataError(msg)


def batches(x: Inputs) -> Iterator[Inputs]:
    """Yield `x` in parts of at most 64 samples, so that activations stay small."""
    return (x[start : start + _BATCH] for start in range(0, len(x), _BATCH))


def _quantize(float_path: Path, folded: Path, raw: Path, calibration: Inputs) -> None:
    from onnxruntime.quantization import (  # noqa: PLC0415
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = batches(calibration)

        def get_next(self) -> dict[str, Inputs] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    quant_pre_process(float_path, folded)
    quantize_static(
        folded,
        raw,
        Batches(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )


def _check_forward(name: str, model: torch.nn.Module, example: torch.Tensor) -> None:
    import torch  # noqa: PLC0415

    try:
        with torch.no_grad():
            shape = tuple(model(example).shape)
    except RuntimeError as error:
        msg = f"{name} fails: check the input shape ({error})"
        raise ConfigurationError(msg) from error
    if len(shape) != 2 or shape[0] != len(example):
        msg = f"{name} must return logits [n, classes], got {list(shape)} for n = {len(example)}"
        raise ConfigurationError(msg)


# Below, `Any` stands for onnx's protobuf messages, which have no types.


def _producers(proto: Any) -> dict[str, Any]:
    return {name: node for node in proto.graph.node for name in node.output}


def _leave_logits_float(proto: Any) -> None:
    """Cut the last pair: producer -> Quantize -> Dequantize -> logits."""
    graph = proto.graph
    producers = _producers(proto)
    readers = Counter(name for node in graph.node for name in node.input)
    dequantize = producers[OUTPUT]
    quantize = producers.get(dequantize.input[0])
    if dequantize.op_type != "DequantizeLinear" or quantize is None:
        return
    producer = producers.get(quantize.input[0])
    if producer is None or readers[quantize.input[0]] != 1 or readers[quantize.output[0]] != 1:
        return
    index = list(producer.output).index(quantize.input[0])
    producer.output[index] = OUTPUT
    graph.node.remove(quantize)
    graph.node.remove(dequantize)


def _trim(proto: Any) -> None:
    """Remove what no runtime reads: debugging notes, orphans, unused operator sets."""
    graph = proto.graph
    used = {name for node in graph.node for name in node.input}
    for orphan in [entry for entry in graph.initializer if entry.name not in used]:
        graph.initializer.remove(orphan)
    del graph.value_info[:]
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    domains = {node.domain for node in graph.node}
    for orphan in [entry for entry in proto.opset_import if entry.domain not in domains]:
        proto.opset_import.remove(orphan)


@contextmanager
def _quiet() -> Iterator[None]:
    """Mute three notes that no caller can act on; let everything else through."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec", FutureWarning)
            yield
    finally:
        registration.setLevel(level)
