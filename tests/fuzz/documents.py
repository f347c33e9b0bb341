"""Decoders of what is read from disk, and of JSON that travels.

Files are written into a folder that the caller owns and read by the very functions that
read them in use. Where a hash or a signature covers the content, `repair` makes it fit
again: an attacker who can write a journal can write its hash as well.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from math import inf, nan
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord, RecordDict

from clients.journal import Answer, AnsweredJournal
from experiments import enrollment
from experiments.edge import parcels
from experiments.run_files import read_run
from fedcore.codec import Broadcast
from fedcore.crypto import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey, VerifyKey
from fedcore.data import Digits, NpzFile, load
from fedcore.data.mapped import write_mapped
from fedcore.device.__main__ import read_samples
from fedcore.device.store import open_release
from fedcore.errors import (
    ConfigurationError,
    DataError,
    LocalProtocolError,
    VerificationError,
)
from fedcore.job import Job, NoClip, NoQuantize
from fedcore.keyfiles import load_identity
from fedcore.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Description,
    InputSpec,
    Manifest,
    Metrics,
    ModelFile,
    Provenance,
    parse_manifest,
    signed_message,
)
from fedcore.pipeline import NoSecAgg
from fedcore.privacy import PrivacyLedger, Release
from fedcore.sealed import BrokenSealError, Seal
from fedcore.telemetry import skipped
from fedcore.training import Evaluation
from fedcore.vectors import Layout
from strategies.checkpoint import MAGIC, Checkpoint, StrategyState
from strategies.checkpoints import Begun
from strategies.grid_state import DownlinkState, GridState
from strategies.helper_service import load_helper_key
from strategies.progress import Past
from tests.fedcore.secagg.rehearsal import AUTHORITY, NOW, ROOT, identity_of
from tests.fuzz.law import Target

PUBLISHER = SigningKey.generate(ReplayedEntropy(b"publisher"))
MODEL = b"weights"
Read = Callable[[Path], object]


def document_targets(folder: Path) -> list[Target]:
    """All of this file; the files are made in `folder`."""
    return [
        *_releases(folder),
        *_ledgers(),
        *_jobs(),
        _journal(folder),
        *_checkpoints(),
        *_identities(folder),
        *_arrays(folder),
        *_boards(folder),
        *_runs(folder),
    ]


def _file(path: Path, read: Read, data: bytes, mode: int = 0o600) -> object:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return read(path)


def _releases(folder: Path) -> list[Target]:
    """A manifest alone, and as a device opens it: signed, beside its model."""
    description = Description(
        name="digits",
        created_at="2026-01-31T12:00:00Z",
        inputs=InputSpec((1, 8, 8), 0.0, 1.0),
        labels=tuple("0123456789"),
        metrics=Metrics(0.97, 0.96, 0.995),
        provenance=Provenance("run-1", 0, 20, inf, 0.0, "cd" * 32),
    )
    first = Manifest(1, None, ModelFile.of(MODEL), description)
    private = replace(description.provenance, epsilon=1.5, delta=1e-5)
    second = Manifest(7, "ab" * 32, ModelFile.of(MODEL), replace(description, provenance=private))
    manifests = [first.to_bytes(), second.to_bytes()]
    signatures = [PUBLISHER.sign(signed_message(manifest)) for manifest in manifests]
    release = folder / "release"
    release.mkdir()
    (release / first.file.name).write_bytes(MODEL)

    def opened(manifest: bytes, signature: bytes) -> object:
        (release / MANIFEST_FILE).write_bytes(manifest)
        (release / SIGNATURE_FILE).write_bytes(signature)
        return open_release(release, PUBLISHER.public)

    return [
        Target(
            "manifest", manifests, parse_manifest, VerificationError, Manifest.to_bytes, text=True
        ),
        Target(
            "signed release",
            manifests,
            lambda data: opened(data, PUBLISHER.sign(signed_message(data))),
            VerificationError,
            text=True,
            share=2,
        ),
        Target(
            "signature of a release",
            signatures[:1],
            lambda data: opened(manifests[0], data),
            VerificationError,
            relatives=signatures[1:],
            share=1,
        ),
    ]


def _release(number: int) -> Release:
    return Release(
        round_number=number, unit="device", mechanism="distributed_gaussian", noise_multiplier=12.0,
        norm=100.0, sigma_local=400.0, dim=2_000, clients=10, survivors=9,
        sampling="fixed_size_without_replacement",
    )  # fmt: skip


def _ledgers() -> list[Target]:
    empty = PrivacyLedger(delta=1e-5, epsilon_budget=3.0)
    spent = empty.record(_release(1)).record(_release(2))
    return [
        Target(
            "ledger",
            [ledger.to_json().encode() for ledger in (empty, spent, PrivacyLedger(delta=0.5))],
            PrivacyLedger.from_json,
            ConfigurationError,
            text=True,
            share=3,
        )
    ]


def _jobs() -> list[Target]:
    plain = Job(clip=NoClip(), quantize=NoQuantize(), secagg=NoSecAgg())
    return [
        Target(
            "job",
            [job.to_json().encode() for job in (Job(), plain)],
            lambda data: Job.from_json(data.decode("utf-8", "replace")),
            ConfigurationError,
            text=True,
        )
    ]


def _journal(folder: Path) -> Target:
    path = folder / "answers"
    journal = AnsweredJournal(path)
    journal.claim("run-1", Answer(3, 1, 2))
    corpus = [path.read_bytes()]
    journal.claim("an\u00f6ther", Answer(1, 1))
    corpus.append(path.read_bytes())
    return Target(
        "journal of answers",
        corpus,
        partial(_file, path, lambda path: AnsweredJournal(path).last("run-1")),
        ConfigurationError,
        repair=_with_digest,
        text=True,
    )


def _checkpoints() -> list[Target]:
    """A run between two rounds: with all that a checkpoint may hold, and with the least."""
    model = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1, 2])}
    layout = Layout.of(model)
    broadcast = Broadcast.of((6, 2), 8).towards(layout.flatten(model))
    broadcast = broadcast.towards(layout.flatten(model) * np.float32(1.5))
    ledger = PrivacyLedger(delta=1e-5, epsilon_budget=3.0).record(_release(1))
    least = Checkpoint("ab" * 32, 0, (), PrivacyLedger(delta=0.5), None, model, None)
    full = Checkpoint(
        "ab" * 32, 1, (Past(skipped(1, 3, "nobody", inf), Evaluation(nan, 0.5, 9), 0.5, 1.25),),
        ledger, ledger, model, model, StrategyState(True, {"m_t": model}),
        GridState(
            "1", 1, 0.5, layout.flatten(model), 0, {1000: 1},
            {1000: identity_of(0).certificate},
            DownlinkState(layout, broadcast, {1000: broadcast.version}),
        ),
        b"noise", {1000: RecordDict({"kept": ConfigRecord({"round": 1, "data": b"\x00"})})},
    )  # fmt: skip
    corpus = [least.to_bytes(), full.to_bytes()]
    begun = Begun("ab" * 32, 2, ledger)
    return [
        Target(
            "checkpoint", corpus, Checkpoint.from_bytes, ConfigurationError, repair=_with_hash,
            share=3,
        ),
        Target(
            "header of a checkpoint",
            [_header(data) for data in corpus],
            lambda header: Checkpoint.from_bytes(_with_header(corpus[1], header)),
            ConfigurationError,
            text=True,
            share=3,
        ),
        Target(
            "round that was begun", [begun.to_bytes()], Begun.from_bytes, ConfigurationError,
            text=True, share=2,
        ),
    ]  # fmt: skip


def _with_hash(data: bytes) -> bytes:
    """Let the hash of a checkpoint fit what follows it."""
    start = len(MAGIC) + 32
    return MAGIC + hashlib.sha256(data[start:]).digest() + data[start:]


def _header(data: bytes) -> bytes:
    with np.load(io.BytesIO(data[len(MAGIC) + 32 :])) as arrays:
        return arrays["header"].tobytes()


def _with_header(data: bytes, header: bytes) -> bytes:
    """Return a checkpoint with the arrays that `header` names, as far as `data` has them."""
    with np.load(io.BytesIO(data[len(MAGIC) + 32 :])) as arrays:
        members = {
            name: arrays[name]
            for name in arrays.files
            if name != "header" and json.dumps(name).encode() in header
        }
    file = io.BytesIO()
    np.savez(file, header=np.frombuffer(header, np.uint8), **members)
    return _with_hash(MAGIC + bytes(32) + file.getvalue())


def _with_digest(data: bytes) -> bytes:
    """Let the second line be the hash of the third."""
    lines = data.split(b"\n", 2)
    if len(lines) < 3:
        return data
    body = lines[2].split(b"\n")[0]
    return b"\n".join((lines[0], hashlib.sha256(body).hexdigest().encode(), lines[2]))


def _identities(folder: Path) -> list[Target]:
    """Keys, certificates and rosters."""
    identity = identity_of(0)
    certificates = [identity_of(client).certificate for client in range(3)]
    roster = enrollment.roster_json(AUTHORITY, certificates)
    key, public = identity.key.to_pem(), identity.key.public.to_pem()
    helper = X25519PrivateKey.from_private_bytes(bytes(range(32)))
    helper_pem = helper.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    crt, secret = folder / "device.crt", folder / "device.key"
    crt.write_bytes(certificates[0].to_bytes())
    _file(secret, Path.exists, key)

    def described(path: Path) -> object:
        return enrollment.describe(path, NOW)

    target = partial(Target, error=ConfigurationError)
    return [
        target("secret key", [key], SigningKey.from_pem, share=2),
        target("public key", [public], VerifyKey.from_pem, share=2),
        target(
            "helper's key",
            [helper_pem, bytes(range(32))],
            partial(_file, folder / "helper.key", load_helper_key),
            share=2,
        ),
        target(
            "identity of a device",
            [certificates[0].to_bytes()],
            partial(_file, folder / "other.crt", lambda path: load_identity(path, secret)),
            relatives=[certificate.to_bytes() for certificate in certificates[1:]],
            share=2,
        ),
        target(
            "any file of an enrollment",
            [key, public, certificates[0].to_bytes(), ROOT.public.to_pem()],
            partial(_file, folder / "any", described),
            share=3,
        ),
        target(
            "roster", [roster], partial(_file, folder / "roster", described), text=True, share=3
        ),
    ]


def _arrays(folder: Path) -> list[Target]:
    """Samples on a board, data sets on a device: whole archives, and arrays inside one."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    y = np.array([0, 1, 1])
    parts = {"x": x, "y": y, "x_train": x, "y_train": y, "x_test": x, "y_test": y}
    archives, inner = [], []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, **parts)
        archives.append(buffer.getvalue())
    for array in (x, x.astype(np.float64), np.asfortranarray(x)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        inner.append(buffer.getvalue())
    data = folder / "data.npz"

    def load_data(path: Path) -> object:
        return load(NpzFile(path=str(path)))

    targets = []
    for name, read in (("samples", read_samples), ("data set", load_data)):
        file = partial(_file, data, read)
        targets += [
            Target(f"{name}: archive", archives, file, DataError, share=2),
            Target(
                f"{name}: array in an archive",
                inner,
                lambda array, file=file: file(_archive(array, archives[0])),
                DataError,
                share=2,
            ),
        ]
    return targets


def _boards(folder: Path) -> list[Target]:
    """What the processes of a board keep and pass on, and a data set that they map."""
    seal = Seal(bytes(range(32)))
    corpus = [seal.close("answers", b"a journal" * length) for length in (0, 1, 40)]
    passed = []
    for parts in ([], [b""], [b"head", b"a model" * 9]):
        descriptor = parcels.new_file()
        parcels.write(descriptor, parts)
        passed.append(os.pread(descriptor, 1 << 16, 0))
        os.close(descriptor)
    mapped = folder / "mapped"
    write_mapped(load(Digits()), mapped)
    labels = (mapped / "y_test.npy").read_bytes()

    def map_labels(data: bytes) -> object:
        (mapped / "y_test.npy").write_bytes(data)
        return load(NpzFile(path=str(mapped)))

    return [
        Target(
            "sealed file",
            corpus,
            partial(seal.open, "answers"),
            BrokenSealError,
            relatives=[seal.close("contexts", b"a journal"), Seal(bytes(32)).close("answers", b"")],
        ),
        Target("parcel", passed, _parcel, LocalProtocolError),
        Target("data set: mapped array", [labels], map_labels, DataError, share=1),
    ]


def _parcel(data: bytes) -> object:
    descriptor = parcels.new_file()
    try:
        os.pwrite(descriptor, data, 0)
        return parcels.read(descriptor)
    finally:
        os.close(descriptor)


def _archive(array: bytes, template: bytes) -> bytes:
    """Return `template` with the bytes of another x and x_train."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(template)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, array if name in {"x.npy", "x_train.npy"} else old.read(name))
    return buffer.getvalue()


def _runs(folder: Path) -> list[Target]:
    """What the report reads of a finished run, each file in turn."""
    run = folder / "run"
    (run / ".hydra").mkdir(parents=True)
    ledger = PrivacyLedger(delta=1e-5, epsilon_budget=3.0).record(_release(1))
    contents = {
        "summary.json": json.dumps(SUMMARY).encode(),
        "metrics.jsonl": b"".join(
            json.dumps(ROUND | {"round": number}).encode() + b"\n" for number in (1, 2)
        ),
        "ledger.json": ledger.to_json().encode(),
        ".hydra/overrides.yaml": b'["experiment=tiny", "seed=3"]',
    }
    for name, content in contents.items():
        (run / name).write_bytes(content)

    def with_file(name: str, data: bytes) -> object:
        try:
            (run / name).write_bytes(data)
            return asdict(read_run(run))
        finally:
            (run / name).write_bytes(contents[name])

    return [
        Target(f"{name} of a run", [content], partial(with_file, name), ConfigurationError,
               text=True, share=1)
        for name, content in contents.items()
    ]  # fmt: skip


ROUND = {
    "round": 1, "accuracy": 0.5, "loss": 0.7, "train_accuracy": None, "train_loss": None,
    "invited": 10, "survivors": 9, "lost": {"upload": 1}, "attempts": 1, "aborted": [],
    "clipped": 3, "uplink_bytes": 90_000, "uplink_payload_bytes": 72_000,
    "downlink_bytes": 400_000, "uploads": 9, "epsilon": 1.0, "seconds": 1.5,
}  # fmt: skip
SUMMARY = {
    "experiment": "tiny", "seed": 3, "rounds": 2, "completed_rounds": 2, "stopped": None,
    "clients": 20, "clients_per_round": 10, "parameters": 10_000, "initial_accuracy": 0.1234,
    "accuracy": 0.8766, "loss": 0.4321, "uplink_bytes_per_client_round": 10_120.0,
    "uplink_payload_bytes_per_client_round": 8_000.0, "uplink_bits_per_parameter": 6.4,
    "uplink_reduction": 3.953, "uplink_payload_reduction": 5.05,
    "downlink_bytes_per_client_round": 41_300.0, "downlink_reduction": 0.969,
    "secagg": {"protocol": "bonawitz", "neighbours": 8, "threshold": 5, "dropped_clients": 6,
               "aborted_rounds": 1},
    "epsilon": 1.0, "delta": 1e-5, "seconds_total": 12.25, "clients_per_second": 3.37,
    "peak_memory_mb": 654.0,
    "release": {"path": "outputs/tiny/model/7", "version": 7, "onnx_bytes": 23_400,
                "agreement": 0.9912, "float_accuracy": 0.8766, "int8_accuracy": 0.8642,
                "device_latency_ms": 0.17, "device_peak_memory_mb": 63.0},
}  # fmt: skip
