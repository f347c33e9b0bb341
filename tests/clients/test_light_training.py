"""What a device loads to train: neither torch's compiler nor Opacus."""

import subprocess
import sys

import pytest

ROUND = """
import sys
from flwr.app import Message, RecordDict
from clients.client_app import build_client_app
from fedcore.engine import InProcessGrid, to_record
from fedcore.job import Job
from fedcore.models import Mlp, build
from fedcore.pipeline import Uniform
from fedcore.training import ExampleLevelPrivacy, get_arrays
from strategies import SecureGrid

privacy = {privacy}
changes = {{"privacy": privacy, "weighting": Uniform()}} if privacy else {{}}
job = Job(model=Mlp(), clients=3, clients_per_round=3, **changes)
app = build_client_app()
content = RecordDict({{"arrays": to_record(get_arrays(build(job.model, (1, 8, 8), 10, 0)))}})
reports = []
with InProcessGrid(app, [{{}}] * 3, {{"job": job.to_json()}}) as nodes:
    grid = SecureGrid(nodes, job.plan, on_round=reports.append)
    grid.send_and_receive([Message(content, node, "train") for node in nodes.get_node_ids()])
print(reports[0].survivors, [n for n in ("torch._dynamo", "opacus") if n in sys.modules])
"""


@pytest.mark.parametrize(
    "privacy", ["None", "ExampleLevelPrivacy(noise_multiplier=1.0, one_by_one=True)"]
)
def test_a_round_loads_neither_the_compiler_nor_opacus(privacy):
    code = ROUND.format(privacy=privacy)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.strip() == "3 []", done.stderr


STAGES = """
import sys
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from clients.client_app import build_client_app
from fedcore.engine import InProcessGrid
from fedcore.errors import RoundAbortedError
from fedcore.job import Job
from strategies import SecureGrid

app, seen = build_client_app(), []

class Noting(ClientApp):
    def __call__(self, message, context):
        try:
            return app(message, context)
        finally:
            seen.append("torch" in sys.modules)

job = Job(clients=3, clients_per_round=3)
content = RecordDict({"arrays": ArrayRecord([np.zeros(3, np.float32)])})
with InProcessGrid(Noting(), [{}] * 3, {"job": job.to_json()}) as nodes:
    messages = [Message(content, node, "train") for node in nodes.get_node_ids()]
    try:
        SecureGrid(nodes, job.plan).send_and_receive(messages)
    except RoundAbortedError:
        pass  # these arrays fit no model: the first message that trains ends the round
print(seen[:7])
"""


def test_the_stages_of_a_round_before_training_do_not_load_torch():
    """Three devices advertise and share; the first that trains loads it."""
    done = subprocess.run(
        [sys.executable, "-c", STAGES], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.strip() == f"{[False] * 6 + [True]}", done.stderr
