"""What a model release says about itself: the statement that is signed.

A release is one file of weights and one manifest. The signature covers the
manifest; the manifest covers the file by size and SHA-256, and the release
before it by the hash of that manifest, so the releases of a model form a chain.

    Manifest     version, previous, file         what the publisher's folder decides
    Description  name, inputs, labels, metrics,  what the training run knows
                 provenance, runtime

There is exactly one encoding of a manifest: JSON with sorted keys, no spaces,
ASCII only. The parser accepts that encoding and nothing else (no duplicate key,
no unknown key, no second spelling of a number), which is why two programs can
never read two things out of one signature. JSON has no infinity, so the epsilon
of a run without privacy is the string ``"inf"``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from math import inf, isfinite
from reprlib import repr as shortened
from typing import Any, Final

from fedcore.errors import ConfigurationError, VerificationError

FORMAT: Final = 1
MANIFEST_FILE: Final = "manifest.json"
SIGNATURE_FILE: Final = "manifest.sig"
MODEL_FILE: Final = "model.onnx"
MAX_MANIFEST_BYTES: Final = 256 * 1024
"""Room for some thousand labels; whatever is longer is not read."""

_CONTEXT: Final = b"fedcore/release-manifest/v1\n"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_VERSION: Final = re.compile(r"[0-9]{1,5}\.[0-9]{1,5}(\.[0-9]{1,5})?")
_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})"
)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What the model takes.

    Attributes:
        shape: Of one sample, without the batch axis.
        low: Smallest input seen in calibration.
        high: Largest input seen in calibration; beyond it int8 saturates.
    """

    shape: tuple[int, ...]
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check types and ranges."""
        _sequence("inputs.shape", self.shape, 1, 8)
        for size in self.shape:
            _integer("inputs.shape", size, 1, 2**24)
        _real("inputs.low", self.low, -inf, inf)
        _real("inputs.high", self.high, self.low, inf)


@dataclass(frozen=True, slots=True)
class Metrics:
    """Measured by the publisher on the test set, as fractions.

    Attributes:
        float_accuracy: Of the trained model.
        int8_accuracy: Of the released file.
        agreement: Share of samples to which both give the same label.
    """

    float_accuracy: float
    int8_accuracy: float
    agreement: float

    def __post_init__(self) -> None:
        """Check types and ranges."""
        _real("metrics.float_accuracy", self.float_accuracy, 0, 1)
        _real("metrics.int8_accuracy", self.int8_accuracy, 0, 1)
        _real("metrics.agreement", self.agreement, 0, 1)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the weights come from.

    Attributes:
        run_id: Of the training run.
        seed: Of the training run.
        rounds: Federated rounds behind the weights.
        epsilon: Privacy spent, infinite without differential privacy.
        delta: Its failure probability, 0 without differential privacy.
        config_digest: SHA-256 of the run's configuration, in hex.
    """

    run_id: str
    seed: int
    rounds: int
    epsilon: float
    delta: float
    config_digest: str

    def __post_init__(self) -> None:
        """Check types and ranges."""
        _text("provenance.run_id", self.run_id)
        _integer("provenance.seed", self.seed, 0, 2**64 - 1)
        _integer("provenance.rounds", self.rounds, 0, 2**31 - 1)
        if self.epsilon != inf:
            _real("provenance.epsilon", self.epsilon, 0, inf)
        _real("provenance.delta", self.delta, 0, 1)
        _pattern("provenance.config_digest", self.config_digest, _SHA256, "64 hex digits")


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a device needs to run the file."""

    min_onnxruntime: str = "1.22"
    opset: int = 18

    def __post_init__(self) -> None:
        """Check types and ranges."""
        _pattern("runtime.min_onnxruntime", self.min_onnxruntime, _VERSION, "like 1.22")
        _integer("runtime.opset", self.opset, 7, 1000)


@dataclass(frozen=True, slots=True)
class Description:
    """What the training run knows about its model.

    Attributes:
        name: Of the model, the same for all its versions.
        created_at: ISO 8601 with a time zone, e.g. ``"2026-01-31T12:00:00Z"``.
        inputs: What it takes.
        labels: Names of the outputs, in order.
        metrics: How well it does.
        provenance: Where it comes from.
        runtime: What it needs.
    """

    name: str
    created_at: str
    inputs: InputSpec
    labels: tuple[str, ...]
    metrics: Metrics
    provenance: Provenance
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        """Check types and ranges."""
        _pattern("name", self.name, _NAME, "1 to 64 letters, digits, '.', '_' or '-'")
        _pattern("created_at", self.created_at, _TIME, "like 2026-01-31T12:00:00Z")
        try:
            datetime.fromisoformat(self.created_at)
        except ValueError as error:
            msg = f"created_at must be a real time, got {self.created_at}: {error}"
            raise ConfigurationError(msg) from error
        _sequence("labels", self.labels, 2, 10_000)
        for label in self.labels:
            _text("labels", label)
        if len(set(self.labels)) != len(self.labels):
            msg = "labels must differ from each other: rename the duplicates"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The one file that a release consists of, besides the manifest."""

    name: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        """Check types and ranges."""
        # A plain name: it must not lead out of the release folder.
        _pattern("file.name", self.name, _NAME, "a plain file name")
        _integer("file.size", self.size, 1, 2**31 - 1)
        _pattern("file.sha256", self.sha256, _SHA256, "64 hex digits")

    @classmethod
    def of(cls, data: bytes) -> ModelFile:
        """Return the entry for a model file with these contents."""
        return cls(MODEL_FILE, len(data), hashlib.sha256(data).hexdigest())

    def verify(self, data: bytes) -> None:
        """Return if `data` are the contents that this entry was made for.

        Raises:
            VerificationError: They are not.
        """
        found = hashlib.sha256(data).hexdigest()
        if (len(data), found) != (self.size, self.sha256):
            msg = (
                f"{self.name} must have {self.size} bytes with SHA-256 {self.sha256}, "
                f"found {len(data)} bytes with {found}: fetch the release again"
            )
            raise VerificationError(msg)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The signed statement.

    Attributes:
        version: 1, 2, ... within one release folder.
        previous_sha256: Of the manifest before this one; None for version 1.
        file: The weights.
        description: Everything that the training run knows.
    """

    version: int
    previous_sha256: str | None
    file: ModelFile
    description: Description

    def __post_init__(self) -> None:
        """Check types and ranges."""
        _integer("version", self.version, 1, 2**31 - 1)
        if self.previous_sha256 is not None:
            _pattern("previous_sha256", self.previous_sha256, _SHA256, "64 hex digits")

    def to_bytes(self) -> bytes:
        """Return the only encoding of this manifest."""
        document = {"format": FORMAT, **asdict(self)}
        provenance = document["description"]["provenance"]
        if provenance["epsilon"] == inf:
            provenance["epsilon"] = "inf"
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode("ascii")


def signed_message(manifest: bytes) -> bytes:
    """Return what the signature of an encoded manifest covers."""
    return _CONTEXT + manifest


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest that `data` is the encoding of.

    Raises:
        VerificationError: `data` is not the one encoding of a valid manifest.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        msg = f"a manifest has at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}"
        raise VerificationError(msg)
    try:
        manifest = _manifest(json.loads(data.decode("ascii")))
    except (ValueError, RecursionError) as error:
        msg = f"malformed manifest: {error}"
        raise VerificationError(msg) from error
    if manifest.to_bytes() != data:
        msg = "malformed manifest: not in canonical form (sorted keys, no spaces, no duplicates)"
        raise VerificationError(msg)
    return manifest


def version_numbers(names: Iterable[str]) -> list[int]:
    """Return the versions among the names of a release folder's entries, ascending.

    Example:
        >>> version_numbers(["10", "9", "09", ".draft-1", "latest", "0"])
        [9, 10]
    """
    return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]{0,9}", name))


def _manifest(document: object) -> Manifest:
    top = _object("manifest", document, {"format", *_names(Manifest)})
    if top.pop("format") != FORMAT:
        msg = f"format must be {FORMAT}: update this program"
        raise ConfigurationError(msg)
    body = _object("description", top["description"], _names(Description))
    inputs = _object("inputs", body["inputs"], _names(InputSpec))
    provenance = _object("provenance", body["provenance"], _names(Provenance))
    if provenance["epsilon"] == "inf":
        provenance["epsilon"] = inf
    parts = {
        "inputs": InputSpec(**{**inputs, "shape": _tuple("inputs.shape", inputs["shape"])}),
        "labels": _tuple("labels", body["labels"]),
        "metrics": Metrics(**_object("metrics", body["metrics"], _names(Metrics))),
        "provenance": Provenance(**provenance),
        "runtime": Runtime(**_object("runtime", body["runtime"], _names(Runtime))),
    }
    file = ModelFile(**_object("file", top["file"], _names(ModelFile)))
    return Manifest(**{**top, "file": file, "description": Description(**{**body, **parts})})


def _names(record: type) -> set[str]:
    return {entry.name for entry in fields(record)}


# The checks take `object`: what comes out of JSON has no type yet.


def _object(what: str, value: object, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != keys:
        found = sorted(value) if isinstance(value, dict) else value
        msg = f"{what} must be an object with the keys {sorted(keys)}, got {shortened(found)}"
        raise ConfigurationError(msg)
    return dict(value)


def _tuple(what: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        msg = f"{what} must be a list, got {shortened(value)}"
        raise ConfigurationError(msg)
    return tuple(value)


def _sequence(what: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, tuple) or not least <= len(value) <= most:
        msg = f"{what} must be a tuple of {least} to {most} entries, got {shortened(value)}"
        raise ConfigurationError(msg)


def _integer(what: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        msg = f"{what} must be an integer in {low}..{high}, got {shortened(value)}"
        raise ConfigurationError(msg)


def _real(what: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, float) or not isfinite(value) or not low <= value <= high:
        msg = f"{what} must be a finite float in [{low:g}, {high:g}], got {shortened(value)}"
        raise ConfigurationError(msg)


def _text(what: str, value: object) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        msg = f"{what} must be 1 to 200 printable characters, got {shortened(value)}"
        raise ConfigurationError(msg)


def _pattern(what: str, value: object, pattern: re.Pattern[str], rule: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        msg = f"{what} must be {rule}, got {shortened(value)}"
        raise ConfigurationError(msg)
