"""Turn a file of examples into a folder that is mapped into memory: see `fedcore.data.mapped`.

python -m fedcore.data examples.npz examples
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedcore.data.mapped import write_mapped
from fedcore.data.sources import NpzFile, load
from fedcore.errors import FedcoreError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 2 after an error."""
    options = _parser().parse_args(arguments)
    try:
        source = NpzFile(
            path=str(options.file),
            clients_key=options.clients_key,
            clients_path=options.clients_path,
        )
        dataset = load(source)
        write_mapped(dataset, options.folder)
    except FedcoreError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    train, test = len(dataset.x_train), len(dataset.x_test)
    sys.stdout.write(f"{options.folder}: {train} training and {test} test examples\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedcore.data",
        description="Write the examples of an .npz file as a folder of arrays, which training "
        "maps into memory instead of reading it. Pass the folder wherever the file went.",
        epilog="Exit status: 0, or 2 with one line on stderr.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE.npz", help="x_train, y_train, x_test and y_test"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one")
    parser.add_argument("--clients-key", metavar="NAME", help="array of client ids, kept too")
    parser.add_argument("--clients-path", metavar="FILE", help="file of that array, if another")
    return parser


if __name__ == "__main__":
    sys.exit(main())
