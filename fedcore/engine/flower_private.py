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
    HttpGrid              takes announced replies one after the other; one alone is taken by a copy
                          of it whose client says that there is no other
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
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any, cast

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore import telemetry
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError

__all__ = [
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "Identity",
    "Run",
    "announced_replies",
    "empty_run",
    "is_networked",
    "pack_records",
    "quiet_simulation",
    "readdressed",
    "set_message_id",
    "unavailable",
    "unpack_records",
]

_SOON = (0.02, 0.04, 0.08, 0.16, 0.32)
"""Seconds until a part of an announced reply is asked for again; after that Flower waits a second,
then more. Most parts arrive some milliseconds after their announcement."""


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


def is_networked(grid: Grid) -> bool:
    """Return whether a grid is Flower's, to a SuperLink."""
    module = sys.modules.get("flwr.superlink.grid.http_grid")
    return module is not None and isinstance(grid, module.HttpGrid)


class _Announcements:
    """A grid's client that keeps what is announced, and tells the grid of one reply or of none.

    Attributes:
        client: The real one, which does everything else.
        closed: Once set, nothing is waited for any more.
        response: What is answered to `PullMessages`; None to ask for it and to answer nothing.
        found: What was asked for.
    """

    def __init__(
        self, client: Any, closed: Event, response: PullAppMessagesResponse | None = None
    ) -> None:
        self.client, self.closed, self.response = client, closed, response
        self.found = PullAppMessagesResponse()

    def PullMessages(  # noqa: N802 - as Flower calls it
        self, request: PullAppMessagesRequest
    ) -> PullAppMessagesResponse:
        if self.response is not None:
            return self.response
        self.found = self.client.PullMessages(request)
        return PullAppMessagesResponse()

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        for pause in _SOON:
            if self.closed.is_set():
                msg = "nobody waits for this reply any more"
                raise ConnectionAbortedError(msg)
            response: PullObjectResponse = self.client.PullObject(request)
            if response.object_available or not response.object_found:
                break
            self.closed.wait(pause)
        return response

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)


def announced_replies(
    grid: Grid, message_ids: Iterable[str], closed: Event
) -> list[tuple[str, Callable[[], Message]]]:
    """Ask a networked grid which replies there are; return a way to take each of them.

    Args:
        grid: For which `is_networked` holds.
        message_ids: Of the messages that are asked about.
        closed: Is set when no reply is waited for any more.

    Returns:
        For each reply the id of the message that it answers, and a function that returns it when
        all of it has arrived, or an error in its place. It may be called in any thread.
    """
    flowers: Any = grid
    asking = _Announcements(flowers._runtime_client, closed)  # noqa: SLF001
    _with_client(flowers, asking).pull_messages(message_ids)
    found = zip(asking.found.messages_list, asking.found.message_object_trees, strict=True)
    replies: list[tuple[str, Callable[[], Message]]] = []
    for message, tree in found:
        one = PullAppMessagesResponse(messages_list=[message], message_object_trees=[tree])
        alone = _with_client(flowers, _Announcements(asking.client, closed, one))
        message_id = message.metadata.reply_to_message_id
        replies.append((message_id, partial(_take, alone, message_id)))
    return replies


def _with_client(grid: Any, client: _Announcements) -> Any:
    copied = copy.copy(grid)
    copied._client = client  # noqa: SLF001
    return copied


def _take(grid: Any, message_id: str) -> Message:
    """Return the only reply of a grid, or an error: no device may end the run of all others."""
    import httpx  # noqa: PLC0415 - is there, if a grid needs it

    try:
        (reply,) = grid.pull_messages([])
    except Exception as error:  # noqa: BLE001 - a device may upload whatever it likes
        lost = isinstance(error, httpx.HTTPError)
        return unavailable(
            None,
            message_id=message_id,
            run_id=grid.run.run_id,
            code=ErrorCode.MESSAGE_UNAVAILABLE if lost else ErrorCode.UNKNOWN,
            reason=f"its reply cannot be {'had' if lost else 'read'} ({type(error).__name__})",
        )
    return cast("Message", reply)


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
