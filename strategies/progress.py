"""What is told about a run while it goes, and by which it can be told again.

An observer hears of each round once. If the process dies and another goes on, the new
one's observer hears of all earlier rounds at once (`resumed`), as they were noted in the
checkpoint, and then of each round as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from fedcore.errors import FedcoreError
from fedcore.job import Job, Preflight
from fedcore.privacy import PrivacyLedger
from fedcore.telemetry import RoundReport
from fedcore.training import Evaluation

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]


class StalledError(FedcoreError):
    """Round after round is aborted; going on would change nothing."""


@dataclass(frozen=True, slots=True)
class Past:
    """A round that is over, as far as it has to be told again.

    Attributes:
        report: How its aggregation went.
        evaluation: Of the model after it; None if not tested.
        epsilon_example: What local training had cost an example by then, as in
            `Progress.examples`.
        seconds: Since the run began, the time between two processes left out.
    """

    report: RoundReport
    evaluation: Evaluation | None
    epsilon_example: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run after a round.

    Attributes:
        report: How the round's aggregation went.
        evaluation: Of the new global model on the test examples; None if not tested.
        arrays: The new global model.
        ledger: Everything released so far.
        examples: What local training cost an example, where `ledger` counts devices; the two
            do not add up. None where only one unit is protected.
        seconds: Since the run began, the time between two processes left out.
    """

    report: RoundReport
    evaluation: Evaluation | None
    arrays: Arrays = field(repr=False)
    ledger: PrivacyLedger = field(repr=False)
    examples: PrivacyLedger | None = field(default=None, repr=False)
    seconds: float = 0.0

    @property
    def past(self) -> Past:
        """What is told again of this round."""
        example = None if self.examples is None else self.examples.epsilon
        return Past(self.report, self.evaluation, example, self.seconds)


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        past: Its rounds so far, in their order.
        arrays: The global model.
        unpruned: The last one before pruning; None without it, or before it.
        ledger: Everything released so far.
        examples: As in `Progress`.
    """

    past: tuple[Past, ...]
    arrays: Arrays = field(repr=False)
    unpruned: Arrays | None = field(repr=False)
    ledger: PrivacyLedger = field(repr=False)
    examples: PrivacyLedger | None = field(repr=False)


class Observer(Protocol):
    """Whoever wants to know how a run goes: a progress bar, a recorder, a test."""

    def started(self, job: Job, preflight: Preflight, initial: Evaluation) -> None:
        """Take note of the start; `initial` is the untrained model's."""
        ...

    def resumed(self, run: Resumed) -> None:
        """Take note, after `started`, that earlier rounds were held by an earlier process."""
        ...

    def round_finished(self, progress: Progress) -> None:
        """Take note of a round, aborted ones included."""
        ...

    def stopped(self, reason: str) -> None:
        """Take note that the run ended before its last round, and why."""
        ...
