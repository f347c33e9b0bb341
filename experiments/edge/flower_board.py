"""Flower's device side without its processes: everything that the edge runner takes from it.

Flower 1.41 has no public way to answer a message but its own programs, which start a new
Python for each one and poll three times on the way. Their parts are functions; these are
the ones we call. `PINS` says what we rely on: the version, and the parameters of each
function. `check_pins` compares them with what is installed before anything starts, so
that another Flower is refused with one line instead of a wrong answer later.

    http_request_response    the connection to a SuperLink: register, pull, push, heartbeats
    install_from_fab         unpacks a bundle and checks the hashes in it
    get_load_client_app_fn   imports the ClientApp that a bundle names
    inflate, deflate         messages travel as objects, each under the hash of its content
    TaskIdentity             a Message asks this class who sends it
    flwr_exit                ends the process where a SuperLink refuses; here it raises
"""

from __future__ import annotations

import inspect
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.install import install_from_fab
from flwr.clientapp.client_app import ClientApp, LoadClientAppError
from flwr.clientapp.utils import get_load_client_app_fn
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import ErrorCode
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_connection import http_request_response

from experiments.edge.parcels import App
from fedcore.errors import ConfigurationError, FedcoreError

__all__ = [
    "ClientApp",
    "Connection",
    "Received",
    "RefusedError",
    "RunNotRunningException",
    "answer",
    "check_pins",
    "connect",
    "crashed",
    "load_app",
    "node_key",
    "state_of",
]

VERSION: Final = "1.41."
_FIRST_BACKOFF_SECONDS: Final = 0.05
"""Doubles. A message is announced some milliseconds before its parts are there; Flower's first
pause is a second."""
PINS: Final[Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]] = {
    "http_request_response": (
        http_request_response,
        (
            *("server_address", "insecure", "root_certificates", "authentication_keys"),
            *("max_retries", "max_wait_time"),
        ),
    ),
    "flwr_exit": (
        vars(fleet_http_connection)["flwr_exit"],
        ("code", "message", "event_type", "event_details", "emit_telemetry"),
    ),
    "install_from_fab": (install_from_fab, ("fab_file", "install_dir", "skip_prompt")),
    "get_load_client_app_fn": (
        get_load_client_app_fn,
        ("default_app_ref", "app_path", "multi_app"),
    ),
    "get_fused_config_from_fab": (get_fused_config_from_fab, ("fab_file", "run")),
    "get_object_tree": (get_object_tree, ("obj",)),
    "get_all_nested_objects": (get_all_nested_objects, ("obj",)),
    "iterate_object_tree": (iterate_object_tree, ("tree",)),
    "inflate_object_from_contents": (
        inflate_object_from_contents,
        ("object_id", "object_contents", "keep_object_contents", "objects"),
    ),
    "pull_objects": (
        pull_objects,
        (
            *("object_ids", "pull_object_fn", "max_concurrent_pulls", "max_time"),
            *("max_tries_per_object", "initial_backoff", "backoff_cap"),
        ),
    ),
    "push_object_contents_from_iterable": (
        push_object_contents_from_iterable,
        ("object_contents", "push_object_fn", "max_concurrent_pushes"),
    ),
    "remove_content_from_message": (remove_content_from_message, ("message",)),
    "context_to_proto": (context_to_proto, ("context",)),
    "context_from_proto": (context_from_proto, ("context_proto",)),
    "message_to_proto": (message_to_proto, ("message",)),
    "message_from_proto": (message_from_proto, ("message_proto",)),
}
"""What is called, and the parameters it must have."""
_ACTIVATION_FAILED: Final = "[code: 2004]"


class RefusedError(FedcoreError):
    """The SuperLink did not take this node.

    Attributes:
        for_now: Whether that may change by itself: the SuperLink still waits for the
            heartbeats of this node's last process, or TLS broke off while it began, as when a
            proxy is killed. Flower gives up on both.
    """

    def __init__(self, message: str) -> None:
        broken_off = "SSL" in message and "certificate" not in message.lower()
        self.for_now = _ACTIVATION_FAILED in message or broken_off
        super().__init__(message)


