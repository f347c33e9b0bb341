"""Toy apps for the engine's tests: each client pulls the model towards its own number."""

import os
import signal
import sys

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()


@client.train()
def train(message, context):
    """Move half way (or `rate`) towards partition-id, and count the visits in the state."""
    (weights,) = message.content["arrays"].to_numpy_ndarrays()
    target = float(context.node_config["partition-id"])
    visits = context.state.setdefault("visits", MetricRecord({"count": 0}))
    visits["count"] += 1
    weights = weights + context.run_config["rate"] * (target - weights)
    metrics = MetricRecord({"num-examples": 1, "visits": visits["count"]})
    content = RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics})
    return Message(content, reply_to=message)


@client.train("plunder")
def plunder(message, context):
    """Change everything that can be changed in the message, then reply with what was found."""
    found = len(message.content["arrays"]), len(message.content["config"]["list"])
    arrays = list(message.content["arrays"].values())
    message.content["arrays"].to_numpy_ndarrays(keep_input=False)  # empties the record
    for array in arrays:
        array.data = b""
    message.content["config"]["list"].clear()
    message.content.clear()
    message.metadata.group_id = "changed"
    return Message(RecordDict({"found": ConfigRecord({"counts": list(found)})}), reply_to=message)


@client.train("leak")
def leak(message, context):
    """Reply with the state itself, after growing it."""
    log = context.state.setdefault("log", ConfigRecord({"visits": []}))
    log["visits"].append(1)
    return Message(context.state, reply_to=message)


@client.train("fail")
def fail(message, context):
    """Touch the state, then misbehave as the run config says."""
    context.state["broken"] = ConfigRecord({})
    match context.run_config["how"]:
        case "raise":
            msg = "no such sensor"
            raise ValueError(msg)
        case "exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "nothing":
            return None
    return Message(RecordDict(), 1000, "train")


@client.query()
def query(message, context):
    """Reply with who and where we are, and the keys of the state."""
    fresh = Message(RecordDict(), 1, "query")
    identity = {
        "node": context.node_id,
        "source": fresh.metadata.src_node_id,
        "run": fresh.metadata.run_id,
        "process": os.getpid(),
        "state": list(context.state),
        **{f"node.{k}": v for k, v in context.node_config.items()},
        **{f"run.{k}": v for k, v in context.run_config.items()},
    }
    context.node_config["partition-id"] = -1
    context.run_config["rate"] = -1.0
    return Message(RecordDict({"me": ConfigRecord(identity)}), reply_to=message)


server = ServerApp()


@server.main()
def main(grid, context):
    """Three rounds of Flower's own FedAvg; the model goes into the state."""
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros(8)]),
        num_rounds=context.run_config["rounds"],
    )
    context.state["arrays"] = result.arrays
    last = result.train_metrics_clientapp[context.run_config["rounds"]]
    context.state["metrics"] = MetricRecord({"visits": last["visits"]})


def instructions(grid, message_type, *, nodes=None, content=None):
    """One message to each node, all with the same content object."""
    content = RecordDict() if content is None else content
    return [
        Message(content, node_id, message_type, group_id="1", ttl=60.0)
        for node_id in (grid.get_node_ids() if nodes is None else nodes)
    ]
