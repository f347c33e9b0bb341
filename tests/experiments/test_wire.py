"""What a summary says of bytes is what crossed the engine."""

import json

import pytest

from experiments.report import write_report
from experiments.run_files import read_run
from experiments.wire import round_bytes, run_bytes
from fedcore.engine import InProcessGrid
from fedcore.telemetry import Traffic
from tests.experiments.commands import rounds_of, run, summary_of
from tests.experiments.test_report import summary as a_summary

SMALL = ["clients=5", "clients_per_round=4", "rounds=3", "release=none", "dropout=0.25"]
MASKED = ["clip=loose", "quantize=modular_12"]
RUNS = {
    "masked": [*SMALL, *MASKED, "sparsify=random_k"],
    "delta": [*SMALL, *MASKED, "downlink=delta"],
    "helper": [*SMALL, *MASKED, "secagg=seed_helper"],
    "compressed": [*SMALL, "secagg=none", "quantize=sparse_ternary", "downlink=delta"],
    "float32": [*SMALL, "secagg=none", "quantize=none", "clip=none", "rotate=none"],
}


def values_of(message):
    """Return the bytes of all values, counted by hand: arrays, then everything else."""
    content = message.content
    arrays = sum(
        len(array.data) for record in content.array_records.values() for array in record.values()
    )
    rest = sum(len(name) for record in content.array_records.values() for name in record)
    for record in (*content.config_records.values(), *content.metric_records.values()):
        for name, value in record.items():
            items = value if isinstance(value, list) else [value]
            rest += len(name)
            rest += sum(len(i) if isinstance(i, (str, bytes)) else 8 for i in items)
    return arrays, rest


class Wire:
    """Every message that a node got, and every reply that it gave."""

    def __init__(self, monkeypatch):
        self.down, self.up = [], []
        push, pull = InProcessGrid._push, InProcessGrid.pull_messages

        def pushed(grid, message):
            self.down.append(message)
            return push(grid, message)

        def pulled(grid, ids):
            for reply in pull(grid, ids):
                self.up.append(reply)
                yield reply

        monkeypatch.setattr(InProcessGrid, "_push", pushed)
        monkeypatch.setattr(InProcessGrid, "pull_messages", pulled)

    def bytes_of(self, messages):
        """Return (arrays, everything) of what belongs to rounds."""
        counted = [
            values_of(m) for m in messages if not m.metadata.message_type.startswith("query")
        ]
        return sum(arrays for arrays, _ in counted), sum(map(sum, counted))


@pytest.fixture(scope="module", params=RUNS)
def played(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wire") / request.param
    with pytest.MonkeyPatch.context() as patch:
        wire = Wire(patch)
        arguments = [*RUNS[request.param], f"output={folder}"]
        assert run("train", *arguments, monkeypatch=patch) == 0
    return request.param, folder, wire


def test_the_totals_of_a_run_are_what_crossed_the_engine(played):
    name, folder, wire = played
    summary, sums = summary_of(folder), summary_of(folder)["traffic"]
    up_arrays, up = wire.bytes_of(wire.up)
    down_arrays, down = wire.bytes_of(wire.down)
    assert (sums["uplink_bytes"], sums["downlink_bytes"]) == (up, down)
    assert sums["total_bytes"] == up + down
    assert sums["downlink_payload_bytes"] == down_arrays
    assert 0 < sums["uplink_payload_bytes"] <= up_arrays  # a vector ends with the tally
    assert up_arrays - sums["uplink_payload_bytes"] <= 12 * 80
    assert (sums["uploads"], sums["downloads"]) == (12, 12)
    model = 4 * summary["parameters"]
    assert summary["total_reduction"] == pytest.approx(24 * model / (up + down), abs=6e-4)
    assert summary["total_bytes_per_client_round"] == pytest.approx((up + down) / 12, abs=0.06)
    assert (summary["downlink_payload_reduction"] > 1.5) == (name in ("delta", "compressed"))
    if name == "float32":
        assert 0.98 < summary["total_reduction"] < 1
    else:
        assert summary["total_reduction"] > 1.3


def test_rounds_add_up_to_the_run_and_parts_to_the_whole(played):
    _, folder, _ = played
    rounds, sums = rounds_of(folder), summary_of(folder)["traffic"]
    for key, value in sums.items():
        assert sum(entry[key] for entry in rounds) == value
    for entry in (*rounds, sums):
        for way in ("uplink", "downlink"):
            parts = entry[f"{way}_payload_bytes"] + entry[f"{way}_overhead_bytes"]
            assert parts == entry[f"{way}_bytes"]
            assert entry[f"{way}_overhead_bytes"] > 0
        assert entry["total_bytes"] == entry["uplink_bytes"] + entry["downlink_bytes"]


def test_lost_clients_and_second_tries_are_charged_to_the_updates_that_arrived():
    one = Traffic(100, 120, 400, 480, uploads=1, downloads=1)
    lost = Traffic(0, 20, 400, 480, uploads=0, downloads=1)
    alone, both = run_bytes(one, 100), run_bytes(one + lost, 100)
    assert both["downlink_bytes_per_client_round"] == alone["downlink_bytes_per_client_round"]
    assert alone["total_bytes_per_client_round"] == 600
    assert both["total_bytes_per_client_round"] == 600 + 500
    assert both["total_reduction"] == pytest.approx(800 / 1100, abs=1e-3)


def test_without_an_update_there_is_no_reduction():
    means = run_bytes(Traffic(0, 20, 400, 480, uploads=0, downloads=1), 100)
    assert means["total_reduction"] is means["uplink_reduction"] is None
    assert means["downlink_reduction"] == pytest.approx(400 / 480, abs=1e-3)


def test_the_report_shows_both_directions_payload_and_overhead(tmp_path):
    traffic = Traffic(72_000, 90_000, 100_000, 140_000, uploads=9, downloads=10)
    values = a_summary(completed_rounds=1, rounds=1, **run_bytes(traffic, 10_000))
    entry = {
        "round": 1, "accuracy": 0.5, "loss": 0.7, "train_accuracy": None, "train_loss": None,
        "invited": 10, "survivors": 9, "lost": {}, "attempts": 1, "aborted": [], "clipped": 3,
        "epsilon": 0.0, "seconds": 1.0, **round_bytes(traffic),
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(values))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    (row,) = read_run(tmp_path).rounds
    assert (row.client_bytes, row.received_bytes) == (10_000, 14_000)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    section = page.partition('<section aria-labelledby="bytes">')[2].partition("</section>")[0]
    cells = [
        [cell.partition("<")[0] for cell in line.split("<td>")[1:]]
        for line in section.split("<tr>")[2:]
    ]
    assert cells == [
        ["8 kB", "2 kB", "10 kB", "5× less", "4× less", "72 kB", "18 kB", "90 kB"],
        ["10 kB", "4 kB", "14 kB", "4× less", "2.86× less", "100 kB", "40 kB", "140 kB"],
        ["19.1 kB", "6.44 kB", "25.6 kB", "4.19× less", "3.13× less", "172 kB", "58 kB", "230 kB"],
    ]
    assert "Both ways, all counted" in page
