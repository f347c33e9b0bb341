"""What a training run left behind, read and checked.

`summary.json`, `metrics.jsonl`, `ledger.json` and Hydra's `overrides.yaml` of a folder become
one `Run`. A run that was interrupted, even before its first round, has one like any other.

Two figures may look alike and are not: the epsilon that the run noted, and the one that
its ledger costs when it is composed again. `Run.ledger_agrees` compares them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache
from itertools import pairwise
from math import exp, inf, isclose, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from fedcore.errors import ConfigurationError
from fedcore.privacy import PrivacyLedger, Release

if TYPE_CHECKING:  # loaded when a page is written
    from pydantic import TypeAdapter

_MEANINGFUL_EPSILON: Final = 10.0
"""Beyond it e^epsilon is a factor in the ten thousands: a bound in name only."""


@dataclass(frozen=True, slots=True)
class Round:
    """One line of `metrics.jsonl`; bytes are summed over the round's clients."""

    round: int
    accuracy: float | None
    loss: float | None
    train_accuracy: float | None
    train_loss: float | None
    invited: int
    survivors: int
    lost: dict[str, int]
    attempts: int
    aborted: list[str]
    clipped: int | None
    uplink_bytes: int
    uplink_payload_bytes: int
    downlink_bytes: int
    uploads: int
    epsilon: float
    seconds: float
    epsilon_example: float | None = None
    clip_norm: float | None = None
    unclipped: float | None = None
    downloads: int | None = None
    declined: dict[str, int] = field(default_factory=dict)
    buffer: dict[str, float] | None = None
    surplus: int = 0
    late: int = 0
    duplicates: int = 0
    paused: int = 0

    @property
    def client_bytes(self) -> float:
        """What a client sent that took part in every attempt."""
        if self.uploads:
            return self.uplink_bytes * self.attempts / self.uploads
        return self.uplink_bytes / max(1, self.invited)

    @property
    def received_bytes(self) -> float:
        """What such a client received."""
        if self.downloads:
            return self.downlink_bytes * self.attempts / self.downloads
        return self.downlink_bytes / max(1, self.invited)


@dataclass(frozen=True, slots=True)
class Masks:
    """`secagg` in `summary.json`."""

    protocol: str
    neighbours: int
    threshold: int
    dropped_clients: int
    aborted_rounds: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model file takes and is worth, as `fedcore.release.Measured` says it."""

    parameters: int
    macs: int
    onnx_bytes: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Sums:
    """`traffic` in `summary.json`: bytes of all rounds and clients."""

    uplink_payload_bytes: int
    uplink_overhead_bytes: int
    uplink_bytes: int
    downlink_payload_bytes: int
    downlink_overhead_bytes: int
    downlink_bytes: int
    total_bytes: int
    uploads: int
    downloads: int


@dataclass(frozen=True, slots=True)
class Published:
    """`release` in `summary.json`."""

    path: str
    version: int
    onnx_bytes: int
    agreement: float | None
    float_accuracy: float | None
    int8_accuracy: float | None
    device_latency_ms: float | None
    device_peak_memory_mb: float | None
    parameters: int | None = None
    macs: int | None = None
    float_bytes: int | None = None
    unpruned: Measured | None = None
    teacher: Measured | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`summary.json`; None for what a run that was cut short cannot know."""

    experiment: str
    seed: int
    rounds: int
    completed_rounds: int
    stopped: str | None
    clients: int
    clients_per_round: int
    parameters: int
    initial_accuracy: float | None
    accuracy: float | None
    loss: float | None
    uplink_bytes_per_client_round: float | None
    uplink_payload_bytes_per_client_round: float | None
    uplink_bits_per_parameter: float | None
    uplink_reduction: float | None
    uplink_payload_reduction: float | None
    downlink_bytes_per_client_round: float | None
    downlink_reduction: float | None
    secagg: Masks | None
    epsilon: float
    delta: float | None
    unit: str | None = None
    epsilon_target: float | None = None
    noise_multiplier: float | None = None
    noise_inflation: float | None = None
    epsilon_example: float | None = None
    delta_example: float | None = None
    epsilon_target_example: float | None = None
    noise_multiplier_example: float | None = None
    warnings: tuple[str, ...] = ()
    seconds_total: float
    clients_per_second: float
    peak_memory_mb: float
    release: Published | None
    uplink_overhead_bytes_per_client_round: float | None = None
    downlink_payload_bytes_per_client_round: float | None = None
    downlink_overhead_bytes_per_client_round: float | None = None
    downlink_payload_reduction: float | None = None
    downlink_bits_per_parameter: float | None = None
    total_bytes_per_client_round: float | None = None
    total_payload_bytes_per_client_round: float | None = None
    total_overhead_bytes_per_client_round: float | None = None
    total_payload_reduction: float | None = None
    total_reduction: float | None = None
    traffic: Sums | None = None
    declined: dict[str, int] | None = None
    surplus: int = 0
    late: int = 0
    duplicates: int = 0


