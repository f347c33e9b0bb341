"""What the engines themselves cost, with clients that do nothing.

Each client receives an array of one megabyte and sends it back. Every row is measured in
a fresh process, whose tree (workers, Ray's daemons) is sampled from outside for its
memory: PSS counts a shared page once, so it is the figure to compare; RSS counts it in
every process. `measure_workers` answers another question: how long must a client
compute, for worker processes to pay?
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedcore.engine import run_in_process, run_on_ray

Row: TypeAlias = dict[str, str | int | float]

ENGINES = (("in-process", 0), ("in-process", 2), ("ray", 2))
"""(engine, processes that run clients)."""
NODES = 100
ROUNDS = 5
FLOATS = 250_000
"""Entries of the float32 array that each message carries: 1 MB."""
SAMPLE_SECONDS = 0.05

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Compute for `milliseconds` of processor time, then send the arrays back."""
    until = time.process_time() + float(context.run_config["milliseconds"]) / 1000
    matrix = np.ones((64, 64))
    while time.process_time() < until:
        matrix = matrix @ matrix / 64
    return Message(message.content, reply_to=message)


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Broadcast the array for some rounds; note when each round was done."""
    content = RecordDict({"arrays": ArrayRecord([np.zeros(FLOATS, np.float32)])})
    done = []
    for _ in range(int(context.run_config["rounds"])):
        messages = [Message(content, node_id, "train") for node_id in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages))
        if any(reply.has_error() for reply in replies):
            msg = f"a client failed: {next(r.error for r in replies if r.has_error())}"
            raise RuntimeError(msg)
        done.append(time.time())
    context.state["times"] = MetricRecord({"done": done})


def measure_engine(nodes: int = NODES, rounds: int = ROUNDS) -> list[Row]:
    """Return one row for each engine: seconds to the first round, messages/s, memory."""
    return [measure(engine, workers, nodes, rounds, 0.0) for engine, workers in ENGINES]


def measure_workers(nodes: int = 40, rounds: int = 4) -> list[Row]:
    """Return rows over the client's computing time, without and with two workers."""
    return [
        measure("in-process", workers, nodes, rounds, milliseconds)
        for milliseconds in (0.0, 1.0, 3.0, 10.0, 30.0)
        for workers in (0, 2)
    ]


def measure(engine: str, workers: int, nodes: int, rounds: int, milliseconds: float) -> Row:
    """Return the row of one engine, run in a process of its own.

    Args:
        engine: ``"in-process"`` or ``"ray"``.
        workers: Processes that run clients; Ray uses one for each core.
        nodes: Clients a round.
        rounds: At least 2; the first is reported apart.
        milliseconds: Processor time that a client spends.

    Raises:
        RuntimeError: The process failed.
    """
    arguments = [engine, str(workers), str(nodes), str(rounds), str(milliseconds)]
    command = [sys.executable, "-m", "experiments.bench_engine", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - us
        peak_pss, peak_rss = 0.0, 0.0
        while process.poll() is None:
            pss, rss = _tree_megabytes(process.pid)
            peak_pss, peak_rss = max(peak_pss, pss), max(peak_rss, rss)
            time.sleep(SAMPLE_SECONDS)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        msg = f"benchmark of {engine} ended with exit status {process.returncode}: {output}"
        raise RuntimeError(msg)
    seconds = json.loads(output.splitlines()[-1])
    return {
        "engine": engine,
        "workers": workers,
        "nodes": nodes,
        "rounds": rounds,
        "client_ms": milliseconds,
        "first_round_seconds": round(seconds[0], 3),
        "messages_per_second": round(nodes * (rounds - 1) / (seconds[-2] - seconds[0]), 1),
        "total_seconds": round(seconds[-1], 3),
        "peak_pss_mb": round(peak_pss, 1),
        "peak_rss_mb": round(peak_rss, 1),
    }


def _run(engine: str, workers: int, nodes: int, rounds: int, milliseconds: float) -> list[float]:
    """Return seconds from the start to the end of each round, and to the end of the run."""
    config = {"rounds": rounds, "milliseconds": milliseconds}
    started = time.time()
    if engine == "ray":
        context = run_on_ray(server_app, client_app, nodes, config)
    else:
        context = run_in_process(
            server_app, client_app, num_nodes=nodes, run_config=config, workers=workers
        )
    done = context.state.metric_records["times"]["done"]
    ends = [*done, time.time()] if isinstance(done, list) else [done, time.time()]
    return [end - started for end in ends]


def _tree_megabytes(pid: int) -> tuple[float, float]:
    """Return (PSS, RSS) of a process and its descendants; zeros where /proc is missing."""
    pss, rss = 0, 0
    for member in _tree(pid):
        try:
            lines = (Path("/proc") / member / "smaps_rollup").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        kilobytes = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
        pss += int(kilobytes.get("Pss", 0))
        rss += int(kilobytes.get("Rss", 0))
    return pss / 1024, rss / 1024


def _tree(pid: int) -> Iterator[str]:
    yield str(pid)
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from _tree(int(child))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench_engine",
        description="Run one engine once and print seconds to the end of each round as JSON; "
        "`python -m experiments.benchmark suite=engine` runs them all.",
    )
    parser.add_argument("engine", choices=["in-process", "ray"])
    parser.add_argument("workers", type=int, help="processes that run clients")
    parser.add_argument("nodes", type=int, help="clients a round")
    parser.add_argument("rounds", type=int, help="at least 2")
    parser.add_argument("milliseconds", type=float, help="processor time that a client spends")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(json.dumps(_run(**vars(_parse(sys.argv[1:])))))
