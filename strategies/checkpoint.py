"""All that a coordinator needs to go on after a round, as a value and as bytes.

    magic line | SHA-256 of the rest | an .npz archive

The archive has an array for everything that is large (models, momenta, aggregates, what
simulated nodes keep) and one, `header`, with JSON for the rest. The hash finds a damaged
disk; whoever can write the file can also write its hash, so nothing of it is taken on
trust: names, types and shapes are checked, no pickle is read, and whatever is wrong is
one error.

With correlated noise in a simulation the bytes hold the seed of that noise, and with error
feedback what simulated devices have not sent: a checkpoint is secret.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict
from pydantic import TypeAdapter, ValidationError

from fedcore.archive import read_arrays
from fedcore.codec import Broadcast
from fedcore.codec.broadcast import Step, version_of
from fedcore.engine.flower_private import pack_records, unpack_records
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.privacy import PrivacyLedger
from fedcore.secagg import Certificate
from fedcore.vectors import Entry, Layout
from strategies.backoff import Absence
from strategies.check_ins import CheckInState, Task
from strategies.grid_state import DownlinkState, GridState
from strategies.progress import Arrays, Past

MAGIC: Final = b"fedcore checkpoint 1\n"
"""With the version of the format: another one is refused."""
_HASH_BYTES: Final = 32
_HEADER: Final = "header"
_Flat: TypeAlias = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class StrategyState:
    """What a strategy gathered: momentum, moments.

    Attributes:
        pruned: Whether the strategy is that of the smaller model.
        gathered: Arrays by the name of the strategy's attribute that holds them.
    """

    pruned: bool = False
    gathered: Mapping[str, Arrays] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run between two rounds.

    Attributes:
        job: Digest of what is run.
        round_number: The last round that is over; 0 before the first.
        past: All rounds so far.
        ledger: Everything released so far.
        examples: What local training cost an example; None unless it is counted.
        model: The global model.
        unpruned: The last one before pruning; None without it, or before it.
        strategy: Of the strategy.
        grid: Of the grid; None for plain float32.
        noise: Seed and position of correlated noise (`MatrixRun.to_bytes`), where no file of
            its own keeps them.
        nodes: What simulated nodes keep, by node id.
        labels: What the nodes are called, by node id.
        check_ins: Who trains and who is done, in a simulation of asynchronous training.
        absences: Failures of devices, by label, where the run leaves out who failed.
    """

    job: str
    round_number: int
    past: tuple[Past, ...]
    ledger: PrivacyLedger
    examples: PrivacyLedger | None
    model: Arrays = field(repr=False)
    unpruned: Arrays | None = field(repr=False)
    strategy: StrategyState = field(default_factory=StrategyState)
    grid: GridState | None = None
    noise: bytes | None = field(default=None, repr=False)
    nodes: Mapping[int, RecordDict] = field(default_factory=dict, repr=False)
    labels: Mapping[int, str] = field(default_factory=dict, repr=False)
    check_ins: CheckInState | None = None
    absences: Mapping[str, Absence] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return what `from_bytes` reads; the same for the same checkpoint."""
        arrays = _arrays_of(self)
        grid = None if self.grid is None else _plain(self.grid)
        header = _Header(
            job=self.job,
            round_number=self.round_number,
            past=self.past,
            ledger=self.ledger.to_json(),
            examples=None if self.examples is None else self.examples.to_json(),
            pruned=self.strategy.pruned,
            grid=grid,
            arrays=tuple(arrays),
            labels=dict(self.labels),
            check_ins=None if self.check_ins is None else _plain_check_ins(self.check_ins),
            absences=dict(self.absences),
        )
        text = json.dumps(asdict(header), separators=(",", ":"))
        file = BytesIO()
        members: dict[str, Any] = {_HEADER: _as_array(text.encode()), **arrays}
        np.savez(file, **members)
        body = file.getvalue()
        return MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Return the checkpoint that `to_bytes` wrote.

        Raises:
            ConfigurationError: `data` is anything else; says why in one line.
        """
        try:
            return _parse(data)
        except (ValidationError, RecursionError) as error:
            msg = f"a checkpoint's header is malformed ({type(error).__name__})"
            raise ConfigurationError(msg) from error
        except (ValueError, KeyError, PeerProtocolError) as error:
            msg = f"a checkpoint must be as it was written, found otherwise: {error!s:.200}"
            raise ConfigurationError(msg) from error


@dataclass(frozen=True, slots=True)
class _Downlink:
    """All of a `DownlinkState` but its arrays."""

    layout: tuple[Entry, ...]
    bits: int
    bases: tuple[str, ...]
    versions: dict[int, str]


