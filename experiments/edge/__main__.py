"""`python experiments/edge STATE/board.json`: what `deploy node` becomes.

Started by its path, in an environment that its maker chose. The repository is on the path
only until everything is imported: what a bundle brings has the same names.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from experiments.edge.flower_board import check_pins  # noqa: E402 - found by the line above
from experiments.edge.launcher import Launcher  # noqa: E402
from experiments.edge.settings import Settings  # noqa: E402
from fedcore.errors import FedcoreError  # noqa: E402


def main(arguments: list[str]) -> int:
    """Run a board; return the exit status."""
    try:
        check_pins()
        settings = Settings.from_json(Path(arguments[1]).read_text(encoding="utf-8"))
        return Launcher(settings, _tell).run()
    except (FedcoreError, OSError) as error:
        _tell(f"error: {' '.join(str(error).split())}")
        return 2


def _tell(line: str) -> None:
    print(line, file=sys.stderr if line.startswith("error:") else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
