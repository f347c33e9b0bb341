"""A trained model in, a published and checked release out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedcore.crypto.signatures import SigningKey
from fedcore.errors import DataError
from fedcore.manifest import (
    Description,
    InputSpec,
    Metrics,
    Provenance,
)
from fedcore.release.check import DeviceCheck, check_on_device
from fedcore.release.export import (
    Inputs,
    batches,
    check_inputs,
    export_onnx,
    quantize_int8,
    run_onnx,
)
from fedcore.release.publish import draft
from fedcore.release.size import count

if TYPE_CHECKING:
    import torch

Labels = npt.NDArray[np.integer]
"""Shape [n], class indices."""


@dataclass(frozen=True, slots=True)
class ReleaseReport:
    """What was published, and how it compares with the float model.

    Attributes:
        path: Folder of this version.
        version: Its number.
        parameters: Weights and biases.
        macs: Multiply-accumulate operations a sample, see `fedcore.release.size`.
        onnx_bytes: Size of the released int8 file.
        float_bytes: Size of the same model as float32 ONNX.
        float_accuracy: Of the torch model on the test set.
        int8_accuracy: Of the released file on the test set.
        agreement: Share of test samples that both classify alike.
        device: What a separate process without torch measured.
    """

    path: Path
    version: int
    parameters: int
    macs: int
    onnx_bytes: int
    float_bytes: int
    float_accuracy: float
    int8_accuracy: float
    agreement: float
    device: DeviceCheck


def release_model(
    model: torch.nn.Module,
    *,
    folder: Path,
    name: str,
    labels: tuple[str, ...],
    calibration: Inputs,
    x_test: Inputs,
    y_test: Labels,
    key: SigningKey,
    provenance: Provenance,
    created_at: str,
) -> ReleaseReport:
    """Export, quantise, measure, sign, run as a device would, and only then publish.

    Args:
        model: Maps float32 [n, *input_shape] to logits [n, classes]; is not changed.
        folder: Of all versions of this model; the new one becomes `folder/<version>`.
        name: Of the model.
        labels: Names of the classes.
        calibration: Shape [n, *input_shape]: public inputs that look like real ones.
            Their range is published, and they are what int8 can express.
        x_test: Shape [n, *input_shape].
        y_test: Shape [n].
        key: Signs the release.
        provenance: Where the weights come from.
        created_at: ISO 8601 with a time zone.

    Raises:
        ConfigurationError: The model cannot be exported, or a description is out of range.
        DataError: The arrays do not fit together.
        VerificationError: The release does not work in another process; it is not published.
    """
    _check_arrays(calibration, x_test, y_test)
    input_shape = calibration.shape[1:]
    onnx, float_bytes = int8_file(model, calibration)
    parameters, macs = count(onnx)
    float_classes = _classify(model, x_test)
    int8_classes = run_onnx(onnx, x_test).argmax(axis=1)
    metrics = Metrics(
        float_accuracy=float(np.mean(float_classes == y_test)),
        int8_accuracy=float(np.mean(int8_classes == y_test)),
        agreement=float(np.mean(int8_classes == float_classes)),
    )
    description = Description(
        name=name,
        created_at=created_at,
        inputs=InputSpec(input_shape, float(calibration.min()), float(calibration.max())),
        labels=labels,
        metrics=metrics,
        provenance=provenance,
    )
    with (
        TemporaryDirectory(prefix="fedcore-") as scratch,
        draft(folder, onnx, description, key) as release,
    ):
        public_key = Path(scratch, "public.pem")
        public_key.write_bytes(key.public.to_pem())
        device = check_on_device(release.path, public_key, x_test, y_test, float_classes)
    return ReleaseReport(
        path=release.target,
        version=int(release.target.name),
        parameters=parameters,
        macs=macs,
        onnx_bytes=len(onnx),
        float_bytes=float_bytes,
        float_accuracy=metrics.float_accuracy,
        int8_accuracy=metrics.int8_accuracy,
        agreement=metrics.agreement,
        device=device,
    )


def int8_file(model: torch.nn.Module, calibration: Inputs) -> tuple[bytes, int]:
    """Return `model` as an int8 ONNX file, and the size of the float32 one in bytes.

    Args:
        model: Maps float32 [n, *input_shape] to logits [n, classes]; is not changed.
        calibration: Shape [n, *input_shape].

    Raises:
        ConfigurationError: The model cannot be exported.
        DataError: There are no calibration inputs, or some are not finite.
    """
    with TemporaryDirectory(prefix="fedcore-") as scratch:
        float_path, int8_path = Path(scratch, "float.onnx"), Path(scratch, "int8.onnx")
        export_onnx(model, calibration.shape[1:], float_path)
        quantize_int8(float_path, int8_path, calibration)
        return int8_path.read_bytes(), float_path.stat().st_size


def _check_arrays(calibration: Inputs, x_test: Inputs, y_test: Labels) -> None:
    check_inputs("calibration inputs", calibration)
    check_inputs("test inputs", x_test)
    fits = x_test.shape[1:] == calibration.shape[1:] and y_test.shape == (len(x_test),)
    if not fits or y_test.dtype.kind not in "iu":
        msg = (
            f"expected test inputs [n, ...] like the calibration inputs {list(calibration.shape)} "
            f"and integer labels [n], found {list(x_test.shape)} and {list(y_test.shape)} "
            f"{y_test.dtype}"
        )
        raise DataError(msg)


def _classify(model: torch.nn.Module, x: Inputs) -> npt.NDArray[np.int64]:
    import torch  # noqa: PLC0415

    still = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        parts = [still(torch.tensor(part)).argmax(dim=1) for part in batches(x)]
    return torch.cat(parts).numpy()
