"""What has been released so far, and what it cost.

The ledger is append-only and immutable: `record` returns a new ledger, so a
round that fails half-way cannot leave a half-written account behind.

A ledger counts one unit of privacy. A device and an example are different
units, and their epsilons do not add up: keep two ledgers. The noise that a
release states must be fixed before the run (`Calibration.noise_multiplier`);
then composition is that of [Mir17, Proposition 1], and stopping at the budget
needs no further theorem.

[Mir17] Mironov, Rényi differential privacy, https://arxiv.org/abs/1702.07476
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from typing import Any, Final, NoReturn, get_type_hints

from fedcore.errors import BudgetExhaustedError, ConfigurationError
from fedcore.privacy import accounting
from fedcore.privacy.accounting import Curve
from fedcore.privacy.releases import LARGEST_COUNT, Release, compose
from fedcore.privacy.rules import check

FORMAT: Final = "fedcore/ledger/v2"
_VACUOUS: Final = 700.0
"""e^epsilon is about to leave a float64, and meaning was left long before."""


@dataclass(frozen=True, slots=True)
class PrivacyLedger:
    """All releases of one training run, and the budget they may not exceed.

    Attributes:
        delta: The probability that goes with epsilon.
        epsilon_budget: No release is recorded beyond it; None for no limit.
        releases: In the order in which they happened, all of one unit.
    """

    delta: float
    epsilon_budget: float | None = None
    releases: tuple[Release, ...] = ()
    # What these very `releases` cost together; `record` hands it on to save time.
    _composed: tuple[tuple[Release, ...], Curve] | None = field(
        default=None, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check ranges, and that the releases belong together."""
        budget = self.epsilon_budget
        units = {release.unit for release in self.releases}
        check(
            (0 < self.delta < 1, f"privacy.delta must be in (0, 1), got {self.delta}"),
            (
                budget is None or 0 < budget < inf,
                f"privacy.epsilon_budget must be in (0, inf) or null, got {budget}",
            ),
            (
                len(units) <= 1,
                f"a ledger counts one unit, got {sorted(units)}: keep one ledger for each",
            ),
        )
        if self._composed is None or self._composed[0] is not self.releases:
            object.__setattr__(self, "_composed", (self.releases, compose(self.releases)))
            check(
                (
                    budget is None or self.epsilon <= budget,
                    f"epsilon must be at most the budget {budget}, got {self.epsilon:g}",
                )
            )

    @property
    def epsilon(self) -> float:
        """What all releases cost together: 0 for none, infinite if one has no noise."""
        return accounting.epsilon(self._spent, self.delta)

    @property
    def sampler_delta(self) -> float:
        """What inexact sampling of integer noise adds to `delta`, at most.

        The releases are (`epsilon`, `delta` + this)-private: see `accounting.sampling_delta`.
        """
        distance = sum(release.distance for release in self.releases)
        epsilon = self.epsilon
        if not distance or epsilon == inf:
            return 0.0  # nothing is charged, or nothing promised
        if epsilon > _VACUOUS:
            return 1.0
        return min(1.0, accounting.sampling_delta(epsilon, distance=distance, samples=1))

    def record(self, release: Release) -> PrivacyLedger:
        """Return the ledger after `release`.

        Raises:
            BudgetExhaustedError: The release would exceed the budget; do not publish it.
            ConfigurationError: The release counts another unit than this ledger.
        """
        composed = self._with(release)
        if self.epsilon_budget is not None:
            after = accounting.epsilon(composed, self.delta)
            if after > self.epsilon_budget:
                msg = (
                    f"round {release.round_number} would raise epsilon from {self.epsilon:.6g} to "
                    f"{after:.6g}, but the budget is {self.epsilon_budget:.6g}: stop here, or "
                    "raise privacy.epsilon_budget"
                )
                raise BudgetExhaustedError(msg)
        releases = (*self.releases, release)
        return replace(self, releases=releases, _composed=(releases, composed))

    def projected_epsilon(self, release: Release, rounds: int) -> float:
        """Return the epsilon after `rounds` more releases like `release`.

        Use it to refuse a plan before training; `record` would refuse it in the middle.
        """
        if rounds == 0:
            return self.epsilon
        if release.correlated:
            last = replace(release, round_number=release.round_number + rounds - 1)
            return accounting.epsilon(self._with(last), self.delta)
        return accounting.epsilon(self._spent + rounds * release.curve, self.delta)

    def to_json(self) -> str:
        """Return canonical JSON: the same ledger gives the same text."""
        document = {
            "format": FORMAT,
            "delta": self.delta,
            "epsilon_budget": self.epsilon_budget,
            "releases": [asdict(release) for release in self.releases],
        }
        return json.dumps(document, sort_keys=True, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> PrivacyLedger:
        """Return the ledger that `to_json` wrote.

        Raises:
            ConfigurationError: `text` is anything else, or its releases exceed its budget.
        """
        try:
            document = json.loads(
                text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
            )
        except (ValueError, RecursionError) as error:
            problem = " ".join(str(error).split())
            msg = f"a ledger must be JSON, found otherwise ({problem}): restore it from a backup"
            raise ConfigurationError(msg) from error
        values = _object("ledger", document, {"format", "delta", "epsilon_budget", "releases"})
        releases, budget = values["releases"], values["epsilon_budget"]
        check(
            (
                values["format"] == FORMAT,
                (
                    f"ledger.format must be {FORMAT!r}, got {values['format']!r:.40}: read it "
                    "with the version of fedcore that wrote it"
                ),
            ),
            (
                isinstance(releases, list),
                f"ledger.releases must be a list, got {type(releases).__name__}",
            ),
        )
        return cls(
            delta=_number("ledger.delta", values["delta"]),
            epsilon_budget=None if budget is None else _number("ledger.epsilon_budget", budget),
            releases=tuple(_parse_release(entry) for entry in releases),
        )

    def _with(self, release: Release) -> Curve:
        """Return what all releases and `release` cost together."""
        if release.correlated:  # shares its cost with earlier releases of its stream
            return compose((*self.releases, release))
        return self._spent + release.curve

    @property
    def _spent(self) -> Curve:
        return accounting.nothing() if self._composed is None else self._composed[1]


def _parse_release(entry: object) -> Release:
    values = _object("release", entry, {declared.name for declared in fields(Release)})
    hints = get_type_hints(Release)
    typed: Mapping[str, Any] = {
        name: _typed(f"release.{name}", value, hints[name]) for name, value in values.items()
    }
    return Release(**typed)


def _object(name: str, value: object, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != keys:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        msg = f"{name} must be an object with the keys {sorted(keys)}, got {found!s:.200}"
        raise ConfigurationError(msg)
    return value


def _typed(name: str, value: object, hint: object) -> object:
    if hint is float:
        return _number(name, value)
    expected = hint if isinstance(hint, type) else str  # the literals are strings
    if type(value) is not expected:
        msg = f"{name} must be {expected.__name__}, got {value!r:.40}"
        raise ConfigurationError(msg)
    return value


def _number(name: str, value: object) -> float:
    # bool is an int to Python, and a large int is no float.
    if type(value) is float or (type(value) is int and abs(value) <= LARGEST_COUNT):
        return float(value)
    msg = f"{name} must be a number, got {value!r:.40}"
    raise ConfigurationError(msg)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        msg = "a key appears twice"
        raise ValueError(msg)
    return result


def _refuse_constant(name: str) -> NoReturn:
    msg = f"{name} is not a JSON number"
    raise ValueError(msg)
