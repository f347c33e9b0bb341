"""Verify a release, run it on a file of samples, and say what that cost.

python -m fedcore.device --release models/digits --key signing.key.pub --data test.npz
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from fedcore.archive import read_arrays
from fedcore.crypto.signatures import VerifyKey
from fedcore.device.footprint import foreign_modules, peak_memory_mb
from fedcore.device.runtime import Classifier
from fedcore.device.store import open_release
from fedcore.errors import DataError, FedcoreError

_WARM_UP = 10
_TIMED = 200

Labels = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Samples:
    """The contents of a data file."""

    x: npt.NDArray[np.float32]
    y: Labels | None
    reference: Labels | None


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of this program found.

    Attributes:
        name: Of the model.
        version: Of the release.
        predictions: How many samples were classified.
        accuracy: Share equal to the file's `y`; None without it.
        agreement: Share equal to the file's `reference`; None without it.
        out_of_range: Samples beyond the calibrated input range.
        latency_ms: Median of 200 predictions of one sample.
        startup_ms: From the first statement of main to the first prediction, with
            verification, the import of onnxruntime and the loading of the model.
        ready_memory_mb: Peak resident memory up to the first prediction.
        peak_memory_mb: Peak resident memory at the end, with the data file.
        foreign_modules: Training libraries that were loaded; must be empty.
    """

    name: str
    version: int
    predictions: int
    accuracy: float | None
    agreement: float | None
    out_of_range: int
    latency_ms: float
    startup_ms: float
    ready_memory_mb: float
    peak_memory_mb: float
    foreign_modules: list[str]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after an error."""
    options = _parser().parse_args(arguments)
    try:
        report = _run(options)
    except FedcoreError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    values = asdict(report)
    if options.json:
        sys.stdout.write(json.dumps(values) + "\n")
    else:
        sys.stdout.writelines(f"{name:16} {_shown(value)}\n" for name, value in values.items())
    return 0


def read_samples(path: Path) -> Samples:
    """Return the arrays of an .npz file.

    Raises:
        DataError: It is no such file, holds no `x`, or its arrays do not fit together.
    """
    try:
        with path.open("rb") as file:
            arrays, _ = read_arrays(file, ("x", "y", "reference"))
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise DataError(msg) from error
    except ValueError as error:
        msg = f"{path} must be an .npz file without pickled objects: {error}"
        raise DataError(msg) from error
    if "x" not in arrays or arrays["x"].ndim == 0 or len(arrays["x"]) == 0:
        msg = f"{path} must hold an array x of at least one sample, found {sorted(arrays)}"
        raise DataError(msg)
    for name in arrays.keys() - {"x"}:
        found = arrays[name]
        if found.shape != (len(arrays["x"]),) or found.dtype.kind not in "iu":
            msg = (
                f"{name} must hold one integer per sample, shape [{len(arrays['x'])}], "
                f"found {found.dtype} {list(found.shape)}"
            )
            raise DataError(msg)
    return Samples(arrays["x"], arrays.get("y"), arrays.get("reference"))


def _run(options: argparse.Namespace) -> Report:
    start = time.perf_counter()
    release = open_release(
        options.release, _read_key(options.key), minimum_version=options.minimum_version
    )
    classifier = Classifier(release, threads=options.threads)
    classifier.predict(np.zeros((1, *release.manifest.description.inputs.shape), np.float32))
    startup = time.perf_counter() - start
    ready_memory = peak_memory_mb()

    samples = read_samples(options.data)
    prediction = classifier.predict(samples.x)
    return Report(
        name=release.manifest.description.name,
        version=release.manifest.version,
        predictions=len(samples.x),
        accuracy=_share_equal(prediction.classes, samples.y),
        agreement=_share_equal(prediction.classes, samples.reference),
        out_of_range=prediction.out_of_range,
        latency_ms=_median_latency_ms(classifier, samples.x),
        startup_ms=startup * 1e3,
        ready_memory_mb=ready_memory,
        peak_memory_mb=peak_memory_mb(),
        foreign_modules=foreign_modules(),
    )


def _read_key(path: Path) -> VerifyKey:
    try:
        return VerifyKey.from_pem(path.read_bytes())
    except OSError as error:
        msg = f"cannot read the key file {path}: {error.strerror}"
        raise DataError(msg) from error


def _median_latency_ms(classifier: Classifier, x: npt.NDArray[np.float32]) -> float:
    seconds = []
    for index in range(_WARM_UP + _TIMED):
        at = index % len(x)
        start = time.perf_counter()
        classifier.predict(x[at : at + 1])
        seconds.append(time.perf_counter() - start)
    return median(seconds[_WARM_UP:]) * 1e3


def _share_equal(classes: Labels, expected: Labels | None) -> float | None:
    return None if expected is None else float(np.mean(classes == expected))


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None or value == [] else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedcore.device",
        description="Verify a signed model release, classify the samples of a file with it, and "
        "report accuracy, latency and memory. Needs neither torch nor Flower.",
        epilog="Exit status: 0, or 2 with one line on stderr when the release is not what the "
        "key's owner signed, or an input is unusable.",
    )
    parser.add_argument(
        "--release", type=Path, required=True, metavar="DIR",
        help="one version of a release, or the folder of its versions (takes the highest)",
    )  # fmt: skip
    parser.add_argument(
        "--key", type=Path, required=True, metavar="FILE",
        help="the publisher's Ed25519 public key (PEM), obtained apart from the release",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE.npz",
        help="array x: float32 [n, ...]; optional: y, the true classes, and reference, the "
        "classes that another model chose, both integer [n]",
    )  # fmt: skip
    parser.add_argument(
        "--minimum-version", type=int, default=1, metavar="N",
        help="refuse older releases (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
