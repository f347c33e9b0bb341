"""Flower's PyTorch quickstart as a new user writes it, and the same with two more lines.

The app follows Flower's documentation: a torch model, `FedAvg`, a ServerApp whose main
gets a grid and a context. It knows nothing of fedcore but `secagg_mod` and `SecureGrid`.
"""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from clients import secagg_mod
from fedcore.engine import run_in_process
from fedcore.pipeline import RunPlan
from strategies import SecureGrid

CLIENTS = 5
ROUNDS = 5
PIXELS, LABELS = load_digits(return_X_y=True)
INPUTS = torch.tensor(PIXELS / 16, dtype=torch.float32)
TARGETS = torch.tensor(LABELS)
TEST = torch.arange(len(TARGETS)) % 5 == 0


class Net(nn.Module):
    """A small network with a normalisation layer, whose state has an integer counter."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


def load_data(partition_id, num_partitions):
    rows = torch.arange(len(TARGETS))[~TEST][partition_id::num_partitions]
    return INPUTS[rows], TARGETS[rows]


def accuracy_of(net, inputs, targets):
    net.eval()
    with torch.no_grad():
        return float((net(inputs).argmax(1) == targets).float().mean())


def build_client_app(mods):
    app = ClientApp(mods=mods)

    @app.train()
    def train(msg: Message, context: Context):
        net = Net()
        net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        partition_id = context.node_config["partition-id"]
        inputs, targets = load_data(partition_id, context.node_config["num-partitions"])
        optimizer = torch.optim.SGD(net.parameters(), lr=msg.content["config"]["lr"], momentum=0.9)
        shuffle = torch.Generator().manual_seed(partition_id)
        net.train()
        for _ in range(3):
            for rows in torch.randperm(len(targets), generator=shuffle).split(32):
                optimizer.zero_grad()
                loss = cross_entropy(net(inputs[rows]), targets[rows])
                loss.backward()
                optimizer.step()
        metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(targets)})
        arrays = ArrayRecord(net.state_dict())
        return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

    @app.evaluate()
    def evaluate(msg: Message, context: Context):
        net = Net()
        net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        inputs, targets = load_data(
            context.node_config["partition-id"], context.node_config["num-partitions"]
        )
        accuracy = accuracy_of(net, inputs, targets)
        metrics = MetricRecord({"eval_acc": accuracy, "num-examples": len(targets)})
        return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)

    return app


def build_server_app(secured):
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0)
        result = strategy.start(
            grid=SecureGrid(grid, RunPlan()) if secured else grid,
            initial_arrays=ArrayRecord(Net().state_dict()),
            train_config=ConfigRecord({"lr": context.run_config["lr"]}),
            num_rounds=context.run_config["num-server-rounds"],
        )
        context.state["arrays"] = result.arrays
        context.state["history"] = MetricRecord(
            {
                "train_loss": [
                    result.train_metrics_clientapp[number]["train_loss"]
                    for number in range(1, ROUNDS + 1)
                ],
                "eval_acc": [
                    result.evaluate_metrics_clientapp[number]["eval_acc"]
                    for number in range(1, ROUNDS + 1)
                ],
            }
        )

    return app


def run(*, secured):
    mods = [secagg_mod()] if secured else []
    context = run_in_process(
        build_server_app(secured),
        build_client_app(mods),
        num_nodes=CLIENTS,
        run_config={"lr": 0.05, "num-server-rounds": ROUNDS},
    )
    net = Net()
    net.load_state_dict(context.state["arrays"].to_torch_state_dict())
    return accuracy_of(net, INPUTS[TEST], TARGETS[TEST]), context.state


@pytest.fixture(scope="module")
def plain():
    return run(secured=False)


@pytest.fixture(scope="module")
def secured():
    return run(secured=True)


def test_the_quickstart_learns(plain):
    assert plain[0] > 0.85


def test_with_two_more_lines_it_learns_as_well(plain, secured):
    assert secured[0] > 0.85
    assert secured[0] == pytest.approx(plain[0], abs=0.01)


def test_the_history_of_metrics_is_the_same(plain, secured):
    for name in ("train_loss", "eval_acc"):
        one, other = plain[1]["history"][name], secured[1]["history"][name]
        assert one == pytest.approx(other, abs=0.02)
        assert len(one) == ROUNDS


def test_the_models_are_the_same_to_a_few_digits(plain, secured):
    one = plain[1]["arrays"].to_torch_state_dict()
    other = secured[1]["arrays"].to_torch_state_dict()
    assert list(one) == list(other)
    # Every client counts 27 batches a round. A secure round rounds their mean, where the plain
    # mean of floats may be cut to the number below.
    assert float(other.pop("norm.num_batches_tracked")) == 27 * ROUNDS
    assert float(one.pop("norm.num_batches_tracked")) > 26 * ROUNDS
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        np.testing.assert_allclose(other[name].numpy(), tensor.numpy(), atol=0.02, err_msg=name)
