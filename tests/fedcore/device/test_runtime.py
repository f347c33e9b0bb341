import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from fedcore.device import Classifier, VerifiedRelease, open_release
from fedcore.errors import ConfigurationError, DataError, VerificationError
from fedcore.manifest import InputSpec, Manifest, ModelFile, Runtime

UNIT = np.eye(3, dtype=np.float32)


def release_of(data, description):
    return VerifiedRelease(Manifest(1, None, ModelFile.of(data), description), data)


@pytest.fixture(scope="module")
def classifier(model, description):
    return Classifier(release_of(model, description))


def test_a_class_is_the_largest_logit(classifier):
    found = classifier.predict(UNIT[[2, 0, 1, 1]])

    assert found.classes.tolist() == [2, 0, 1, 1]
    assert found.probabilities.dtype == np.float32


def test_probabilities_are_the_softmax_of_the_logits(classifier):
    expected = np.exp(10) / (np.exp(10) + 2)

    np.testing.assert_allclose(classifier.predict(UNIT[:1]).probabilities[0, 0], expected, 1e-6)


@given(x=arrays(np.float32, (5, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_probabilities_sum_to_one_however_large_the_inputs(classifier, x):
    found = classifier.predict(x)

    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert found.probabilities.min() >= 0


@given(
    x=arrays(
        np.float32, st.tuples(st.integers(0, 200), st.just(3)), elements=st.floats(0, 1, width=32)
    )
)
def test_a_batch_is_classified_like_its_samples(classifier, x):
    together = classifier.predict(x)

    assert together.probabilities.shape == (len(x), 3)
    for index in range(0, len(x), 37):
        alone = classifier.predict(x[index : index + 1])
        assert alone.classes[0] == together.classes[index]
        np.testing.assert_array_equal(alone.probabilities[0], together.probabilities[index])


@given(
    x=arrays(
        np.float32,
        st.tuples(st.integers(0, 9), st.just(3)),
        elements=st.sampled_from(np.float32([0, 0.5, 1, -1e-6, 1.000001, np.inf, np.nan])),
    )
)
def test_every_sample_outside_the_calibrated_range_is_counted_once(classifier, x):
    expected = sum(not all(0 <= value <= 1 for value in row) for row in x.tolist())

    assert classifier.predict(x).out_of_range == expected


@pytest.mark.parametrize(
    "x",
    [UNIT.astype(np.float64), UNIT[0], UNIT[None], UNIT[:, :2], np.float32(1)],
    ids=["float64", "one sample without batch", "one axis more", "two features", "a scalar"],
)
def test_an_input_of_another_shape_or_type_is_refused(classifier, x):
    with pytest.raises(DataError, match=r"expected float32 inputs of shape \[n, 3\], found"):
        classifier.predict(x)


def test_the_file_may_change_after_it_was_verified(models, key):
    release = open_release(models, key.public)
    (models / "2" / "model.onnx").write_bytes(b"something else")

    assert Classifier(release).predict(UNIT).classes.tolist() == [0, 1, 2]


def test_a_signed_file_that_is_no_model_is_refused(description):
    with pytest.raises(VerificationError, match="onnxruntime refuses the signed model"):
        Classifier(release_of(b"weights", description))


def two_outputs():
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in "xyz"]
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in "yz"]
    graph = helper.make_graph(nodes, "two", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("change", ["labels", "inputs", "model"])
def test_a_model_unlike_its_description_is_refused(model, description, change):
    wrong = {
        "labels": (model, replace(description, labels=("a", "b"))),
        "inputs": (model, replace(description, inputs=InputSpec((4,), 0.0, 1.0))),
        "model": (two_outputs(), description),
    }
    with pytest.raises(VerificationError, match=r"model\.onnx must map"):
        Classifier(release_of(*wrong[change]))


def test_a_model_for_a_newer_runtime_is_refused_before_it_is_loaded(model, description):
    newer = replace(description, runtime=Runtime("99.0"))

    with pytest.raises(ConfigurationError, match=r"needs onnxruntime 99.0, found .*: update it"):
        Classifier(release_of(model, newer))


def test_the_number_of_threads_does_not_change_the_answer(model, description, classifier):
    two = Classifier(release_of(model, description), threads=2)

    np.testing.assert_array_equal(
        two.predict(UNIT).probabilities, classifier.predict(UNIT).probabilities
    )
    with pytest.raises(ConfigurationError, match="threads must be at least 1, got 0"):
        Classifier(release_of(model, description), threads=0)


def test_importing_the_device_package_loads_no_training_library_and_no_runtime():
    script = "import sys, fedcore.device; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())

    assert {"fedcore", "numpy", "cryptography"} <= loaded
    assert not loaded & {
        "torch",
        "flwr",
        "opacus",
        "sklearn",
        "hydra",
        "ray",
        "onnx",
        "onnxruntime",
    }
