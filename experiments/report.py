"""The page that explains one training run: `python -m experiments.report outputs/...`.

What a run left behind (`experiments.run_files`) is drawn and written as one `report.html`
that needs no other file, no script and no network. The words of the page are in `templates/`;
this module only decides what is true. A run that was interrupted, even before its first round,
has a report like any other.
"""

from __future__ import annotations

import argparse
import sys
from base64 import b64encode
from math import inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Final

from experiments import plots
from experiments.run_files import Run, read_run
from fedcore import __version__
from fedcore.errors import ConfigurationError

if TYPE_CHECKING:  # loaded when a page is written
    from jinja2 import Environment

REPORT: Final = "report.html"
FLOAT_BYTES: Final = 4
TEMPLATES: Final = Path(__file__).parent / "templates"


def write_report(folder: Path) -> Path:
    """Write `report.html` and its pictures into a run's folder; return the page's path.

    Raises:
        ConfigurationError: `folder` is not that of a run, or cannot be written to.
    """
    run = read_run(folder)
    pictures = draw(run)
    page = environment().get_template("report.html").render(
        run=run,
        summary=run.summary,
        version=__version__,
        images={
            name: "data:image/png;base64," + b64encode(png).decode()
            for name, png in pictures.items()
        },
    )  # fmt: skip
    try:
        for name, png in pictures.items():
            (folder / f"{name}.png").write_bytes(png)
        (folder / REPORT).write_text(page, encoding="utf-8")
    except OSError as error:
        msg = f"cannot write the report into {folder}: {error.strerror or error}"
        raise ConfigurationError(msg) from error
    return folder / REPORT


def draw(run: Run) -> dict[str, bytes]:
    """Return the pictures of a run, PNG by name."""
    summary, tested, sent = run.summary, [], 0.0
    for entry in run.rounds:
        sent += entry.client_bytes
        if entry.accuracy is not None:
            tested.append((entry.round, sent, entry.accuracy))
    start = [] if summary.initial_accuracy is None else [(0, summary.initial_accuracy)]
    update = FLOAT_BYTES * summary.parameters
    clips = [(r.round, r.clip_norm, r.unclipped) for r in run.rounds if r.clip_norm is not None]
    moving = {"clip": plots.clip_over_rounds(clips)} if run.adapted else {}
    return moving | {
        "accuracy": plots.accuracy_over_rounds(
            [*start, *((number, accuracy) for number, _, accuracy in tested)],
            [(r.round, r.train_accuracy) for r in run.rounds if r.train_accuracy is not None],
        ),
        "accuracy_by_bytes": plots.accuracy_over_bytes(
            [(cumulated, accuracy) for _, cumulated, accuracy in tested],
            update * (tested[-1][0] if tested else 0),
        ),
        "epsilon": plots.epsilon_over_rounds(
            [(entry.round, entry.epsilon) for entry in run.rounds],
            delta=summary.delta,
            budget=run.ledger.epsilon_budget if run.ledger else None,
        ),
        "bytes": plots.bytes_of_one_round(
            summary.uplink_payload_bytes_per_client_round or 0.0,
            summary.uplink_bytes_per_client_round or 0.0,
            update,
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after an error."""
    options = _parser().parse_args(arguments)
    try:
        path = write_report(options.folder)
    except ConfigurationError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(path)
    return 0


def environment() -> Environment:
    """Return the templates' environment; what is not known is shown as a dash."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415 - for --help

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": lambda value: plots.human_bytes(value) if value else "–",
        "compared": plots.compared,
        "percent": lambda value: "–" if value is None else f"{value:.1%}",
        "number": _number,
        "seconds": _seconds,
    }
    return environment


def _number(value: float | None) -> str:
    if value is None or isnan(value):
        return "–"
    if value == inf:
        return "∞"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}".replace("e-0", "e-")


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 120 else f"{value / 60:.3g} min"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Explain one training run: write report.html, one page that needs no other "
        "file, and its plots as PNG files into the run's folder, and print the page's path. "
        "A training run does so by itself; do it again after an update, or for a run from "
        "elsewhere. Interrupted runs have a report like any other.",
        epilog="Exit status: 0, or 2 with one line on stderr when the folder is not that of a "
        "training run.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER",
        help="of a training run: holds summary.json, metrics.jsonl and ledger.json",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
