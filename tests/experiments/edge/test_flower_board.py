"""What the board takes from Flower is there, and does what Flower's own processes do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.constant import ErrorCode

from experiments.edge import flower_board
from experiments.edge.flower_board import (
    PINS,
    Connection,
    RefusedError,
    answer,
    check_pins,
    crashed,
)
from fedcore.engine.flower_private import Identity
from fedcore.errors import ConfigurationError
from tests.experiments.edge.boards import asked, told

ROOT = Path(flower_board.__file__).parents[2]


@pytest.fixture(autouse=True)
def identity():
    with Identity(task_id=0, run_id=9, node_id=1).assumed():
        yield


def echo():
    app = ClientApp()

    @app.train()
    def train(message, context):
        number = message.content["config"]["number"]
        if number < 0:
            raise ValueError("a negative number")
        context.state["seen"] = ConfigRecord({"number": number})
        return Message(
            RecordDict({"config": ConfigRecord({"twice": 2 * number})}), reply_to=message
        )

    return app


def test_the_installed_flower_is_the_one_that_the_adapter_was_written_for():
    check_pins()


def test_another_version_of_flower_is_refused():
    with pytest.raises(ConfigurationError, match=r"written for flwr 1\.41\.\*, found 1\.42\.0"):
        check_pins(version="1.42.0")


@pytest.mark.parametrize("name", PINS)
def test_a_function_with_other_parameters_is_refused_by_name(name):
    _, parameters = PINS[name]
    changed = {**PINS, name: (lambda something_else: None, parameters)}
    with pytest.raises(ConfigurationError, match=f"whose {name} changed"):
        check_pins(changed)


def test_an_app_answers_with_its_reply_and_its_context():
    said = []
    context, head, reply = told(answer(asked(21), 3, echo, said.append))
    assert reply.content["config"]["twice"] == 42
    assert context.state["seen"]["number"] == 21
    assert head.metadata.message_id == reply.object_id
    assert head.metadata.reply_to_message_id
    assert head.metadata.dst_node_id == 1
    assert not said


def test_what_an_app_raises_is_told_as_flower_tells_it():
    said = []
    _, head, _ = told(answer(asked(-1), 3, echo, said.append))
    assert head.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert head.error.reason == "<class 'ValueError'>:<'a negative number'>"
    assert "a negative number" in said[0]


def test_an_app_that_cannot_be_loaded_is_told_without_its_reason():
    def load():
        raise LoadClientAppError("no module named secret")

    _, head, _ = told(answer(asked(), 3, load, lambda _: None))
    assert head.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION
    assert "secret" not in head.error.reason


def test_a_process_that_ended_is_told_with_flowers_own_error():
    message = Message(RecordDict({}), 1000, "train")
    vars(message.metadata)["_message_id"] = "question"
    parts = crashed(message)
    _, head, _ = told([asked()[0], *parts])
    assert head.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert head.metadata.reply_to_message_id == "question"


def test_a_refusal_says_whether_it_will_pass():
    assert RefusedError("[code: 2004] Failed to activate SuperNode.").for_now
    assert RefusedError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred (_ssl.c:1006)").for_now
    assert not RefusedError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed").for_now
    assert not RefusedError("[code: 2003] this node is not registered").for_now


def test_a_connection_without_heartbeats_is_made_anew():
    connection = Connection(7, (lambda: None,) * 7, {}, lambda: False)
    with pytest.raises(ConnectionError, match="connecting anew"):
        connection.receive()
    assert Connection(7, (lambda: None,) * 7, {}).receive() is None


def test_a_key_of_another_kind_is_refused():
    with pytest.raises(ConfigurationError, match="must be one of an elliptic curve"):
        flower_board.node_key(b"no key")


def test_what_is_imported_before_a_fork_starts_no_thread_and_loads_neither_torch_nor_numpy_tools():
    code = (
        "import os, sys; import experiments.edge.launcher\n"
        "print(len(os.listdir('/proc/self/task')), sorted({'torch', 'opacus', 'sqlalchemy',"
        " 'uvicorn', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1 []\n"), done.stderr
