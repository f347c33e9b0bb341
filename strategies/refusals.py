"""What the programs of devices say when they fail or refuse, as a coordinator may show it.

A device that refuses a plan raises an error that names the rule, and Flower sends its text.
Without it an operator sees silence, and waits for devices that will never come. But it is
text from a device: it is cut, cleaned of what a terminal would obey, counted with its
equals, and of many different ones only the first are kept.

A device that declines says one word of a list instead, see `fedcore.pipeline.decline`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from flwr.app import Message

from fedcore.pipeline.decline import DECLINE_CODE
from strategies.exchange import LOST_ON_THE_WAY

MOST_LETTERS: Final = 240
MOST_TEXTS: Final = 8
OTHERS: Final = "something else"
_FLOWERS: Final = re.compile(r"<class '(?:\w+\.)*(\w+)'>:<'(.*)'>", re.DOTALL)
"""How a SuperNode writes an exception: its class, its text."""


def refusal_of(reply: Message) -> str | None:
    """Return what a device's own program said instead of an answer; None if it did not."""
    if not reply.has_error() or reply.error.code in {*LOST_ON_THE_WAY, DECLINE_CODE}:
        return None
    return clean(reply.error.reason or f"error {reply.error.code}")


def clean(text: str) -> str:
    r"""Return text from a device as one printable line.

    Example:
        >>> clean("<class 'fedcore.errors.PeerProtocolError'>:<'no\x1b[2J noise'>")
        'PeerProtocolError: no?[2J noise'
    """
    found = _FLOWERS.fullmatch(text)
    said = f"{found[1]}: {found[2]}" if found else text
    line = " ".join(said[: 4 * MOST_LETTERS].split())[:MOST_LETTERS]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def add_refusals(some: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """Return how many devices said what, here and there."""
    total = dict(some)
    for text, count in more.items():
        kept = text if text in total or len(total) < MOST_TEXTS else OTHERS
        total[kept] = total.get(kept, 0) + count
    return total


def most_frequent(refusals: Mapping[str, int]) -> str:
    """Return what most devices said, with their number, to be put behind a reason."""
    if not refusals:
        return ""
    text = max(refusals, key=lambda said: refusals[said])
    return f"; {refusals[text]} said: {text}"
