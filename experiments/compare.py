"""Finished runs side by side: accuracy, privacy and bits, as a table and a picture.

    python -m experiments.compare outputs/mnist_writers

reads every run below the folders that it is given, whenever they were made, and writes
`comparison.md`, `comparison_bytes.png` (accuracy against bytes) and, where there is noise,
`comparison.png` (accuracy against epsilon) into the first one. A comparison grows as its
runs finish: what is not finished is left out and named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from omegaconf import OmegaConf

from experiments.command import run_command
from experiments.plots_pareto import DENSE, accuracy_over_uploads
from experiments.plots_privacy import accuracy_over_epsilon
from fedcore.errors import ConfigurationError
from fedcore.privacy import PrivacyLedger


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a comparison shows of one run.

    Attributes:
        name: Its folder, relative to the one that was given.
        scheme: How updates are encoded: the stage that saves most.
        unit: Whom the noise protects: a device, an example or nobody.
        mechanism: Which noise.
        noise_multiplier: Noise over the sensitivity.
        epsilon: Spent; infinite without noise.
        delta: That goes with it; 0 without noise.
        accuracy: On the test examples, after the last round.
        rounds: That were finished.
        bits_per_parameter: Of the encoded update.
        uplink_bytes: All that a client sends in a round.
        uplink_payload: The update alone.
        downlink_bytes: All that a client receives in a round.
        downlink_payload: The model alone.
        total_reduction: Float32 both ways over all bytes both ways; None if no update arrived.
    """

    name: str
    scheme: str
    unit: str
    mechanism: str
    noise_multiplier: float
    epsilon: float
    delta: float
    accuracy: float
    rounds: int
    bits_per_parameter: float
    uplink_bytes: float
    uplink_payload: float
    downlink_bytes: float
    downlink_payload: float
    total_reduction: float | None


def compare(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the finished runs below `folders`, and the names of the others.

    Raises:
        ConfigurationError: There is no finished run, or a file is not what a run writes.
    """
    paths = [(folder, path) for folder in folders for path in sorted(folder.rglob("metrics.jsonl"))]
    finished, unfinished = [], []
    for folder, path in paths:
        name = path.parent.name if path.parent == folder else str(path.parent.relative_to(folder))
        if (path.parent / "summary.json").is_file():
            finished.append(read_run(path.parent, name))
        else:
            unfinished.append(name)
    if not finished:
        where = ", ".join(str(folder) for folder in folders)
        msg = f"no finished run below {where}: train some with output=FOLDER/NAME"
        raise ConfigurationError(msg)
    return sorted(finished, key=lambda run: (-run.epsilon, run.name)), unfinished


def read_run(folder: Path, name: str) -> Run:
    """Return the run in `folder`.

    Raises:
        ConfigurationError: Its summary is not one.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        epsilon = inf if summary["epsilon"] == "inf" else float(summary["epsilon"])
        values = {
            "accuracy": float(summary["accuracy"]),
            "rounds": int(summary["completed_rounds"]),
            "bits_per_parameter": float(summary["uplink_bits_per_parameter"]),
            "uplink_bytes": float(summary["uplink_bytes_per_client_round"]),
            "uplink_payload": float(summary["uplink_payload_bytes_per_client_round"]),
            "downlink_bytes": float(summary["downlink_bytes_per_client_round"]),
            "downlink_payload": float(summary["downlink_payload_bytes_per_client_round"]),
        }
        reduction = summary["total_reduction"]
        total_reduction = None if reduction is None else float(reduction)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{folder / 'summary.json'} is no summary of a run ({error!r}): train it again"
        raise ConfigurationError(msg) from None
    ledger = PrivacyLedger.from_json((folder / "ledger.json").read_bytes())
    last = ledger.releases[-1] if ledger.releases and epsilon < inf else None
    return Run(
        name=name,
        scheme=_scheme(folder),
        unit="nobody" if last is None else last.unit,
        mechanism="none" if last is None else last.mechanism,
        noise_multiplier=0.0 if last is None else last.noise_multiplier,
        epsilon=epsilon,
        delta=0.0 if last is None else ledger.delta,
        accuracy=values["accuracy"],
        rounds=int(values["rounds"]),
        bits_per_parameter=values["bits_per_parameter"],
        uplink_bytes=values["uplink_bytes"],
        uplink_payload=values["uplink_payload"],
        downlink_bytes=values["downlink_bytes"],
        downlink_payload=values["downlink_payload"],
        total_reduction=total_reduction,
    )


def _scheme(folder: Path) -> str:
    """Return which stage of the codec the run in `folder` was about."""
    path = folder / ".hydra" / "config.yaml"
    if not path.is_file():
        return "unknown"
    run = OmegaConf.load(path)
    quantize = str(OmegaConf.select(run, "quantize.kind"))
    sparsify = str(OmegaConf.select(run, "sparsify.kind"))
    if quantize == "none":
        return DENSE
    return sparsify if quantize in ("modular", "uniform") else quantize


def markdown(runs: Sequence[Run]) -> str:
    """Return the table; bytes include what the protocol adds."""
    lines = [
        "| run | protects | noise | noise multiplier | epsilon | delta | accuracy | rounds "
        "| bits a parameter | bytes up a client and round | of which update "
        "| bytes down a client and round | of which model | total reduction |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {run.name} | {run.unit} | {run.mechanism.replace('_', ' ')} "
        f"| {run.noise_multiplier:g} | {run.epsilon:.3g} | {run.delta:g} | {run.accuracy:.2%} "
        f"| {run.rounds} | {run.bits_per_parameter:.3g} | {run.uplink_bytes:,.0f} "
        f"| {run.uplink_payload:,.0f} | {run.downlink_bytes:,.0f} | {run.downlink_payload:,.0f} "
        f"| {_times(run.total_reduction)} |"
        for run in runs
    ]
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}x"


def main() -> None:
    """Compare the runs below the folders of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description="Put finished training runs side by side: accuracy, epsilon, bits and bytes.",
        epilog="Prints a table; writes comparison.md and pictures, accuracy against bytes and, "
        "where there is noise, against epsilon, into the first folder. "
        "Make the runs with output=FOLDER/NAME; those that are not finished are named and left "
        "out. Exit status: 0 done, 2 no finished run.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="each holds runs, at any depth")
    folders = parser.parse_args().folders
    runs, unfinished = compare(folders)
    table = markdown(runs)
    (folders[0] / "comparison.md").write_text(table + "\n", encoding="utf-8")
    written = [folders[0] / "comparison.md", *_draw(runs, folders[0])]
    print(table)
    if unfinished:
        print(f"\nnot finished: {', '.join(unfinished)}")
    print("", *written, sep="\n")


def _draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw what there is to compare; return the files."""
    pictures = {
        "comparison_bytes.png": accuracy_over_uploads(
            [(run.scheme, run.uplink_bytes, run.accuracy) for run in runs]
        )
    }
    if any(run.epsilon < inf for run in runs):
        pictures["comparison.png"] = accuracy_over_epsilon(
            [(run.mechanism, run.bits_per_parameter, run.epsilon, run.accuracy) for run in runs]
        )
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    return [folder / name for name in pictures]


if __name__ == "__main__":
    run_command(main)
