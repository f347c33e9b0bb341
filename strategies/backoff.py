"""Which devices are left out of the draw because they failed again and again.

A device fails a round if it was asked and gave no usable answer by the end of it: it was
silent, its program raised an error, or it broke the protocol. It does not fail if it was
counted, if it declined and said why, or if its answer came too late: it is alive. What
failures it had is the coordinator's own observation of the network, nobody's data, and
the same observations give the same draws; between two processes it is kept in the
checkpoint.

A draw from those who are left is no draw from the population. Where anybody is left out,
the ledger says that nothing is known of the sampling, and nothing is claimed for it.
If too few are left for a cohort, those whose pause is nearly over are asked after all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedcore.job.backoff import BackOff, NoBackOff


@dataclass(frozen=True, slots=True)
class Absence:
    """The failures of one device.

    Attributes:
        failures: Rounds that it failed, without one in between that it did not; at least 1.
        last: Number of the last of them.
    """

    failures: int
    last: int


class Absences:
    """The failures of all devices of a run.

    Args:
        policy: How long who is left out.
        known: From an earlier process, by label.
    """

    def __init__(self, policy: BackOff, known: Mapping[str, Absence] | None = None) -> None:
        self._policy = policy
        self._known = dict(known or {})

    @property
    def known(self) -> dict[str, Absence]:
        """The failures by label, in the order of the labels: what another process goes on from."""
        return dict(sorted(self._known.items()))

    def note(self, round_number: int, counted: Iterable[str], failed: Iterable[str]) -> None:
        """Note how a round went.

        Args:
            round_number: Of that round.
            counted: Labels of the devices that are in the sum.
            failed: Labels of those that gave no usable answer.
        """
        if isinstance(self._policy, NoBackOff):
            return
        for label in counted:
            self._known.pop(label, None)
        for label in failed:
            before = self._known.get(label, Absence(0, 0))
            if before.last != round_number:  # a round that is tried twice is failed once
                self._known[label] = Absence(before.failures + 1, round_number)

    def remaining(self, label: str, round_number: int) -> int:
        """Return for how many rounds, this one included, a device is left out; 0 for not."""
        absence = self._known.get(label)
        if absence is None or isinstance(self._policy, NoBackOff):
            return 0
        first_again = absence.last + 1 + self._policy.pause(absence.failures)
        return max(0, first_again - round_number)

    def paused(self, labels: Iterable[str], round_number: int) -> frozenset[str]:
        """Return which of these devices are left out of a round."""
        return frozenset(label for label in labels if self.remaining(label, round_number))