def check_pins(
    pins: Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]] = PINS,
    version: str | None = None,
) -> None:
    """Compare the installed Flower with the one that this file was written for.

    Args:
        pins: What is called, and its parameters.
        version: Of Flower; the installed one's if None.

    Raises:
        ConfigurationError: It is another one.
    """
    found = version or metadata.version("flwr")
    changed = [
        name
        for name, (function, parameters) in pins.items()
        if tuple(inspect.signature(function).parameters) != parameters
    ]
    if not found.startswith(VERSION) or changed:
        what = f", whose {', '.join(changed)} changed" if changed else ""
        msg = (
            f"the edge runner is written for flwr {VERSION}*, found {found}{what}: "
            f'pip install "flwr=={VERSION}*"'
        )
        raise ConfigurationError(msg)


def node_key(data: bytes) -> tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]:
    """Return the pair with which a node signs its requests.

    Raises:
        ConfigurationError: The file holds no such key.
    """
    try:
        key = load_ssh_private_key(data, None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        msg = "the node's key must be one of an elliptic curve in OpenSSH's format: create it anew"
        raise ConfigurationError(msg)
    return key, key.public_key()


@dataclass(frozen=True, slots=True)
class Received:
    """A message as it came, and where it belongs.

    Attributes:
        message: Without its content.
        run: What the SuperLink says of its run.
        parts: The message, its tree and its objects, for `answer`.
    """

    message: Message
    run: Run
    parts: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Connection:
    """A SuperLink that has taken this node."""

    node_id: int
    calls: tuple[Callable[..., Any], ...]
    runs: dict[int, Run]
    heartbeats: Callable[[], bool] = lambda: True

    def receive(self) -> Received | None:
        """Pull one message with all of its objects; None if there is none.

        Raises:
            RunNotRunningException: Its run ended meanwhile.
            ConnectionError: Flower's thread of heartbeats ended: what it cannot explain it does
                not try again, and the SuperLink would take this node for dead from then on.
        """
        if not self.heartbeats():
            msg = "no heartbeats are sent any more: connecting anew"
            raise ConnectionError(msg)
        pull, _, get_run, _, pull_object, _, confirm = self.calls
        received = pull()
        if received is None:
            return None
        message, tree = received
        run_id = message.metadata.run_id
        if run_id not in self.runs:
            self.runs.clear()
            self.runs[run_id] = get_run(run_id)
        ids = [part.object_id for part in iterate_object_tree(tree)]
        objects = pull_objects(
            ids,
            lambda object_id: pull_object(run_id, object_id),
            initial_backoff=_FIRST_BACKOFF_SECONDS,
        )
        confirm(run_id, message.metadata.message_id)
        parts = (
            message_to_proto(message).SerializeToString(),
            tree.SerializeToString(),
            *(objects[object_id] for object_id in ids),
        )
        return Received(message, self.runs[run_id], parts)

    def bundle(self, run: Run, folder: Path) -> tuple[App, bytes]:
        """Fetch and unpack the app of a run, and remove those of others.

        Args:
            run: Of the message.
            folder: For unpacked apps, and nothing else.
        """
        fab = self.calls[3](run.fab_hash, run.run_id)
        # Flower unpacks into a folder named after eight digits of the hash, and takes what is
        # there already: under the whole hash, and only what this process unpacked, it is the same.
        target = folder / fab.hash_str
        shutil.rmtree(folder, ignore_errors=True)
        target.mkdir(parents=True, mode=0o700)
        path = install_from_fab(fab.content, target, skip_prompt=True)
        return App(str(path), run.fab_id, run.fab_version, fab.hash_str), fab.content

    def context(
        self, run: Run, bundle: bytes, node_config: Mapping[str, Any], state: RecordDict
    ) -> bytes:
        """Return the Context with which an app begins a run."""
        context = Context(
            run_id=run.run_id,
            node_id=self.node_id,
            node_config=dict(node_config),
            state=state,
            run_config=get_fused_config_from_fab(bundle, run),
            series_id=run.series_id,
        )
        return bytes(context_to_proto(context).SerializeToString())

    def reply(self, parts: list[bytes], seconds: float) -> None:
        """Push an answer of `answer` or `crashed`, without its Context.

        Raises:
            RunNotRunningException: Its run ended meanwhile.
        """
        message = message_from_proto(MessageProto.FromString(parts[0]))
        tree = ObjectTree.FromString(parts[1])
        ids = [part.object_id for part in iterate_object_tree(tree)]
        objects = dict(zip(ids, parts[2:], strict=True))
        _, send, _, _, _, push_object, _ = self.calls
        wanted, session = send(message, tree, seconds)
        push_object_contents_from_iterable(
            ((object_id, objects[object_id]) for object_id in ids if object_id in wanted),
            lambda object_id, content: push_object(
                message.metadata.run_id, session, object_id, content
            ),
        )


def state_of(context: bytes) -> RecordDict:
    """Return what apps left in a Context."""
    return context_from_proto(ContextProto.FromString(context)).state


@contextmanager
def connect(
    superlink: str,
    authority: bytes,
    keys: tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey],
) -> Iterator[Connection]:
    """Be a node of a SuperLink inside of a `with` block; heartbeats are sent meanwhile.

    Raises:
        RefusedError: The SuperLink does not take this node.
    """
    # It would end the process, and with it the try after this one.
    vars(fleet_http_connection)["flwr_exit"] = _refuse
    before = set(threading.enumerate())
    with http_request_response(
        superlink, insecure=False, root_certificates=authority, authentication_keys=keys
    ) as (node_id, *calls):
        started = [thread for thread in threading.enumerate() if thread not in before]
        yield Connection(
            node_id,
            tuple(cast("list[Callable[..., Any]]", calls)),
            {},
            lambda: all(thread.is_alive() for thread in started),
        )


