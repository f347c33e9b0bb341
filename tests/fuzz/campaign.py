"""All targets, and inputs for them in the proportions that they state."""

import random
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.documents import document_targets
from tests.fuzz.law import Target
from tests.fuzz.mutations import descendants
from tests.fuzz.protocol import protocol_targets
from tests.fuzz.updates import update_targets


def all_targets(folder: Path) -> list[Target]:
    """Every decoder of bytes from the network or from disk; files are made in `folder`."""
    return [*protocol_targets(), *update_targets(), *document_targets(folder)]


def inputs(target: Target, count: int, seed: object) -> Iterator[bytes]:
    """Yield `count` inputs for `target`, the same for the same seed."""
    rng = random.Random(f"{seed}/{target.name}")
    donors = [*target.corpus, *target.relatives]
    stream = descendants(target.corpus, donors, count, rng, text=target.text)
    for number, data in enumerate(stream):
        yield target.repair(data) if target.repair is not None and number % 2 else data


def shares(targets: list[Target], count: int) -> list[int]:
    """Return how many of `count` inputs each target gets; at least that many in all."""
    whole = sum(target.share for target in targets)
    return [-(-count * target.share // whole) for target in targets]
