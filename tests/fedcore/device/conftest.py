"""A release whose answers are known by hand: logits = 10 · x, three classes."""

from math import inf

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedcore.crypto.entropy import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.manifest import Description, InputSpec, Metrics, Provenance
from fedcore.release import publish


def tenfold(classes=3, opset=18):
    weights = numpy_helper.from_array(10 * np.eye(classes, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "tenfold",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", classes])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [weights],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.fixture(scope="session")
def model():
    return tenfold()


@pytest.fixture(scope="session")
def key():
    return SigningKey.generate(ReplayedEntropy(b"publisher"))


@pytest.fixture(scope="session")
def description():
    return Description(
        name="tenfold",
        created_at="2026-01-31T12:00:00Z",
        inputs=InputSpec((3,), 0.0, 1.0),
        labels=("a", "b", "c"),
        metrics=Metrics(1.0, 1.0, 1.0),
        provenance=Provenance("run-1", 0, 5, inf, 0.0, "cd" * 32),
    )


@pytest.fixture
def models(tmp_path, model, description, key):
    """A folder with versions 1 and 2."""
    for _ in range(2):
        publish(tmp_path / "models", model, description, key)
    return tmp_path / "models"
