"""Where a device keeps what its uploads have left out: with Flower, or on a disk of its own.

Flower's Context stays on the node, but in the memory of the SuperNode's process: a board
that loses power loses it, and with it what the device has not sent. A node configuration
that names a file as `feedback` keeps it there instead, replaced as a whole and on the disk
before the upload leaves (`fedcore.durable`). The file carries a hash of itself, and is
sealed where the configuration names a `state-key` (`clients.at_rest`). Without one it holds
updates in the clear: it belongs where the training data is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict

from clients.at_rest import seal_of
from fedcore.durable import replace_file
from fedcore.errors import ConfigurationError, LocalProtocolError, PeerProtocolError
from fedcore.pipeline import typed
from fedcore.sealed import BrokenSealError, Seal
from fedcore.vectors import RealVector

SEALED_AS: Final = "unsent updates"
_VECTORS: Final = "fedcore.feedback"
_SENT: Final = "fedcore.feedback.sent"
_FORMAT: Final = b"fedcore feedback 1\n"
_HASH_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class LastUpload:
    """The last upload of a device, as far as it has to be kept.

    Attributes:
        node_id: Under which the device sent it.
        plan: Canonical bytes of its round's plan.
        payload: As in the upload.
        whole: What it was made from, float32, shape [dim].
        before: What that started from, float32, shape [dim]; None for nothing.
    """

    node_id: int
    plan: bytes
    payload: bytes = field(repr=False)
    whole: RealVector = field(repr=False)
    before: RealVector | None = field(repr=False)


class FeedbackStore(Protocol):
    """Keeps the last upload, and only that one."""

    def load(self) -> LastUpload | None:
        """Return what was kept; None for nothing."""
        ...

    def save(self, last: LastUpload) -> None:
        """Keep `last` instead of what was kept before."""
        ...


def store_of(context: Context) -> FeedbackStore:
    """Return the file that the node's configuration names as `feedback`, or the Context."""
    path = context.node_config.get("feedback")
    if not isinstance(path, str):
        return InContext(context.state)
    return OnDisk(Path(path), seal_of(context.node_config))


@dataclass(frozen=True, slots=True)
class InContext:
    """In the state of Flower's Context, as long as the SuperNode runs."""

    records: RecordDict = field(repr=False)

    def load(self) -> LastUpload | None:
        """Return what was kept; None for nothing.

        Raises:
            LocalProtocolError: It cannot be read.
        """
        sent = self.records.config_records.get(_SENT)
        if sent is None:
            return None
        vectors = self.records.array_records.get(_VECTORS, ArrayRecord())
        try:
            return LastUpload(
                node_id=int(typed(sent, "node", str)),
                plan=typed(sent, "plan", bytes),
                payload=typed(sent, "payload", bytes),
                whole=vectors["whole"].numpy(),
                before=vectors["before"].numpy() if "before" in vectors else None,
            )
        except (PeerProtocolError, KeyError, ValueError) as error:
            msg = f"what this device kept of its last upload cannot be read: {error}"
            raise LocalProtocolError(msg) from error

    def save(self, last: LastUpload) -> None:
        """Keep `last` instead of what was kept before."""
        vectors = {"whole": Array(last.whole)}
        if last.before is not None:
            vectors["before"] = Array(last.before)
        self.records[_VECTORS] = ArrayRecord(vectors)
        # As text: Flower's ids have 64 bits, and its records know signed integers only.
        self.records[_SENT] = ConfigRecord(
            {"node": str(last.node_id), "plan": last.plan, "payload": last.payload}
        )


@dataclass(frozen=True, slots=True)
class OnDisk:
    """In a file; made by the first upload. Its folder must exist.

    Attributes:
        path: Of the file.
        seal: The device's key for its files; None writes in the clear.
    """

    path: Path
    seal: Seal | None = None

    def load(self) -> LastUpload | None:
        """Return what was kept; None for nothing.

        Raises:
            ConfigurationError: The file is damaged or cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            msg = f"the feedback in {self.path} cannot be read: {error.strerror}"
            raise ConfigurationError(msg) from error
        damaged = False
        try:
            data = data if self.seal is None else self.seal.open(SEALED_AS, data)
        except BrokenSealError:
            damaged = True
        body = data[len(_FORMAT) + _HASH_BYTES :]
        if damaged or data != _FORMAT + hashlib.sha256(body).digest() + body:
            msg = (
                f"the feedback in {self.path} is damaged: restore the disk, or delete the file to "
                "go on without the updates that it kept"
            )
            raise ConfigurationError(msg)
        with np.load(BytesIO(body), allow_pickle=False) as arrays:
            return LastUpload(
                node_id=int(arrays["node"]),
                plan=arrays["plan"].tobytes(),
                payload=arrays["payload"].tobytes(),
                whole=arrays["whole"],
                before=arrays["before"] if len(arrays["before"]) else None,
            )

    def save(self, last: LastUpload) -> None:
        """Keep `last` instead of what was kept before; it is on the disk on return.

        Raises:
            ConfigurationError: The file cannot be written; what was kept before still is.
        """
        file = BytesIO()
        np.savez(
            file,
            node=np.array(str(last.node_id)),
            plan=np.frombuffer(last.plan, np.uint8),
            payload=np.frombuffer(last.payload, np.uint8),
            whole=last.whole,
            before=np.zeros(0, np.float32) if last.before is None else last.before,
        )
        body = file.getvalue()
        whole = _FORMAT + hashlib.sha256(body).digest() + body
        try:
            if self.seal is None:
                replace_file(self.path, whole)
            else:
                self.seal.write(self.path, SEALED_AS, whole)
        except OSError as error:
            msg = (
                f"the feedback in {self.path} cannot be kept ({error.strerror}), so nothing may be "
                "sent: give the device a writable folder on a disk with room"
            )
            raise ConfigurationError(msg) from error
