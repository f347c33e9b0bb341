"""What we use of Flower beyond its public modules, in one place.

Written against flwr 1.41.0, which `pyproject.toml` pins: Flower renames its internals
from one release to the next. Each symbol is here because there is no public way:

    TaskIdentity          `Message(...)` reads run, node and task from this class; unset, it raises
    _message_id           ids are given by the transport, and `Metadata` has no setter for it;
                          Flower's own grids write the same dictionary entry
    Message(metadata=)    an error that the SuperLink sends for a silent node has the SuperLink
                          as its source, which `Message(error, reply_to=...)` cannot express
    ErrorCode             the numbers in `Error.code`
    SUPERLINK_NODE_ID     the node id of the server's end
    Run                   the return type of the abstract property `Grid.run`
    recorddict_to_proto   the only bytes of a RecordDict that Flower reads again
    telemetry, logger     `run_simulation` reports home and announces its deprecation; both are
                          switched off for the duration of a call
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

__all__ = [
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "Identity",
    "Run",
    "empty_run",
    "pack_records",
    "quiet_simulation",
    "readdressed",
    "set_message_id",
    "unavailable",
    "unpack_records",
]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who constructs messages in this process; None stands for "not set"."""

    task_id: int | None
    run_id: int | None
    node_id: int | None

    @classmethod
    def current(cls) -> Identity:
        """Return the identity in force."""
        state = vars(TaskIdentity)
        return cls(state["_task_id"], state["_run_id"], state["_node_id"])

    def assume(self) -> None:
        """Make this the identity of the process."""
        values = {"_task_id": self.task_id, "_run_id": self.run_id, "_node_id": self.node_id}
        for name, value in values.items():  # the public setters do not take None
            setattr(TaskIdentity, name, value)

    @contextlib.contextmanager
    def assumed(self) -> Iterator[None]:
        """Assume this identity inside a `with` block and return to the one before."""
        before = Identity.current()
        self.assume()
        try:
            yield
        finally:
            before.assume()


def empty_run(run_id: int) -> Run:
    """Return the description of a run that belongs to no SuperLink."""
    return Run.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Give `message` its id, as a transport does when it accepts it."""
    vars(message.metadata)["_message_id"] = message_id


def readdressed(message: Message, content: RecordDict) -> Message:
    """Return a message with the metadata of `message`, copied, and another content."""
    # The constructor's overloads leave out the argument that Flower calls internal.
    return Message(metadata=copy.copy(message.metadata), content=content)  # type: ignore[call-overload,no-any-return]


def unavailable(
    asked: Metadata | None, *, message_id: str, run_id: int, code: int, reason: str
) -> Message:
    """Return the error by which a SuperLink answers in place of a node.

    Args:
        asked: Metadata of the message that gets no answer; None if there never was one.
        message_id: Id of that message.
        run_id: The run that asks.
        code: One of `ErrorCode`.
        reason: What happened and what to do.
    """
    now = time.time()
    left = max(asked.created_at + asked.ttl - now, 0.0) if asked else 0.0
    metadata = Metadata(
        run_id=run_id,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=SUPERLINK_NODE_ID,
        reply_to_message_id=message_id,
        group_id=asked.group_id if asked else "",
        created_at=now,
        ttl=left,
        message_type=asked.message_type if asked else "system",
    )
    reply: Message = Message(metadata=metadata, error=Error(code, reason))  # type: ignore[call-overload]
    set_message_id(reply, f"{message_id}/unavailable")
    return reply


def pack_records(records: RecordDict) -> bytes:
    """Return all of `records` as bytes; the same for the same records."""
    return bytes(recorddict_to_proto(records).SerializeToString(deterministic=True))


def unpack_records(data: bytes) -> RecordDict:
    """Return the records that `pack_records` wrote.

    Raises:
        ValueError: `data` is anything else.
    """
    try:
        return recorddict_from_proto(RecordDictProto.FromString(data))
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as error:
        msg = f"these are no records of Flower's ({type(error).__name__})"
        raise ValueError(msg) from error


@contextlib.contextmanager
def quiet_simulation() -> Iterator[None]:
    """Run Flower's simulation without reports home, and without the noise around its start.

    Nothing else is silenced: warnings and errors of the applications stay visible. The
    environment, which Flower and Ray change for their child processes, is restored.
    Ray leaves log files and ended processes to the garbage collector; the collector runs
    here, where Python's warnings about them tell nobody anything.
    """
    before = dict(os.environ)
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray announces a future default for hosts without accelerators; take it now.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    # Flower read the environment when it was imported. It stays off: the report on the end of
    # the run is sent by a thread that may look at the switch after we have returned.
    telemetry.FLWR_TELEMETRY_ENABLED = "0"
    logger = logging.getLogger("flwr")
    logger.addFilter(_is_worth_showing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                yield
            finally:
                gc.collect()
    finally:
        logger.removeFilter(_is_worth_showing)
        os.environ.clear()
        os.environ.update(before)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return "`run_simulation` function is deprecated" not in record.getMessage()
