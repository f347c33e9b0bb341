"""Hurt a federation and see what holds: `python -m tests.chaos --rounds 200 --seed 7`.

First rounds on the in-process grid (`tests.chaos.virtual`), then rounds of a real deployment
on loopback (`tests.chaos.campaign`): a SuperLink behind nginx, SuperNodes behind wires. The
two kinds are counted apart. Exit status 1 if anything that must hold did not.
"""

import argparse
import json
import logging
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tests.chaos.campaign import Campaign
from tests.chaos.federation import INSTALL_NGINX, Federation
from tests.chaos.virtual import campaign as virtual_campaign

RUN_ROUNDS = 10
"""Of one run: then all invariants are checked, and another run begins."""


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def real(options: argparse.Namespace, folder: Path) -> Campaign:
    """Hold the real rounds."""
    federation = Federation(folder, options.devices, options.seed, in_memory=options.in_memory)
    campaign = Campaign(federation, Random(options.seed), say, folder / "chaos.jsonl")
    end = time.monotonic() + 60 * options.minutes
    try:
        federation.start()
        say(f"{options.devices} devices are online, logs in {folder}")
        number = 0
        while campaign.rounds < options.rounds and time.monotonic() < end:
            before = campaign.rounds
            campaign.hold(number, min(RUN_ROUNDS, options.rounds - campaign.rounds), end)
            number += 1
            if campaign.rounds == before:
                break  # nothing gets through any more, and was said so
    finally:
        federation.stop()
    return campaign


def main() -> int:
    """Run both kinds; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=200, help="on a real deployment (%(default)s)"
    )
    parser.add_argument("--virtual", type=int, default=400, help="in process (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of all faults (%(default)s)")
    parser.add_argument("--devices", type=int, default=5, help="at least 5 (%(default)s)")
    parser.add_argument(
        "--in-memory",
        action="store_true",
        help="a SuperLink without a database, as its command has",
    )
    parser.add_argument("--minutes", type=float, default=240.0, help="at most (%(default)s)")
    parser.add_argument("--out", type=Path, help="new folder for logs and chaos.jsonl")
    options = parser.parse_args()
    if options.rounds and shutil.which("nginx") is None:
        say(INSTALL_NGINX)
        return 2
    folder = (options.out or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-virtual-") as scratch:
        played = virtual_campaign(options.virtual, options.seed, Path(scratch), say)
    say(f"in process: {played['completed']} of {played['rounds']} rounds completed")
    held = real(options, folder) if options.rounds else None
    broken = [*played["broken"], *([] if held is None else held.broken)]
    summary = {
        "seed": options.seed,
        "database": not options.in_memory,
        "real_rounds": 0 if held is None else held.rounds,
        "real_rounds_completed": 0 if held is None else held.completed,
        "real_faults": {} if held is None else dict(sorted(held.done.items())),
        "in_process_rounds": played["rounds"],
        "in_process_rounds_completed": played["completed"],
        "in_process_faults": dict(sorted(played["faults"].items())),
        "violations": broken,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    say(json.dumps(summary, indent=2))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
