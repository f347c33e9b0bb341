"""How a run treats devices that fail round after round; `strategies.backoff` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedcore.errors import ConfigurationError

_MOST_ROUNDS = 1 << 20


@dataclass(frozen=True, slots=True)
class NoBackOff:
    """Whoever failed is invited as before."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class ExponentialBackOff:
    """A device that fails again and again is left out of the draw, twice as long each time.

    After the f-th failure in a row, f >= after, it pauses for first * 2^(f - after) rounds.

    Attributes:
        after: Failures in a row before the first pause.
        first: Rounds of the first pause.
        most: Rounds of the longest pause.
    """

    after: int = 2
    first: int = 1
    most: int = 16
    kind: Literal["exponential"] = "exponential"

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, value, low in (
            ("after", self.after, 1),
            ("first", self.first, 1),
            ("most", self.most, self.first),
        ):
            if not low <= value <= _MOST_ROUNDS:
                msg = f"backoff.{name} must be in {low}..{_MOST_ROUNDS}, got {value}"
                raise ConfigurationError(msg)

    def pause(self, failures: int) -> int:
        """Return for how many rounds a device is left out after so many failures in a row.

        Example:
            >>> [ExponentialBackOff().pause(failures) for failures in range(8)]
            [0, 0, 1, 2, 4, 8, 16, 16]
        """
        if failures < self.after:
            return 0
        doublings = min(failures - self.after, _MOST_ROUNDS.bit_length())
        return min(self.most, self.first << doublings)


BackOff: TypeAlias = ExponentialBackOff | NoBackOff