@dataclass(frozen=True, slots=True)
class _Grid:
    """All of a `GridState` but its arrays."""

    run_id: str | None
    round_number: int
    clip_norm: float | None
    since: int
    counted: dict[int, int]
    certificates: dict[int, str]
    downlink: _Downlink | None


@dataclass(frozen=True, slots=True)
class _CheckIns:
    """All of a `CheckInState` but what was sent."""

    versions: tuple[str, ...]
    running: tuple[Task, ...]
    waiting: tuple[Task, ...]
    now: float


@dataclass(frozen=True, slots=True)
class _Header:
    """All of a checkpoint but its arrays, of which it has the names."""

    job: str
    round_number: int
    past: tuple[Past, ...]
    ledger: str
    examples: str | None
    pruned: bool
    grid: _Grid | None
    arrays: tuple[str, ...]
    labels: dict[int, str] = field(default_factory=dict)
    check_ins: _CheckIns | None = None
    absences: dict[str, Absence] = field(default_factory=dict)


def _parse(data: bytes) -> Checkpoint:
    start = len(MAGIC) + _HASH_BYTES
    if data[: len(MAGIC)] != MAGIC:
        msg = f"it does not begin with {MAGIC.decode().strip()!r}: another version wrote it"
        raise ValueError(msg)
    if hashlib.sha256(data[start:]).digest() != data[len(MAGIC) : start]:
        msg = "its hash does not fit: it is damaged"
        raise ValueError(msg)
    raw, _ = read_arrays(BytesIO(data[start:]), {_HEADER})
    header = TypeAdapter(_Header).validate_json(_as_bytes(raw[_HEADER]), extra="forbid")
    arrays, names = read_arrays(BytesIO(data[start:]), header.arrays)
    if sorted(names) != sorted((_HEADER, *arrays)) or list(arrays) != list(header.arrays):
        msg = "the arrays differ from those that the header names"
        raise ValueError(msg)
    if any(array.dtype.kind not in "iufb" for array in arrays.values()):
        msg = "an array holds no numbers"
        raise ValueError(msg)
    if len(header.past) != header.round_number:
        msg = f"it holds {len(header.past)} of {header.round_number} rounds"
        raise ValueError(msg)
    return _assembled(header, arrays)


def _assembled(header: _Header, arrays: _Flat) -> Checkpoint:
    taken = _Taken(arrays)
    checkpoint = Checkpoint(
        job=header.job,
        round_number=header.round_number,
        past=header.past,
        ledger=PrivacyLedger.from_json(header.ledger),
        examples=None if header.examples is None else PrivacyLedger.from_json(header.examples),
        model=taken.below("model"),
        unpruned=taken.below("unpruned") or None,
        strategy=StrategyState(header.pruned, _nested(taken.below("strategy"))),
        grid=None if header.grid is None else _grid(header.grid, taken),
        noise=_as_bytes(taken.one("noise")) if "noise" in taken else None,
        nodes={
            int(name): unpack_records(_as_bytes(array))
            for name, array in taken.below("nodes").items()
        },
        labels=header.labels,
        check_ins=None if header.check_ins is None else _check_ins(header.check_ins, taken),
        absences=header.absences,
    )
    taken.check_all()
    return checkpoint


