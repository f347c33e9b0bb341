"""What the deployment's benchmark counts, and what it compares with what."""

import os
import subprocess
import sys
from pathlib import Path

from experiments.bench_deployment import stock_command, stock_environment, write_examples
from experiments.board_memory import held, processor_seconds, tree
from experiments.parties import DeviceKeys
from experiments.plots_deployment import beside_stock
from experiments.processes import Board
from fedcore.data import NpzFile, load
from fedcore.models import TwoNN, build

ROWS = [
    {"arm": arm, "database": database, "round_seconds": 2.0, "peak_mb": 400.0, "idle_mb": 100.0}
    for arm, database in (("stock", "yes"), ("edge", "yes"), ("edge", "no"))
]
HOLD = "import os; kept = bytearray(os.urandom(32 << 20)); print('held', flush=True); input()"


def holding():
    """A process whose child holds 32 MB."""
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}])"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_memory_is_that_of_a_process_and_all_that_it_started():
    with holding() as process:
        assert process.stdout.readline() == b"held\n"
        found = held(process.pid)
        assert len(list(tree(process.pid))) == found.processes == 2
        assert 32 < found.pss < 100
        # Others have Python's files open too: alone, all of their pages count.
        assert found.pss <= found.alone
        process.communicate(b"\n")


def test_pages_that_relatives_share_count_once():
    code = (
        "import os; kept = bytearray(os.urandom(32 << 20))\n"
        "if os.fork(): print('held', flush=True); os.wait()\n"
        "else: input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"held\n"
        assert held(process.pid).alone < 64
        process.communicate(b"\n")


def test_a_process_that_is_gone_holds_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert held(process.pid).processes == 0
    assert processor_seconds(process.pid) == 0.0
    assert processor_seconds(os.getpid()) > 0.0


def test_stock_is_flowers_own_command_in_its_own_pace(tmp_path, monkeypatch):
    monkeypatch.delenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", raising=False)
    board = Board(DeviceKeys(tmp_path), tmp_path, "localhost:1", tmp_path / "state.key")
    command = stock_command(board, 9094)
    assert Path(command[0]).name == "flower-supernode"
    assert not {"--isolation", "--insecure"} & set(command)
    assert "FLWR_SUPEREXEC_TASK_POLL_INTERVAL" not in stock_environment(tmp_path)


def test_the_examples_fit_the_model_that_is_trained(tmp_path):
    write_examples(tmp_path / "data.npz", 0)
    dataset = load(NpzFile(path=str(tmp_path / "data.npz")))
    build(TwoNN(), dataset.input_shape, dataset.classes, 0)
    assert len(dataset.x_train) == 600


def test_the_picture_is_one():
    assert beside_stock(ROWS).startswith(b"\x89PNG")