def _refuse(code: int, message: str | None = None, *_: object, **__: object) -> NoReturn:
    said = " ".join((message or f"exit code {code}").split())
    raise RefusedError(said) from None


def load_app(app: App) -> ClientApp:
    """Import the ClientApp of a bundle.

    Raises:
        LoadClientAppError: It cannot be imported, whatever the reason.
    """
    try:
        load = get_load_client_app_fn("", app.path, multi_app=True)
        return load(app.identity, app.version, app.digest)
    except LoadClientAppError:
        raise
    except Exception as error:
        msg = f"the app of {app.path} cannot be imported: {error!r}"
        raise LoadClientAppError(msg) from error


def answer(
    parts: list[bytes], task: int, load: Callable[[], ClientApp], log: Callable[[str], None]
) -> tuple[bytes, ...]:
    """Answer a message with an app, as Flower's `flwr-clientapp` does.

    Args:
        parts: The Context, the message, its tree and its objects.
        task: A number for who sends.
        load: Gives the app, or raises LoadClientAppError.
        log: Takes what an app's exception says.

    Returns:
        The Context after it, the reply, its tree and its objects.
    """
    context = context_from_proto(ContextProto.FromString(parts[0]))
    TaskIdentity.task_id, TaskIdentity.run_id = task, context.run_id
    TaskIdentity.node_id = context.node_id
    tree = ObjectTree.FromString(parts[2])
    ids = [part.object_id for part in iterate_object_tree(tree)]
    contents = dict(zip(ids, parts[3:], strict=True))
    del parts[1:]
    message = cast(
        "Message",
        inflate_object_from_contents(tree.object_id, contents, keep_object_contents=False),
    )
    del contents
    message.metadata.__dict__["_message_id"] = tree.object_id
    try:
        reply = load()(message=message, context=context)
    except Exception as error:  # noqa: BLE001 - any error of the app becomes a reply
        log("the ClientApp failed:\n" + "".join(traceback.format_exception(error)).rstrip())
        reply = Message(_error(error), reply_to=message)
        # What an app did to its Context before it failed is kept, as Flower does.
    del message
    return (context_to_proto(context).SerializeToString(), *_packed(reply))


def crashed(message: Message) -> tuple[bytes, ...]:
    """Return the reply to a message whose process ended without one, as Flower puts it."""
    error = Error(ErrorCode.CLIENT_APP_CRASHED, "ClientApp stopped responding.")
    return _packed(Message(error, reply_to=message))


def _error(error: Exception) -> Error:
    """Return what Flower tells a ServerApp of an app's exception."""
    if isinstance(error, LoadClientAppError):
        reason = "An exception was raised when attempting to load `ClientApp`"
        return Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, reason)
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<'{error}'>")


def _packed(reply: Message) -> tuple[bytes, ...]:
    """Return a reply, its tree and its objects in the tree's order."""
    vars(reply.metadata)["_message_id"] = reply.object_id
    with no_object_id_recompute():
        tree = get_object_tree(reply)
        objects = get_all_nested_objects(reply)
        head = message_to_proto(remove_content_from_message(reply)).SerializeToString()
        ids = [part.object_id for part in iterate_object_tree(tree)]
        return (head, tree.SerializeToString(), *(objects[i].deflate() for i in ids))