Record = TypeVar("Record", Round, Summary)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a run's folder says, and what follows from it."""

    summary: Summary
    rounds: Sequence[Round]
    ledger: PrivacyLedger | None
    overrides: Sequence[str]
    examples: PrivacyLedger | None = None
    """What local training cost an example, where `ledger` counts devices."""

    @property
    def released(self) -> bool:
        """Whether any round revealed its sum; an aborted one reveals nothing."""
        return any(entry.survivors for entry in self.rounds)

    @property
    def private(self) -> bool:
        """Whether all that was released had noise."""
        return self.released and isfinite(self.summary.epsilon)

    @property
    def last_release(self) -> Release | None:
        """The newest entry of the ledger."""
        return self.ledger.releases[-1] if self.ledger and self.ledger.releases else None

    @property
    def ledger_agrees(self) -> bool:
        """Whether the ledgers, composed again, cost what the summary says."""
        if self.examples is not None and not isclose(
            self.examples.epsilon, self.summary.epsilon_example or 0.0, rel_tol=1e-3
        ):
            return False
        if self.ledger is None or not self.ledger.releases:
            return not self.private  # without an entry nothing was bounded
        return isclose(self.ledger.epsilon, self.summary.epsilon, rel_tol=1e-3)

    @property
    def odds(self) -> float | None:
        """The factor e^epsilon; None if it says nothing any more."""
        epsilon = self.summary.epsilon
        return exp(epsilon) if epsilon <= _MEANINGFUL_EPSILON else None

    @property
    def lost(self) -> int:
        """How often an invited client fell silent or broke the protocol."""
        return sum(sum(entry.lost.values()) for entry in self.rounds)

    @property
    def recovered(self) -> int:
        """How many of those were in a round that went on without them."""
        return sum(sum(entry.lost.values()) for entry in self.rounds if entry.survivors)

    @property
    def command(self) -> str:
        """What to type to do it again, into a new folder."""
        kept = [entry for entry in self.overrides if not entry.lstrip("+").startswith("output=")]
        return shlex.join(["python", "-m", "experiments.train", *kept])

    @property
    def buffered(self) -> bool:
        """Whether updates of different versions were added up."""
        return any(entry.buffer is not None for entry in self.rounds)

    @property
    def adapted(self) -> bool:
        """Whether the clip moved from round to round."""
        return len({entry.clip_norm for entry in self.rounds}) > 1

    def epsilon_after(self, round_number: int) -> float | None:
        """Return what was spent after that round; None if it is not on record."""
        return next((row.epsilon for row in self.rounds if row.round == round_number), None)


def read_run(folder: Path) -> Run:
    """Return what a training run wrote into `folder`.

    Raises:
        ConfigurationError: A file is missing, malformed, or contradicts another.
    """
    if not folder.is_dir():
        msg = f"{folder} must be the folder of a training run, found no folder there"
        raise ConfigurationError(msg)
    text = _text(folder / "summary.json")
    if text is None:
        msg = (
            f"{folder} must hold summary.json, which a run writes when it ends: name the folder "
            "of a training run that has ended"
        )
        raise ConfigurationError(msg)
    summary = _typed(Summary, _started(_json(text, "summary.json"), folder), "summary.json")
    lines = _text(folder / "metrics.jsonl")
    if lines is None and summary.completed_rounds:
        msg = (
            f"{folder} must hold metrics.jsonl with the {summary.completed_rounds} rounds that "
            "summary.json counts, found no such file: restore it"
        )
        raise ConfigurationError(msg)
    return Run(
        summary,
        _rounds(lines or ""),
        _ledger(folder, "ledger.json"),
        _overrides(folder),
        _ledger(folder, "ledger_example.json"),
    )


