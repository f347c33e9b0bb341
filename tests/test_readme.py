"""What README.md shows works as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcore.engine import run_in_process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def test_the_readme_shows_both_halves_and_a_plan():
    assert len(PYTHON) == 4
    assert "make run" in SHELL
    assert "make test" in SHELL


def test_the_python_blocks_make_one_working_federation():
    server_block, client_block, plan_block, policy_block = PYTHON
    client_names: dict[str, object] = {}
    exec(compile(client_block, "README.md", "exec"), client_names)
    exec(compile(policy_block, "README.md", "exec"), client_names)
    client_app = client_names["app"]
    assert isinstance(client_app, ClientApp)

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"].to_numpy_ndarrays()
        content = RecordDict(
            {
                "arrays": ArrayRecord([array + 1 for array in arrays]),
                "metrics": MetricRecord({"num-examples": 5, "loss": 0.5}),
            }
        )
        return Message(content, reply_to=message)

    @client_app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 5, "accuracy": 1.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    server_app = ServerApp()
    results = []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        names: dict[str, object] = {"grid": grid, "arrays": ArrayRecord([np.zeros(40, np.float32)])}
        block = server_block.replace("FedAvg().start", "result = FedAvg().start")
        exec(compile(block, "README.md", "exec"), names)
        results.append(names["result"])
        exec(compile(plan_block, "README.md", "exec"), names)
        assert names["grid"].plan == names["plan"]

    run_in_process(server_app, client_app, num_nodes=5)
    (trained,) = results[0].arrays.to_numpy_ndarrays()
    np.testing.assert_allclose(trained, 10, atol=0.01)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith(".venv/bin/python")])
def test_every_command_runs(line, tmp_path):
    _, *arguments = shlex.split(line)
    if "--help" not in arguments:
        arguments.append(f"output={tmp_path / 'out'}")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
