"""How often a device asks for work, and how long it waits after a failure.

Flower's SuperNode asks every three seconds, whatever happens. A device that was asked a
moment ago will be asked again soon: the next stage of a round follows the last one. One
that has heard nothing for an hour will hardly miss a second. So a pause is a fifth of the
time that it has been quiet, within two bounds: no message waits for much more than a fifth
of the silence before it, and the number of questions grows with the logarithm of that time.
A question costs the coordinator some milliseconds, and all devices ask.

Pauses are spread by a quarter to either side. Devices that were started together, by the
same flash of power, do not go on asking together.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Final

from fedcore.errors import ConfigurationError

SHARE: Final = 0.2
"""Of the time that it has been quiet."""
SPREAD: Final = 0.25


@dataclass(frozen=True, slots=True)
class Pace:
    """Bounds of the pause between two questions, in seconds.

    Attributes:
        fastest: While a round goes on.
        slowest: When nothing has happened for five times as long, or longer.

    Example:
        >>> pace = Pace(fastest=0.2, slowest=3.0)
        >>> [pace.pause(quiet, 0.5) for quiet in (0.0, 10.0, 3600.0)]
        [0.2, 2.0, 3.0]
    """

    fastest: float = 0.2
    slowest: float = 3.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not (0.01 <= self.fastest <= self.slowest <= 3600 and isfinite(self.slowest)):
            msg = (
                "a device must ask every 0.01 to 3600 s, and not faster when it is idle; got "
                f"{self.fastest:g} s, and {self.slowest:g} s when idle"
            )
            raise ConfigurationError(msg)

    def pause(self, quiet_seconds: float, chance: float) -> float:
        """Return how long to wait before the next question, in seconds.

        Args:
            quiet_seconds: Since the last message.
            chance: Uniform in [0, 1).
        """
        return _spread(min(max(SHARE * quiet_seconds, self.fastest), self.slowest), chance)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait before trying again: twice as long each time, up to a bound.

    Attributes:
        first: Seconds after the first failure.
        longest: Seconds at most.

    Example:
        >>> [Patience(1.0, 15.0).wait(failures, 0.5) for failures in (1, 2, 3, 9)]
        [1.0, 2.0, 4.0, 15.0]
    """

    first: float = 1.0
    longest: float = 15.0

    def wait(self, failures: int, chance: float) -> float:
        """Return the seconds to wait after so many failures in a row.

        Args:
            failures: At least 1.
            chance: Uniform in [0, 1).
        """
        return _spread(min(self.first * 2.0 ** min(failures - 1, 32), self.longest), chance)


def _spread(seconds: float, chance: float) -> float:
    return seconds * (1 + SPREAD * (2 * chance - 1))
