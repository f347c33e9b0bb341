"""Simulated nodes: an ordinary ClientApp, one persistent Context each.

Between two real nodes there is a wire, and a wire copies. Inside one process it has to
be imitated: Flower's strategies put the *same* RecordDict into the messages to all
nodes, so a client that empties its content to save memory would empty everybody's.
`isolated` copies the structure (records, lists, the `Array` objects) and shares the
bytes of arrays, which nobody can change. Its cost does not depend on the model's size.

A node follows the real ClientApp process, error for error:

    the app raises            Error 2, and the state from before the message stays
    the app calls sys.exit    Error 8, as if its process had ended
    KeyboardInterrupt         goes up: it is meant for the person at the keyboard
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedcore.engine.flower_private import ErrorCode, Identity, readdressed, set_message_id
from fedcore.errors import ConfigurationError

Scalar: TypeAlias = str | int | float | bool
Config: TypeAlias = Mapping[str, Scalar]

FIRST_NODE_ID = 1000
"""Node id of partition 0: node 1007 holds partition 7, and id 1 stays the SuperLink's."""

_logger = logging.getLogger("fedcore.engine")


def isolated(content: RecordDict) -> RecordDict:
    """Return a copy of `content` that shares nothing but immutable values with it."""
    copied = RecordDict()
    for name, record in content.items():
        twin = record.copy()
        if isinstance(twin, ArrayRecord):
            for key, array in twin.items():
                twin[key] = Array(array.dtype, tuple(array.shape), array.stype, bytes(array.data))
        else:
            for key, value in twin.items():
                if isinstance(value, list):
                    twin[key] = value.copy()  # type: ignore[assignment]
        copied[name] = twin
    return copied


def checked(config: Mapping[str, object], what: str) -> dict[str, Scalar]:
    """Return a copy of `config`, whose values Flower can carry.

    Raises:
        ConfigurationError: A value is not a str, int, float or bool.
    """
    values: dict[str, Scalar] = {}
    for key, value in config.items():
        if not isinstance(value, str | int | float):
            msg = (
                f"{what}[{key!r}] must be a str, int, float or bool, got "
                f"{type(value).__name__}: Flower's configurations are flat"
            )
            raise ConfigurationError(msg)
        values[key] = value
    return values


class Nodes:
    """All simulated nodes of a run, and the ClientApp that they execute.

    Args:
        client_app: Any Message-API ClientApp.
        node_configs: One mapping for each node; `partition-id` and `num-partitions` are
            filled in from its position unless they are given.
        run_config: What every node sees as `context.run_config`.
        run_id: Of the run that the nodes take part in.
    """

    def __init__(
        self, client_app: ClientApp, node_configs: Sequence[Config], run_config: Config, run_id: int
    ) -> None:
        if not node_configs:
            msg = "node_configs must describe at least one node, got none: add one mapping a node"
            raise ConfigurationError(msg)
        self._app = client_app
        self._run_id = run_id
        self._run_config = checked(run_config, "run_config")
        self._configs: dict[int, dict[str, Scalar]] = {}
        for index, config in enumerate(node_configs):
            defaults = {"partition-id": index, "num-partitions": len(node_configs)}
            self._configs[FIRST_NODE_ID + index] = {**defaults, **checked(config, "node_config")}
        self._states = {node_id: RecordDict() for node_id in self._configs}
        self._reported: set[str] = set()

    @property
    def ids(self) -> tuple[int, ...]:
        """Node ids, in the order of the configurations."""
        return tuple(self._configs)

    def states(self, node_ids: Iterable[int]) -> dict[int, RecordDict]:
        """Return what each of these nodes keeps in its Context; nothing for those without."""
        kept = {node_id: self._states[node_id] for node_id in node_ids}
        return {node_id: isolated(state) for node_id, state in kept.items() if state}

    def restore(self, states: Mapping[int, RecordDict]) -> None:
        """Let nodes keep what `states` returned; the others keep nothing.

        Raises:
            ConfigurationError: A state is of a node that does not exist.
        """
        unknown = sorted(set(states) - set(self._configs))
        if unknown:
            msg = f"states must be of the nodes {FIRST_NODE_ID}.., got one of node {unknown[0]}"
            raise ConfigurationError(msg)
        self._states = {
            node_id: isolated(states.get(node_id, RecordDict())) for node_id in self._configs
        }

    def answer(self, message: Message, task_id: int) -> Message:
        """Run the ClientApp on a message that this node owns, and return its reply.

        Args:
            message: Addressed to one of `ids`; the app may change its content.
            task_id: What messages that the app itself constructs carry as their source.
        """
        node_id = message.metadata.dst_node_id
        with Identity(task_id, self._run_id, node_id).assumed():
            reply = self._run(message, node_id)
        set_message_id(reply, f"{message.metadata.message_id}/reply")
        return reply

    def _run(self, message: Message, node_id: int) -> Message:
        asked = message.metadata
        # The app works on copies, as in a process of its own: a failure changes nothing.
        context = Context(
            run_id=self._run_id,
            node_id=node_id,
            node_config=dict(self._configs[node_id]),
            state=isolated(self._states[node_id]),
            run_config=dict(self._run_config),
        )
        try:
            reply = self._app(message, context)
            problem = _problem(reply, asked.message_id)
        except Exception as error:
            reason = _describe(error)
            if reason not in self._reported:  # a thousand nodes may fail in the same way
                self._reported.add(reason)
                _logger.exception("node %d failed in %s", node_id, asked.message_type)
            return failure(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        except SystemExit as error:
            reason = f"the ClientApp ended its process with exit status {error.code}"
            return failure(message, ErrorCode.CLIENT_APP_CRASHED, reason)
        if problem:
            return failure(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, problem)
        self._states[node_id] = context.state
        return readdressed(reply, isolated(reply.content)) if reply.has_content() else reply


def failure(message: Message, code: int, reason: str) -> Message:
    """Return the error reply of the node that `message` was sent to."""
    return Message(Error(code, reason), reply_to=message)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _problem(reply: object, message_id: str) -> str:
    if not isinstance(reply, Message):
        return f"the ClientApp must return a Message, got {type(reply).__name__}"
    if reply.metadata.reply_to_message_id != message_id:
        return "the ClientApp returned a message that is not a reply: pass reply_to=message"
    return ""
