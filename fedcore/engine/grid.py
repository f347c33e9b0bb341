"""Flower's Grid without a network: ordinary apps, one process, replies on demand.

A ServerApp talks to its nodes through a `Grid`. `InProcessGrid` calls the ClientApp
instead of sending to it, and keeps to what a ServerApp can observe of a SuperLink:
messages cross by value, ids are unique, each reply is handed out once, a node that does
not exist is unavailable, and a client's exception is an Error reply.

Execution is lazy. `push_messages` only enqueues; a node runs when iteration over
`pull_messages` reaches its reply, so that a server that adds replies to a running sum
holds one of them at a time. Whatever the order of the ids (strategies pass sets, whose
order changes from process to process), nodes run in the order in which their messages
were pushed: a run is repeatable bit for bit if its apps are. (Flower's strategies
sample nodes with Python's global `random`: seed it.)

Not imitated: time. A message does not expire while it waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedcore.engine.clock import Clock, SystemClock
from fedcore.engine.flower_private import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    Identity,
    Run,
    empty_run,
    readdressed,
    set_message_id,
    unavailable,
)
from fedcore.engine.nodes import Config, Nodes, isolated
from fedcore.engine.workers import Executor, Forked, Serial
from fedcore.errors import ConfigurationError

RUN_ID = 1
SERVER_TASK_ID = 1


class InProcessGrid(Grid):
    """Runs a ClientApp for the messages of a ServerApp.

    From construction until `close`, messages made in this process come from the server
    of this run. Use it as a context manager; grids close in the reverse order.

    Args:
        client_app: Any Message-API ClientApp.
        node_configs: One mapping for each node; `partition-id` and `num-partitions` are
            filled in from its position unless they are given.
        run_config: What every node sees as `context.run_config`.
        workers: 0 runs nodes in the calling thread; n > 0 in n forked processes, with the
            same replies. Workers compute with one thread each: call
            `torch.set_num_threads(1)` in the parent, too, to compare bit for bit.
        clock: Measures the timeout of `send_and_receive`.

    Example:
        >>> from flwr.app import Message, RecordDict
        >>> from flwr.clientapp import ClientApp
        >>> app = ClientApp()
        >>> @app.train()
        ... def train(message, context):
        ...     return Message(RecordDict(), reply_to=message)
        >>> with InProcessGrid(app, [{}, {}], run_config={}) as grid:
        ...     messages = [Message(RecordDict(), n, "train") for n in grid.get_node_ids()]
        ...     [reply.metadata.src_node_id for reply in grid.send_and_receive(messages)]
        [1000, 1001]

    Raises:
        ConfigurationError: No nodes, a nested configuration, or workers out of range.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[Config],
        run_config: Config,
        workers: int = 0,
        *,
        clock: Clock | None = None,
    ) -> None:
        if workers < 0:
            msg = f"workers must be in 0..cores, got {workers}: 0 runs in the calling thread"
            raise ConfigurationError(msg)
        nodes = self._nodes = Nodes(client_app, node_configs, run_config, RUN_ID)
        self._node_ids = dict.fromkeys(nodes.ids)  # ordered, and quick to search
        self._executor: Executor = Forked(nodes, workers) if workers else Serial(nodes)
        self._clock = clock or SystemClock()
        self._run = empty_run(RUN_ID)
        self._pushed = 0
        self._pending: dict[str, tuple[int, Message]] = {}
        self._submitted: set[str] = set()
        self._open = ExitStack()
        self._open.callback(self._executor.close)
        self._open.enter_context(Identity(SERVER_TASK_ID, RUN_ID, SUPERLINK_NODE_ID).assumed())

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, also after an exception."""
        self.close()

    def close(self) -> None:
        """End the workers, and be nobody's server any more; a second call does nothing."""
        self._open.close()

    def node_states(self) -> dict[int, RecordDict]:
        """Return what the nodes keep from message to message, by node id, to go on from."""
        return self._executor.states()

    def restore_nodes(self, states: Mapping[int, RecordDict]) -> None:
        """Let the nodes keep what `node_states` returned, in this process or an earlier one.

        Raises:
            RuntimeError: Messages were sent already.
            ConfigurationError: A state is of a node that does not exist.
        """
        if self._pushed:
            msg = "nodes are restored before the first message, and some were sent"
            raise RuntimeError(msg)
        self._nodes.restore(states)

    def set_run(self, run: Run) -> None:
        """Accept a description of the run that this grid was made for.

        Raises:
            ConfigurationError: It is another run.
        """
        if run.run_id != RUN_ID:
            msg = f"an in-process grid serves run {RUN_ID} only, got {run.run_id}: make a new grid"
            raise ConfigurationError(msg)
        self._run = run

    @property
    def run(self) -> Run:
        """The run that all messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; Flower deprecates this in favour of `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return all node ids, in the order of the node configurations."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Enqueue copies of `messages`, set their ids, and return these at once.

        Raises:
            ValueError: A message is itself a reply, has no content or has expired.
        """
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies to `message_ids`; nodes run as iteration proceeds.

        Replies come in the order in which the messages were pushed. The ids are read now:
        the caller may change its set while it iterates. What iteration does not reach
        stays available. An id that is unknown, or whose reply was handed out before, gives
        the error MESSAGE_UNAVAILABLE, as from a SuperLink.
        """
        return self._replies(sorted(set(message_ids), key=self._position))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push `messages` and return their replies, in the same order.

        With a `timeout` in seconds no further reply is waited for once it has passed; what
        is missing can still be pulled.
        """
        deadline = None if timeout is None else self._clock.now() + timeout
        replies: list[Message] = []
        source = self.pull_messages(self.push_messages(messages))
        while deadline is None or self._clock.now() < deadline:
            reply = next(source, None)
            if reply is None:
                break
            replies.append(reply)
        return replies

    def _push(self, message: Message) -> str:
        metadata = message.metadata
        if metadata.reply_to_message_id or not message.has_content() or metadata.ttl <= 0:
            msg = f"a pushed message must be an instruction with content and ttl > 0: {metadata}"
            raise ValueError(msg)
        message_id = f"run-{RUN_ID}/message-{self._pushed}"
        set_message_id(message, message_id)
        copied = readdressed(message, isolated(message.content))
        self._pending[message_id] = (self._pushed, copied)
        self._pushed += 1
        return message_id

    def _position(self, message_id: str) -> tuple[int, str]:
        position, _ = self._pending.get(message_id, (self._pushed, None))
        return position, message_id

    def _replies(self, message_ids: Sequence[str]) -> Iterator[Message]:
        ahead: deque[str] = deque()
        for message_id in message_ids:
            self._submit(message_id)
            ahead.append(message_id)
            if len(ahead) >= self._executor.window:
                yield self._take(ahead.popleft())
        while ahead:
            yield self._take(ahead.popleft())

    def _submit(self, message_id: str) -> None:
        if message_id not in self._pending or message_id in self._submitted:
            return
        position, message = self._pending[message_id]
        if message.metadata.dst_node_id in self._node_ids:
            self._submitted.add(message_id)
            self._executor.submit(message, SERVER_TASK_ID + 1 + position)

    def _take(self, message_id: str) -> Message:
        _, message = self._pending.pop(message_id, (0, None))
        if message_id in self._submitted:
            self._submitted.remove(message_id)
            return self._executor.result(message_id)
        if message is None:
            code = ErrorCode.MESSAGE_UNAVAILABLE
            reason = f"no message {message_id!r} awaits a reply: it is unknown or was answered"
        else:
            code = ErrorCode.NODE_UNAVAILABLE
            node_id = message.metadata.dst_node_id
            reason = f"there is no node {node_id}: send to one of grid.get_node_ids()"
        return unavailable(
            message.metadata if message else None,
            message_id=message_id,
            run_id=RUN_ID,
            code=code,
            reason=reason,
        )
