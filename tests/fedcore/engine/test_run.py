import importlib.util
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedcore.engine import Fault, FaultyGrid, InProcessGrid, on_grid, run_in_process, run_on_ray
from fedcore.errors import ConfigurationError
from tests.fedcore.engine.engine_apps import client, instructions, server

CONFIG = {"rate": 0.5, "rounds": 4}


def model(context):
    return context.state["arrays"].to_numpy_ndarrays()[0]


def noisy_regression():
    """Least squares whose bits depend on the order of every float operation."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        seed = int(context.node_config["partition-id"])
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(20 + seed, 3))
        y = x @ np.array([1.0, -2.0, 0.5])
        (w,) = message.content["arrays"].to_numpy_ndarrays()
        for _ in range(5):
            w = w - 0.1 * x.T @ (x @ w - y) / len(y)
        content = RecordDict(
            {"arrays": ArrayRecord([w]), "metrics": MetricRecord({"num-examples": len(y)})}
        )
        return Message(content, reply_to=message)

    return app


def fit(workers):
    random.seed(0)  # from which Flower's strategies sample the nodes, and so their order
    with InProcessGrid(noisy_regression(), [{}] * 6, {}, workers) as grid:
        return FedAvg(fraction_evaluate=0.0).start(
            grid=grid, initial_arrays=ArrayRecord([np.zeros(3)]), num_rounds=20
        )


def test_unmodified_fedavg_converges():
    (w,) = fit(workers=0).arrays.to_numpy_ndarrays()
    np.testing.assert_allclose(w, [1.0, -2.0, 0.5], atol=1e-3)


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_every_run_gives_the_same_bytes_on_any_number_of_workers(workers):
    reference, again = (fit(n).arrays.to_numpy_ndarrays()[0] for n in (0, workers))
    assert reference.tobytes() == again.tobytes()


def test_both_apps_see_the_run_configuration():
    context = run_in_process(server, client, num_nodes=4, run_config=CONFIG)
    # mean target 1.5, half of the way in each of four rounds
    np.testing.assert_array_equal(model(context), np.full(8, 1.5 * (1 - 0.5**4)))
    assert context.state["metrics"]["visits"] == 4
    assert context.run_config == CONFIG


def test_node_configurations_override_the_partition():
    configs = [{"partition-id": 6}, {"partition-id": 8}]
    config = {"rate": 1.0, "rounds": 1}
    context = run_in_process(server, client, node_configs=configs, run_config=config)
    np.testing.assert_array_equal(model(context), np.full(8, 7.0))


def test_a_wrapped_grid_works_under_an_unchanged_server():
    def drop_first(message):
        return Fault.DROPPED if message.metadata.dst_node_id == 1000 else None

    faulty = on_grid(server, lambda grid: FaultyGrid(grid, drop_first))
    context = run_in_process(
        faulty, client, num_nodes=3, run_config={"rate": 1.0, "rounds": 1}, workers=2
    )
    np.testing.assert_array_equal(model(context), np.full(8, 1.5))


def test_an_exception_of_the_server_reaches_the_caller_and_frees_the_process():
    broken = ServerApp()

    @broken.main()
    def main(grid, context):
        raise LookupError

    with pytest.raises(LookupError):
        run_in_process(broken, client, num_nodes=1)
    with pytest.raises(RuntimeError, match="run_id is not set"):
        Message(RecordDict(), 1, "train")


@pytest.mark.parametrize("nodes", [{}, {"num_nodes": 2, "node_configs": [{}]}, {"num_nodes": 0}])
def test_the_nodes_must_be_given_once(nodes):
    with pytest.raises(ConfigurationError):
        run_in_process(server, client, **nodes)


def test_a_missing_ray_names_the_extra(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "fedcore.engine.run.find_spec", lambda name: None if name == "ray" else real(name)
    )
    with pytest.raises(ConfigurationError, match=r"fedcore\[simulation\]"):
        run_on_ray(server, client, 2)


def test_ray_needs_nodes():
    with pytest.raises(ConfigurationError, match="num_nodes must be >= 1, got 0"):
        run_on_ray(server, client, 0)


def ray_processes(mark):
    """Return the processes named like Ray's whose environment holds `mark`."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if any(name in command for name in (b"raylet", b"gcs_server", b"ray::")):
            found |= {(folder.name, command)} if mark.encode() in environment else set()
    return found


def test_importing_the_engine_loads_neither_torch_nor_ray():
    code = "import sys, fedcore.engine; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0


def lossy_server():
    """The server app, and after its rounds a query in which two of four nodes go silent."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        server(grid=grid, context=context)
        faults = iter([None, Fault.DROPPED, None, Fault.LOST_REPLY])
        faulty = FaultyGrid(grid, lambda _: next(faults))
        replies = faulty.send_and_receive(instructions(faulty, "query"), timeout=60.0)
        codes = [reply.error.code if reply.has_error() else 0 for reply in replies]
        context.state["faults"] = ConfigRecord({"codes": codes})

    return app


@pytest.mark.slow
def test_ray_gives_the_model_of_the_in_process_engine_and_leaves_nothing_behind(
    caplog, monkeypatch
):
    mark = f"started-by-{uuid4().hex}"  # another run on this machine may have a Ray of its own
    monkeypatch.setenv("FEDCORE_TEST_MARK", mark)
    environment = dict(os.environ)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        on_ray = run_on_ray(lossy_server(), client, 4, CONFIG)
    here = run_in_process(lossy_server(), client, num_nodes=4, run_config=CONFIG, workers=2)
    assert model(on_ray).tobytes() == model(here).tobytes()
    assert on_ray.state["metrics"] == here.state["metrics"]
    assert on_ray.state["faults"] == here.state["faults"] == ConfigRecord({"codes": [0, 5, 0, 5]})
    assert on_ray.run_config == here.run_config == CONFIG
    assert "deprecated" not in caplog.text
    assert not ray_processes(mark)
    assert dict(os.environ) == environment
