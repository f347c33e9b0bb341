"""The release as a device sees it: another process, without torch, from the files.

What the publisher measured in its own process proves little: the weights were
still in memory and every library was at hand. This check starts
`python -m fedcore.device` on the published folder, with nothing but the public
key and a file of samples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

import fedcore
from fedcore.errors import VerificationError

_TIMEOUT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """What the device process reported.

    Attributes:
        accuracy: On the test set.
        agreement: Share of samples classified as by the float model.
        latency_ms: Median for one sample on one thread.
        startup_ms: To the first prediction, without starting Python itself.
        ready_memory_mb: Peak resident memory with the model loaded.
        peak_memory_mb: Peak resident memory with the test set, too.
        imported_modules_ok: Whether it stayed free of the training libraries.
    """

    accuracy: float
    agreement: float
    latency_ms: float
    startup_ms: float
    ready_memory_mb: float
    peak_memory_mb: float
    imported_modules_ok: bool


def check_on_device(
    release_folder: Path,
    key_path: Path,
    x_test: npt.NDArray[np.float32],
    y_test: npt.NDArray[np.integer],
    float_predictions: npt.NDArray[np.integer],
) -> DeviceCheck:
    """Verify and run a published release in a process of its own.

    Args:
        release_folder: One version, or the folder of versions.
        key_path: PEM file of the public key.
        x_test: Shape [n, *input_shape].
        y_test: Shape [n], true classes.
        float_predictions: Shape [n], classes chosen by the float model.

    Raises:
        VerificationError: The device refuses the release, or cannot run it.
    """
    with TemporaryDirectory(prefix="fedcore-") as scratch:
        data = Path(scratch, "samples.npz")
        np.savez(data, x=x_test, y=y_test, reference=float_predictions)
        command = [
            *(sys.executable, "-m", "fedcore.device", "--json"),
            *("--release", str(release_folder.resolve()), "--key", str(key_path.resolve())),
            *("--data", str(data)),
        ]
        try:
            done = subprocess.run(  # noqa: S603  (our own interpreter, no shell)
                command,
                cwd=scratch,
                env=_environment(),
                capture_output=True,
                text=True,
                check=False,
                timeout=_TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            msg = f"the device process gave no answer within {_TIMEOUT_SECONDS} s"
            raise VerificationError(msg) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        msg = f"the device process ended with status {done.returncode}: {reason}"
        raise VerificationError(msg)
    report = json.loads(done.stdout)
    foreign = report.pop("foreign_modules")
    measured = {name: report[name] for name in DeviceCheck.__slots__ if name in report}
    return DeviceCheck(**measured, imported_modules_ok=not foreign)


def _environment() -> dict[str, str]:
    """Return ours, with the folder of this very package first on the import path.

    So the device process runs this code, installed or not, wherever it starts.
    """
    package = str(Path(fedcore.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = package if not inherited else os.pathsep.join([package, inherited])
    return {**os.environ, "PYTHONPATH": path}
