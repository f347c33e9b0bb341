"""What a released file costs whoever runs it, counted rather than measured.

Latency depends on the machine and on who else uses it; multiplications and weights do
not. They are counted in the file itself, so that a release of somebody else, whose torch
model is not at hand, is counted like ours. In an int8 file each weight passes through a
DequantizeLinear, which a runtime merges with the operation behind it:

    int8 initializer ──DequantizeLinear──▶ Conv, Gemm, MatMul      a weight
    scales and zero points                                         part of the rounding
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcore.release.export import Inputs, run_onnx

_ROUNDING: Final = frozenset(("QuantizeLinear", "DequantizeLinear"))
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A model file: what it takes, and how good it is.

    Attributes:
        parameters: Weights and biases.
        macs: Multiply-accumulate operations of all convolutions and matrix products, for one
            sample.
        onnx_bytes: Size of the file.
        accuracy: On the test examples.
    """

    parameters: int
    macs: int
    onnx_bytes: int
    accuracy: float


def measure(file: bytes, x_test: Inputs, y_test: npt.NDArray[np.integer]) -> Measured:
    """Return what an ONNX file takes and how well it classifies.

    Args:
        file: As `fedcore.release` writes it, float32 or int8.
        x_test: Shape [n, *input_shape].
        y_test: Shape [n], class indices.
    """
    parameters, macs = count(file)
    found = run_onnx(file, x_test).argmax(axis=1)
    return Measured(parameters, macs, len(file), float(np.mean(found == y_test)))


def count(file: bytes) -> tuple[int, int]:
    """Return the weights of an ONNX file, and its multiply-accumulate operations a sample."""
    import onnx  # noqa: PLC0415

    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(file)).graph
    shapes, weights = _shapes(graph), _weights(graph)
    working = [node for node in graph.node if node.op_type not in _ROUNDING]
    used = {name for node in working for name in node.input} & weights
    return (
        sum(prod(shapes[name]) for name in used),
        sum(_macs(node, shapes) for node in working),
    )


def _shapes(graph: Any) -> Shapes:
    """Return the shape of each value for one sample: a free axis, the batch, counts once."""
    shapes: Shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.output):
        axes = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(axis.dim_value or 1 for axis in axes)
    return shapes


def _weights(graph: Any) -> set[str]:
    """Return what holds trained numbers: floats as they are, integers once they are scaled."""
    import onnx  # noqa: PLC0415

    stored = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.dims}
    plain = {name for name, kind in stored.items() if kind == onnx.TensorProto.FLOAT}
    scaled = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    return plain | scaled


def _macs(node: Any, shapes: Shapes) -> int:
    if node.op_type == "Conv":  # each output sums over a window of the input's channels
        return prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])
    if node.op_type in {"Gemm", "MatMul"}:
        return prod(shapes[node.input[1]])
    return 0
