"""Measure speed, bytes and memory: `python -m experiments.benchmark suite=engine`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.command import CONF, one_line_errors, run_command
from fedcore.errors import ConfigurationError


@hydra.main(version_base="1.3", config_path=CONF, config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Run one suite, print its table, keep its rows."""
    with one_line_errors():
        rows = _suite(str(cfg.suite), str(cfg.size))(int(cfg.nodes), int(cfg.rounds))
        folder = Path(str(cfg.output))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"\n{table(rows)}\n\n{path}")
        for file_name, content in _pictures(str(cfg.suite), rows).items():
            picture = folder / file_name
            picture.write_bytes(content)
            print(picture)


def _suite(name: str, size: str = "quick") -> Callable[[int, int], Sequence[Mapping[str, object]]]:
    """Return the function of a suite; importing it may take seconds.

    Args:
        name: Of the suite.
        size: How much of it; only `secagg`, `dme`, `codec` and `buffered` have more than one.

    Raises:
        ConfigurationError: There is no such suite.
    """
    match name:
        case "engine":
            from experiments.bench_engine import measure_engine  # noqa: PLC0415 - imports flwr

            return measure_engine
        case "workers":
            from experiments.bench_engine import measure_workers  # noqa: PLC0415 - imports flwr

            return measure_workers
        case "secagg":
            from experiments.bench_secagg import measure_secagg  # noqa: PLC0415 - imports flwr

            return lambda _nodes, rounds: measure_secagg(rounds, size)
        case "dme":
            from experiments.bench_mean import measure_means  # noqa: PLC0415 - imports scipy

            return lambda _nodes, _rounds: measure_means(size)
        case "noise":
            from experiments.bench_noise import measure_noise  # noqa: PLC0415 - as the others

            return lambda _nodes, rounds: measure_noise(rounds)
        case "codec":
            from experiments.bench_codec import measure_codecs  # noqa: PLC0415 - as the others

            return lambda _nodes, _rounds: measure_codecs(size)
        case "deployment":
            from experiments.bench_deployment import (  # noqa: PLC0415 - as the others
                measure_deployment,
            )

            return lambda _nodes, rounds: measure_deployment(rounds)
        case "buffered":
            from experiments.bench_buffered import measure_buffered  # noqa: PLC0415 - torch

            return lambda _nodes, _rounds: measure_buffered(size)
    known = "engine, workers, secagg, dme, noise, codec, deployment or buffered"
    msg = f"suite must be {known}, got {name!r}"
    raise ConfigurationError(msg)


def _pictures(name: str, rows: Sequence[Mapping[str, object]]) -> dict[str, bytes]:
    """Return the pictures of a suite's rows by file name; few suites have any."""
    match name:
        case "secagg":
            from experiments.bench_secagg import draw_secagg  # noqa: PLC0415 - imports flwr

            return {"seconds.png": draw_secagg(rows)}
        case "dme":
            from experiments.bench_mean import draw_means  # noqa: PLC0415 - imports scipy

            return {"error.png": draw_means(rows)}
        case "codec":
            from experiments.bench_codec import draw_codecs  # noqa: PLC0415 - as above

            return {"nanoseconds.png": draw_codecs(rows)}
        case "deployment":
            from experiments.plots_deployment import beside_stock  # noqa: PLC0415 - as above

            return {"deployment.png": beside_stock(rows)}
        case "buffered":
            from experiments.bench_buffered import draw_buffered  # noqa: PLC0415 - as above

            return {"time.png": draw_buffered(rows)}
    return {}


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the rows under their keys, columns aligned."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


if __name__ == "__main__":
    run_command(main)
