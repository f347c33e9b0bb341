"""Finished runs side by side: accuracy, privacy and bits, as a table and a picture.

    python -m experiments.compare outputs/mnist_writers

reads every run below the folders that it is given, whenever they were made, and writes
`comparison.md` and `comparison.png` into the first one. A comparison grows as its runs
finish: what is not finished is left out and named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from experiments.command import run_command
from fedcore.errors import ConfigurationError
from fedcore.privacy import PrivacyLedger


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a comparison shows of one run.

    Attributes:
        name: Its folder, relative to the one that was given.
        unit: Whom the noise protects: a device, an example or nobody.
        mechanism: Which noise.
        noise_multiplier: Noise over the sensitivity.
        epsilon: Spent; infinite without noise.
        delta: That goes with it; 0 without noise.
        accuracy: On the test examples, after the last round.
        rounds: That were finished.
        bits_per_parameter: Of the encoded update.
        uplink_bytes: All that a client sends in a round.
    """

    name: str
    unit: str
    mechanism: str
    noise_multiplier: float
    epsilon: float
    delta: float
    accuracy: float
    rounds: int
    bits_per_parameter: float
    uplink_bytes: float


def compare(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the finished runs below `folders`, and the names of the others.

    Raises:
        ConfigurationError: There is no finished run, or a file is not what a run writes.
    """
    paths = [path for folder in folders for path in sorted(folder.rglob("metrics.jsonl"))]
    finished, unfinished = [], []
    for path in paths:
        name = path.parent.name
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
        }
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{folder / 'summary.json'} is no summary of a run ({error!r}): train it again"
        raise ConfigurationError(msg) from None
    ledger = PrivacyLedger.from_json((folder / "ledger.json").read_bytes())
    last = ledger.releases[-1] if ledger.releases and epsilon < inf else None
    return Run(
        name=name,
        unit="nobody" if last is None else last.unit,
        mechanism="none" if last is None else last.mechanism,
        noise_multiplier=0.0 if last is None else last.noise_multiplier,
        epsilon=epsilon,
        delta=0.0 if last is None else ledger.delta,
        accuracy=values["accuracy"],
        rounds=int(values["rounds"]),
        bits_per_parameter=values["bits_per_parameter"],
        uplink_bytes=values["uplink_bytes"],
    )


def markdown(runs: Sequence[Run]) -> str:
    """Return the table."""
    lines = [
        "| run | protects | noise | noise multiplier | epsilon | delta | accuracy | rounds "
        "| bits a parameter | bytes up a client and round |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {run.name} | {run.unit} | {run.mechanism.replace('_', ' ')} "
        f"| {run.noise_multiplier:g} | {run.epsilon:.3g} | {run.delta:g} | {run.accuracy:.2%} "
        f"| {run.rounds} | {run.bits_per_parameter:.3g} | {run.uplink_bytes:,.0f} |"
        for run in runs
    ]
    return "\n".join(lines)


def main() -> None:
    """Compare the runs below the folders of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description="Put finished training runs side by side: accuracy, epsilon, bits and bytes.",
        epilog="Prints a table; writes comparison.md and comparison.png into the first folder. "
        "Make the runs with output=FOLDER/NAME; those that are not finished are named and left "
        "out. Exit status: 0 done, 2 no finished run.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="each holds runs, at any depth")
    folders = parser.parse_args().folders
    runs, unfinished = compare(folders)
    table = markdown(runs)
    (folders[0] / "comparison.md").write_text(table + "\n", encoding="utf-8")
    from experiments.plots_privacy import accuracy_over_epsilon  # noqa: PLC0415 - draws

    picture = folders[0] / "comparison.png"
    picture.write_bytes(
        accuracy_over_epsilon(
            [(run.mechanism, run.bits_per_parameter, run.epsilon, run.accuracy) for run in runs]
        )
    )
    print(table)
    if unfinished:
        print(f"\nnot finished: {', '.join(unfinished)}")
    print(f"\n{folders[0] / 'comparison.md'}\n{picture}")


if __name__ == "__main__":
    run_command(main)