def _text(path: Path) -> str | None:
    """Return a file's text; None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path.name} must be a readable UTF-8 file, found otherwise: {error}"
        raise ConfigurationError(msg) from error


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        msg = f"{where} must be JSON, found otherwise: {error}"
        raise ConfigurationError(msg) from error
    if not isinstance(values, dict):
        msg = f"{where} must be a JSON object, found {type(values).__name__}"
        raise ConfigurationError(msg)
    return values


def _started(values: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Complete the summary of a run that ended before its clients were found."""
    if "experiment" in values or values.get("completed_rounds") != 0:
        return values
    # Annotations are strings here: zero for numbers, None for what may be unknown.
    unknown = {
        entry.name: 0 if entry.type in {"int", "float"} else None
        for entry in fields(Summary)
        if entry.default is MISSING
    }
    return {**unknown, "experiment": folder.resolve().name, **values}


def _typed(target: type[Record], values: Mapping[str, Any], where: str) -> Record:
    from pydantic import ValidationError  # noqa: PLC0415 - --help needs no pydantic

    try:
        # JSON has no infinity: pydantic reads "inf", as an infinite epsilon is written.
        result: Record = _reader(cast(Any, target)).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        msg = f"{where}: {key}: {first['msg']}, got {first['input']!r:.60}: restore the file"
        raise ConfigurationError(msg) from error
    _check_ranges(asdict(result), where)
    return result


@lru_cache(maxsize=4)
def _reader(target: Any) -> TypeAdapter[Any]:
    """Return what reads a record; to make it takes longer than to read a hundred."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - --help needs no pydantic

    return TypeAdapter(target)


def _check_ranges(values: object, where: str) -> None:
    """Refuse negative numbers, and shares above 1; a loss may be anything, NaN included."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, dict):
            _check_ranges(value, where)
        limit = 1.0 if name.endswith(("accuracy", "agreement", "delta")) else inf
        free = name.endswith("loss") or name == "unclipped"  # an estimate may leave [0, 1]
        if isinstance(value, int | float) and not free and not 0 <= value <= limit:
            msg = f"{where}: {name} must be in [0, {limit:g}], got {value}: restore the file"
            raise ConfigurationError(msg)


def _rounds(text: str) -> tuple[Round, ...]:
    """Return the rounds; a last line without its end belongs to a round that was cut off."""
    *lines, _ = text.split("\n")
    rounds = []
    for number, line in enumerate(lines, start=1):
        where = f"metrics.jsonl, line {number}"
        rounds.append(_typed(Round, _json(line, where), where))
    if any(late.round <= early.round for early, late in pairwise(rounds)):
        msg = "metrics.jsonl must count its rounds upwards: restore the file of a single run"
        raise ConfigurationError(msg)
    return tuple(rounds)


def _ledger(folder: Path, name: str) -> PrivacyLedger | None:
    text = _text(folder / name)
    if text is None:
        return None
    try:
        return PrivacyLedger.from_json(text)
    except ConfigurationError as error:
        msg = f"{name}: {error}"
        raise ConfigurationError(msg) from error


def _overrides(folder: Path) -> tuple[str, ...]:
    text = _text(folder / ".hydra" / "overrides.yaml")
    if text is None:
        return ()
    # Hydra brings it; it has no types.
    from yaml import YAMLError, safe_load  # type: ignore[import-untyped]  # noqa: PLC0415

    try:
        values = safe_load(text)
    except (YAMLError, ValueError, OverflowError, RecursionError) as error:
        msg = f".hydra/overrides.yaml must be YAML, found otherwise: {error}"
        raise ConfigurationError(msg) from error
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        msg = f".hydra/overrides.yaml must be a list of strings, got {values!r:.60}"
        raise ConfigurationError(msg)
    return tuple(values)
