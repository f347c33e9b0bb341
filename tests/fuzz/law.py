"""The law of every decoder: a value, or the one error that it documents.

Nothing else may leave it, whatever the bytes: no other exception, no hang, no giant
allocation, no second spelling of a value that has one encoding. `examine` is the judge;
inside `limits` memory and time are bounded, and what exceeds them is a finding too.
"""

import resource
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PATIENCE_SECONDS = 10
"""Of the processor's time, so that a busy machine makes nothing late."""
ROOM_BYTES = 1 << 30
"""More than any input here can need; a length field that lies asks for far more."""


@dataclass(frozen=True)
class Target:
    """One decoder, and inputs that it takes.

    Attributes:
        name: Says what is decoded.
        corpus: Valid inputs, from real rounds and runs.
        decode: Under test.
        error: The one error it documents.
        encode: The inverse, where a value has one encoding only.
        repair: Makes hashes and signatures fit again, so that what lies behind them is
            reached; it is given every other input.
        relatives: Inputs of the same form that it refuses, e.g. another client's: parts of
            them are put in place of its own.
        also: What a state behind the decoder may raise besides: too few are left.
        text: Whether inputs are JSON.
        share: How many inputs it gets, relative to the others: few where one takes long.
    """

    name: str
    corpus: Sequence[bytes]
    decode: Callable[[bytes], object]
    error: type[Exception]
    encode: Callable[[object], bytes] | None = None
    repair: Callable[[bytes], bytes] | None = None
    relatives: Sequence[bytes] = ()
    also: tuple[type[Exception], ...] = ()
    text: bool = False
    share: int = 10


class TooLongError(BaseException):
    """A decoder did not come back; no `except Exception` may catch this."""


def examine(target: Target, data: bytes) -> tuple[bool, str | None]:
    """Return whether `data` was taken, and what was wrong with how it was handled."""
    signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE_SECONDS)
    try:
        value = target.decode(data)
        if target.encode is not None and target.encode(value) != data:
            return True, "taken, but its value is written otherwise"
    except (target.error, *target.also):
        return False, None
    except TooLongError:
        return False, f"not done after {PATIENCE_SECONDS} s"
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return False, f"{type(error).__name__}: {error!s:.200}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return True, None


@contextmanager
def limits() -> Iterator[None]:
    """Bound the memory and the time of each input; warnings are not looked at."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    previous = signal.signal(signal.SIGVTALRM, _give_up)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES, hard))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, previous)


def _give_up(*_: object) -> None:
    raise TooLongError
