"""Messages, apps and links for tests of a board's processes, without a SuperLink."""

import os
from contextlib import contextmanager
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from experiments.edge import flower_board
from experiments.edge.pace import Pace
from experiments.edge.parcels import App, Ended, Task, new_file, read, receive, send, write
from experiments.edge.settings import Settings
from fedcore.engine.flower_private import Identity

APP = App("/apps/one", "fedcore/one", "0.1.0", "ab" * 32)
OTHER_APP = App("/apps/other", "fedcore/other", "0.1.0", "cd" * 32)


def settings(folder, **changes):
    """The settings of a board that lives in `folder`."""
    values = {
        "superlink": "localhost:1", "authority": "ca.crt", "node_key": "node.auth",
        "state": str(folder), "state_key": str(folder / "state.key"), "node_config": {},
        "pace": Pace(), "warm_seconds": 60.0,
    }  # fmt: skip
    return Settings(**values | changes)


def asked(number=1):
    """The parts of a request: Context, message, tree and objects."""
    with Identity(task_id=0, run_id=9, node_id=1).assumed():
        message = Message(RecordDict({"config": ConfigRecord({"number": number})}), 1000, "train")
        context = Context(9, 1000, {"partition-id": 0}, RecordDict(), {}, series_id=4)
        packed = flower_board._packed(message)
    return [context_to_proto(context).SerializeToString(), *packed]


def told(parts):
    """The Context and the reply in the parts of an answer."""
    context = context_from_proto(ContextProto.FromString(parts[0]))
    head = message_from_proto(MessageProto.FromString(parts[1]))
    tree = ObjectTree.FromString(parts[2])
    ids = [part.object_id for part in iterate_object_tree(tree)]
    contents = dict(zip(ids, parts[3:], strict=True))
    whole = inflate_object_from_contents(tree.object_id, contents, keep_object_contents=False)
    return context, head, whole


def ask(link, parts, number=1, app=APP):
    """Send a task over a link and wait for its end; return the status and the answer's parts."""
    request, reply = new_file(), new_file()
    try:
        write(request, parts)
        send(link, Task(number, app), (request, reply))
        ended, _ = receive(link)
        assert isinstance(ended, Ended)
        assert ended.number == number
        return ended.status, read(reply) if ended.status == 0 else None
    finally:
        os.close(request)
        os.close(reply)


@contextmanager
def log_file(folder):
    """The descriptor of a log."""
    descriptor = os.open(Path(folder) / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
