"""A verified release as a classifier: onnxruntime and numpy, nothing else.

The session is built from the verified bytes, on one CPU thread unless told
otherwise: on a board that does other work, a thread pool that spins between
two samples costs more than it gains.

A quantised model saturates outside the range it was calibrated on. Inputs
beyond it are counted, not refused: a rising count is the cheapest sign that the
world has drifted away from the training data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.device.store import VerifiedRelease
from fedcore.errors import ConfigurationError, DataError, VerificationError
from fedcore.manifest import Manifest

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says about n samples.

    Attributes:
        classes: Shape [n], int64: the most probable class of each sample, as an
            index into the manifest's labels.
        probabilities: Shape [n, classes], float32; rows sum to 1, or are NaN for inputs
            that are not finite.
        out_of_range: How many samples left the calibrated input range, or hold NaN.
    """

    classes: npt.NDArray[np.int64] = field(repr=False)
    probabilities: npt.NDArray[np.float32] = field(repr=False)
    out_of_range: int


class Classifier:
    """Runs one release."""

    def __init__(self, release: VerifiedRelease, *, threads: int = 1) -> None:
        """Load the model.

        Args:
            release: From `open_release`.
            threads: CPU threads for one prediction.

        Raises:
            ConfigurationError: This onnxruntime is older than the model needs.
            VerificationError: The signed file is no model, or not the one described.
        """
        if threads < 1:
            msg = f"threads must be at least 1, got {threads}"
            raise ConfigurationError(msg)
        self.manifest = release.manifest
        self._session = _session(release, threads)
        self._input = self._session.get_inputs()[0].name

    def predict(self, x: npt.NDArray[np.float32]) -> Prediction:
        """Classify n samples; a large n runs in batches, so memory stays flat.

        Args:
            x: Shape [n, *input_shape], float32, scaled as in training.

        Raises:
            DataError: `x` has another shape or type.
        """
        inputs = self.manifest.description.inputs
        if x.dtype != np.float32 or x.shape[1:] != inputs.shape or x.ndim == 0:
            msg = (
                f"expected float32 inputs of shape [n, {', '.join(map(str, inputs.shape))}], "
                f"found {x.dtype} {list(x.shape)}"
            )
            raise DataError(msg)
        parts = [x[start : start + _BATCH] for start in range(0, len(x), _BATCH)] or [x]
        probabilities = np.concatenate([_softmax(self._run(part)) for part in parts])
        return Prediction(
            classes=probabilities.argmax(axis=1),
            probabilities=probabilities,
            out_of_range=len(x) - _count_inside(x, inputs.low, inputs.high),
        )

    def _run(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits: npt.NDArray[np.float32] = self._session.run(None, {self._input: x})[0]
        return logits


# `Any` stands for onnxruntime's session: the package has no types.


def _session(release: VerifiedRelease, threads: int) -> Any:
    import onnxruntime  # noqa: PLC0415  (0.2 s and 20 MB that a mere verification need not pay)

    needed = release.manifest.description.runtime.min_onnxruntime
    if _numbers(onnxruntime.__version__) < _numbers(needed):
        msg = f"this model needs onnxruntime {needed}, found {onnxruntime.__version__}: update it"
        raise ConfigurationError(msg)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            release.model, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's errors share no other base class
        msg = f"onnxruntime refuses the signed {release.manifest.file.name}: {error}"
        raise VerificationError(msg) from error
    _check_signature(session, release.manifest)
    return session


def _check_signature(session: Any, manifest: Manifest) -> None:
    found = [
        [(port.type, tuple(port.shape[1:])) for port in ports]
        for ports in (session.get_inputs(), session.get_outputs())
    ]
    description = manifest.description
    expected = [
        [("tensor(float)", description.inputs.shape)],
        [("tensor(float)", (len(description.labels),))],
    ]
    if found != expected:
        msg = (
            f"{manifest.file.name} must map {expected[0]} to {expected[1]} per sample, as the "
            f"manifest says, but maps {found[0]} to {found[1]}: publish it again"
        )
        raise VerificationError(msg)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _count_inside(x: npt.NDArray[np.float32], low: float, high: float) -> int:
    # One flat axis: numpy reduces several axes at once four times slower. NaN is not inside.
    flat = x.reshape(len(x), -1) if x.size else x.reshape(0, 1)
    return int(np.count_nonzero((flat.min(axis=1) >= low) & (flat.max(axis=1) <= high)))


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with np.errstate(invalid="ignore"):  # NaN and infinity give NaN; they count as out of range
        powers: npt.NDArray[np.float32] = np.exp(logits - logits.max(axis=1, keepdims=True))
        powers /= powers.sum(axis=1, keepdims=True)
    return powers