class _Taken:
    """Arrays by name; knows which were asked for."""

    def __init__(self, arrays: _Flat) -> None:
        self._arrays = arrays
        self._left = set(arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def one(self, name: str) -> npt.NDArray[Any]:
        """Return an array that must be there."""
        self._left.discard(name)
        if name not in self._arrays:
            msg = f"the array {name!r:.80} is missing"
            raise ValueError(msg)
        return self._arrays[name]

    def below(self, prefix: str) -> _Flat:
        """Return the arrays of a group, by the rest of their names."""
        start = f"{prefix}/"
        names = [name for name in self._arrays if name.startswith(start)]
        return {name.removeprefix(start): self.one(name) for name in names}

    def check_all(self) -> None:
        """Refuse arrays that nobody asked for."""
        if self._left:
            msg = f"the array {min(self._left)!r:.80} belongs to nothing"
            raise ValueError(msg)


def _arrays_of(checkpoint: Checkpoint) -> _Flat:
    """Return all that is large, by name."""
    groups: dict[str, Arrays] = {"model": checkpoint.model}
    if checkpoint.unpruned is not None:
        groups["unpruned"] = checkpoint.unpruned
    for name, gathered in checkpoint.strategy.gathered.items():
        groups[f"strategy/{name}"] = gathered
    groups["nodes"] = {
        str(node_id): _as_array(pack_records(state)) for node_id, state in checkpoint.nodes.items()
    }
    if checkpoint.check_ins is not None:
        groups["sent"] = {
            str(number): _as_array(data) for number, data in checkpoint.check_ins.contents.items()
        }
    arrays = {
        f"{group}/{name}": np.asarray(array)
        for group, members in groups.items()
        for name, array in members.items()
    }
    if checkpoint.noise is not None:
        arrays["noise"] = _as_array(checkpoint.noise)
    if checkpoint.grid is not None and checkpoint.grid.last is not None:
        arrays["last"] = checkpoint.grid.last
    if checkpoint.grid is not None and checkpoint.grid.downlink is not None:
        arrays |= _broadcast_arrays(checkpoint.grid.downlink.broadcast)
    return arrays


def _broadcast_arrays(broadcast: Broadcast) -> _Flat:
    arrays: _Flat = {"broadcast": broadcast.model, "finest": broadcast.finest}
    for place, step in enumerate(broadcast.steps):
        arrays[f"step/{place}/exponents"] = step.exponents
        arrays[f"step/{place}/floor"] = step.floor
        arrays[f"step/{place}/data"] = _as_array(step.data)
    return arrays


def _plain(grid: GridState) -> _Grid:
    downlink = None
    if grid.downlink is not None:
        downlink = _Downlink(
            grid.downlink.layout.entries,
            grid.downlink.broadcast.bits,
            tuple(step.base.hex() for step in grid.downlink.broadcast.steps),
            {node_id: version.hex() for node_id, version in grid.downlink.versions.items()},
        )
    return _Grid(
        run_id=grid.run_id,
        round_number=grid.round_number,
        clip_norm=grid.clip_norm,
        since=grid.since,
        counted=dict(grid.counted),
        certificates={
            node_id: certificate.to_bytes().hex()
            for node_id, certificate in grid.certificates.items()
        },
        downlink=downlink,
    )


def _plain_check_ins(state: CheckInState) -> _CheckIns:
    return _CheckIns(state.versions, state.running, state.waiting, state.now)


def _check_ins(state: _CheckIns, taken: _Taken) -> CheckInState:
    contents = {int(name): _as_bytes(array) for name, array in taken.below("sent").items()}
    missing = {task.round_number for task in state.running} - contents.keys()
    if missing:
        msg = f"what devices were sent in round {min(missing)} is missing"
        raise ValueError(msg)
    return CheckInState(state.versions, state.running, state.waiting, contents, state.now)


def _grid(grid: _Grid, taken: _Taken) -> GridState:
    last = taken.one("last") if "last" in taken else None
    if last is not None and (last.ndim != 1 or last.dtype.kind != "f"):
        msg = "the last aggregate must be a vector of real numbers"
        raise ValueError(msg)
    return GridState(
        run_id=grid.run_id,
        round_number=grid.round_number,
        clip_norm=grid.clip_norm,
        last=last,
        since=grid.since,
        counted=grid.counted,
        certificates={
            node_id: Certificate.from_bytes(bytes.fromhex(data))
            for node_id, data in grid.certificates.items()
        },
        downlink=None if grid.downlink is None else _downlink(grid.downlink, taken),
    )


def _downlink(state: _Downlink, taken: _Taken) -> DownlinkState:
    layout = Layout(state.layout)
    layers = tuple(entry.size for entry in layout.entries)
    model = taken.one("broadcast")
    if model.shape != (layout.dim,) or model.dtype != np.float32:
        msg = "the broadcast model does not fit its layout"
        raise ValueError(msg)
    model.setflags(write=False)
    steps = tuple(
        Step(
            bytes.fromhex(base),
            _exponents(taken.one(f"step/{place}/exponents"), len(layers)),
            _exponents(taken.one(f"step/{place}/floor"), len(layers)),
            _as_bytes(taken.one(f"step/{place}/data")),
        )
        for place, base in enumerate(state.bases)
    )
    broadcast = Broadcast(
        layers,
        state.bits,
        model,
        version_of(model),
        version_of(np.zeros(layout.dim, np.float32)),
        _exponents(taken.one("finest"), len(layers)),
        steps,
    )
    versions = {node_id: bytes.fromhex(version) for node_id, version in state.versions.items()}
    return DownlinkState(layout, broadcast, versions)


def _exponents(array: npt.NDArray[Any], layers: int) -> npt.NDArray[np.int16]:
    if array.shape != (layers,) or array.dtype != np.int16:
        msg = f"the exponents of {layers} layers must be as many int16"
        raise ValueError(msg)
    return array


def _nested(arrays: _Flat) -> dict[str, _Flat]:
    """Return arrays by the first part of their names."""
    result: dict[str, _Flat] = {}
    for path, array in arrays.items():
        attribute, _, name = path.partition("/")
        result.setdefault(attribute, {})[name] = array
    return result


def _as_array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _as_bytes(array: npt.NDArray[Any]) -> bytes:
    if array.dtype != np.uint8 or array.ndim != 1:
        msg = "bytes must be an array of uint8"
        raise ValueError(msg)
    return array.tobytes()
