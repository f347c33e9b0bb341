"""What a coordinator must not forget in a run with correlated noise.

Two things outlive a round. The *noise*: its secret seed, and which row was used last. And
who *took part* when: a device sits out `min_separation` rounds, and takes part at most
`participations` times. Both are kept in one file, replaced as a whole before anything
that depends on it leaves:

    invite > file on disk > messages leave          draw > file on disk > sum is published

A crash in between wastes a participation or a row; it never repeats one. The file is
secret: its seed takes all noise off all models of the run. A run whose file is lost cannot
go on, since its noise would have to be drawn anew; start another run, with another budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from fedcore.crypto import Entropy
from fedcore.durable import replace_file
from fedcore.errors import BudgetExhaustedError, ConfigurationError
from fedcore.pipeline import BoundRound, NoiseTape
from fedcore.privacy import MatrixGaussian, PrivacyLedger
from fedcore.privacy.samplers import SEED_BYTES
from fedcore.vectors import IntegerVector

FORMAT: Final = "fedcore/matrix-run/v1"


@dataclass(slots=True)
class MatrixRun:
    """Noise and participations of one run; draws as `fedcore.pipeline.CoordinatorNoise`.

    Attributes:
        tape: The noise.
        taken: For each device that took part: the last round, and how many.
        path: Where both are kept; None keeps them in memory, and the run ends with the process.
    """

    tape: NoiseTape
    taken: dict[str, tuple[int, int]] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        self.tape.keep = self.save

    @classmethod
    def start(
        cls, mechanism: MatrixGaussian, entropy: Entropy, path: Path | None = None
    ) -> MatrixRun:
        """Return a run that begins, with a fresh seed.

        Raises:
            ConfigurationError: The file exists or cannot be written.
        """
        if path is not None and path.exists():
            msg = f"the noise of a run is kept in {path} already: resume it, or name another file"
            raise ConfigurationError(msg)
        seed = entropy.child("matrix").draw("seed", SEED_BYTES)
        run = cls(NoiseTape(mechanism, seed), path=path)
        run.save()
        return run

    @classmethod
    def resume(cls, path: Path) -> MatrixRun:
        """Return the run that `path` keeps.

        Raises:
            ConfigurationError: The file is missing or damaged: the run cannot go on.
        """
        try:
            return cls.from_bytes(path.read_bytes(), path)
        except OSError as error:
            msg = (
                f"the noise of this run cannot be read from {path} ({error.strerror}), and must "
                "not be drawn anew: restore the file, or start another run"
            )
            raise ConfigurationError(msg) from error

    @property
    def mechanism(self) -> MatrixGaussian:
        """The run's."""
        return self.tape.mechanism

    def draw(self, bound: BoundRound, /) -> IntegerVector:
        """Return the noise of a round; see `NoiseTape.draw`."""
        return self.tape.draw(bound)

    def eligible(self, label: str, round_number: int) -> bool:
        """Return whether a device may take part in a round, or already does."""
        if label not in self.taken:
            return True
        last, count = self.taken[label]
        if round_number == last:  # another attempt
            return True
        distant = round_number - last >= self.mechanism.min_separation
        return distant and count < self.mechanism.participations

    def candidates(self, labels: Iterable[str], round_number: int, *, wanted: int) -> list[str]:
        """Return who may take part in a round.

        Raises:
            BudgetExhaustedError: Fewer than `wanted`.
        """
        may = [label for label in labels if self.eligible(label, round_number)]
        if len(may) < wanted:
            msg = (
                f"round {round_number} needs {wanted} devices, but only {len(may)} may take part: "
                "the others did so too recently, or as often as the noise hides"
            )
            raise BudgetExhaustedError(msg)
        return may

    def participations(self, label: str) -> int:
        """Return in how many rounds a device took part."""
        return self.taken.get(label, (0, 0))[1]

    def invite(self, labels: Iterable[str], round_number: int) -> None:
        """Note that these devices take part, durably; only then may they be asked.

        Whoever is invited counts, also if it never answers: that it did not take part is
        not for the coordinator to say.

        Raises:
            ConfigurationError: One of them may not.
        """
        cohort = list(labels)
        early = [label for label in cohort if not self.eligible(label, round_number)]
        if early:
            msg = (
                f"devices take part at most {self.mechanism.participations} times and at least "
                f"{self.mechanism.min_separation} rounds apart; round {round_number} would invite "
                f"{len(early)} that may not, the first is {early[0]!r:.80}: choose the cohort with "
                "CohortGrid"
            )
            raise ConfigurationError(msg)
        for label in cohort:
            last, count = self.taken.get(label, (0, 0))
            self.taken[label] = (round_number, count + (last != round_number))
        self.save()

    def check(self, privacy: object, ledger: PrivacyLedger) -> None:
        """Refuse another plan, and to go on after releases whose noise this is not.

        Raises:
            ConfigurationError: The run is another, or its noise was lost or rolled back.
        """
        if privacy != self.mechanism:
            msg = f"the noise is that of {self.mechanism}, but the plan says {privacy}"
            raise ConfigurationError(msg)
        for release in ledger.releases:
            if not release.correlated:
                continue
            if release.stream != self.tape.stream:
                msg = (
                    f"round {release.round_number} was published with noise "
                    f"{release.stream or 'unknown'}, this is {self.tape.stream}: resume the run "
                    "with its own file, or start another with an empty ledger"
                )
                raise ConfigurationError(msg)
            if release.round_number > self.tape.last:
                msg = (
                    f"round {release.round_number} was published, but its noise is not noted as "
                    f"used (the last is that of round {self.tape.last}): the file was rolled "
                    "back, and the run must not go on"
                )
                raise ConfigurationError(msg)

    def waste(self, round_number: int) -> None:
        """Use up the rows until a round in which the coordinator was stopped, durably.

        Whether the last of them was drawn is known to nobody any more.
        """
        if round_number > self.tape.last:
            self.tape.skip_to(round_number)

    def save(self) -> None:
        """Replace the file; do nothing without one.

        Raises:
            ConfigurationError: It cannot be written: nothing may be published.
        """
        if self.path is None:
            return
        try:
            replace_file(self.path, self.to_bytes())
        except OSError as error:
            msg = (
                f"the noise of this run cannot be kept in {self.path} ({error.strerror}), so "
                "nothing may be published: name a file in a writable folder"
            )
            raise ConfigurationError(msg) from error

    def to_bytes(self) -> bytes:
        """Return all that `from_bytes` needs. Secret."""
        state = _State(FORMAT, self.mechanism, self.tape.seed.hex(), self.tape.last, self.tape.dim,
                       self.taken)  # fmt: skip
        return TypeAdapter(_State).dump_json(state)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path | None = None) -> MatrixRun:
        """Return the run that `to_bytes` described.

        Raises:
            ConfigurationError: `data` is anything else.
        """
        try:
            state = TypeAdapter(_State).validate_json(data)
            seed = bytes.fromhex(state.seed)
        except (ValidationError, ValueError):
            seed = b""
            state = None
        if state is None or state.format != FORMAT or len(seed) != SEED_BYTES:
            msg = (
                "the kept noise of a run is damaged, and must not be drawn anew: restore the "
                "file, or start another run"
            )
            raise ConfigurationError(msg)
        tape = NoiseTape(state.mechanism, seed, last=state.last, dim=state.dim)
        return cls(tape, dict(state.taken), path)


@dataclass(frozen=True, slots=True)
class _State:
    """The file."""

    format: str
    mechanism: MatrixGaussian
    seed: str = field(repr=False)
    last: int
    dim: int | None
    taken: Mapping[str, tuple[int, int]]
