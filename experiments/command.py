"""How every command ends: quietly, with one line, or with a traceback if it is our bug.

0      done
2      the configuration, the data or a release is wrong: one line says what to do
130    interrupted; what was finished is on disk
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

import experiments.resolvers  # noqa: F401 - what conf/ calls, for every command
from fedcore.errors import FedcoreError

CONF = str(Path(__file__).parents[1] / "conf")
"""Absolute, since Hydra reads a relative path in two different ways."""
WRONG = 2
INTERRUPTED = 130


def run_command(main: Callable[[], object]) -> None:
    """Run a command's `main` and exit with its status."""
    # Hydra would print its own several lines and exit with 1: let its errors come through.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with one_line_errors():
        main()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that the user can repair into one line and an exit status.

    Also used inside of a Hydra job: what leaves a job as an exception gets a line of
    Hydra's own in front of it.
    """
    try:
        yield
    except (FedcoreError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(WRONG)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _one_line(error: BaseException) -> str:
    """Return the error's text without line breaks or Hydra's search paths."""
    text = " ".join(str(error).split())
    text = text.partition(" Config search path:")[0]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        reason = " ".join(str(cause.msg).split()).partition(" full_key:")[0]
        text = f"{text.partition(' To append')[0]} ({reason})"
    return text
