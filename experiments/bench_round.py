"""The apps of the deployment's benchmark: a secure round in which nobody trains.

The ServerApp runs rounds of secure aggregation over all nodes and writes when each stage
of a round was sent, and when the round was over. The ClientApp sends the arrays back that it got,
through the very mod that a real device uses. Flower's own processes and the edge runner
run the same bundle.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clients import secagg_mod
from fedcore.engine import WrappedGrid
from fedcore.pipeline import RunPlan
from strategies import SecureGrid

FLOATS = 1000
POLL_SECONDS = 0.5

client_app = ClientApp(mods=[secagg_mod()])


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Send the arrays back."""
    del context
    content = RecordDict(
        {
            "arrays": message.content.array_records["arrays"],
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    return Message(content, reply_to=message)


server_app = ServerApp()


class TimedGrid(WrappedGrid):
    """A grid that notes when messages are sent: once for each stage of a round."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.sent: list[float] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Note the time, and pass the messages on."""
        batch = list(messages)
        if batch:
            self.sent.append(time.time())
        return super().push_messages(batch)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Hold the rounds that the run configuration asks for; write their times."""
    wanted = int(context.run_config["nodes"])
    while len(nodes := list(grid.get_node_ids())) < wanted:
        time.sleep(POLL_SECONDS)
    timed = TimedGrid(grid)
    secure = SecureGrid(timed, RunPlan())
    rows = []
    for number in range(1, int(context.run_config["rounds"]) + 1):
        timed.sent.clear()
        config = ConfigRecord({"server-round": number})
        arrays = ArrayRecord([np.zeros(FLOATS, np.float32)])
        content = RecordDict({"arrays": arrays, "config": config})
        start = time.time()
        replies = list(
            secure.send_and_receive(
                [Message(content, node, "train", group_id=str(number)) for node in nodes]
            )
        )
        seconds = time.time() - start
        if not replies or replies[0].has_error():
            msg = f"round {number} has no mean: see the devices' logs"
            raise RuntimeError(msg)
        ends = [*timed.sent[1:], time.time()]
        stages = [end - sent for sent, end in zip(timed.sent, ends, strict=True)]
        rows.append({"round": number, "seconds": seconds, "stages": stages})
    path = Path(str(context.run_config["output"]))
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(rows), encoding="utf-8")
    partial.replace(path)
