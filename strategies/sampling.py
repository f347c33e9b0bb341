"""Which devices a round invites, drawn once a round, and what may be said of the draw.

A cohort is drawn when a strategy first asks for it and kept until the round is over:
Flower asks more than once, and a second look must not be a second draw. Afterwards
`executed` compares those who were really invited with the draw. If an operator took
somebody out, or anything else chose as well, nothing is known of the sampling any more.

Who is available is not asked. A device that is drawn and away is invited and lost;
leaving it out beforehand would make a sample that depends on who happened to be awake.
A run may do so all the same (`strategies.backoff`), and then claims nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import assert_never

from fedcore.crypto import Entropy, transcript_hash
from fedcore.errors import ConfigurationError
from fedcore.job import Everyone, FixedSize, NoBackOff, Poisson, SamplingConfig
from fedcore.pipeline import Bonawitz, RunPlan, bind_first, layers_of
from fedcore.privacy import Drawn
from fedcore.vectors import Layout
from strategies.backoff import Absences
from strategies.matrix_run import MatrixRun

_WORD = 8
"""Bytes of a draw: a probability is rounded down to a multiple of 2^-64."""


def choose_cohort(
    labels: Iterable[str],
    size: int,
    *,
    seed: int,
    round_number: int,
    used: Callable[[str], int] = lambda _: 0,
) -> list[str]:
    """Return `size` labels, uniformly chosen without replacement, by `seed` and round.

    Labels that were `used` less come first; those used alike are chosen uniformly.

    Example:
        >>> choose_cohort(["a", "b", "c"], 2, seed=0, round_number=1) == choose_cohort(
        ...     ["c", "b", "a"], 2, seed=0, round_number=1
        ... )
        True
    """
    context = f"{seed}/{round_number}".encode()
    ranked = sorted(
        labels,
        key=lambda label: (
            used(label),
            transcript_hash("fedcore/v1/cohort", context, label.encode()),
        ),
    )
    return ranked[:size]


def draw_poisson(labels: Iterable[str], rate: float, entropy: Entropy) -> list[str]:
    """Return each label with probability `rate`, independently, in the labels' order.

    Args:
        labels: To choose from.
        rate: In (0, 1].
        entropy: Secret, used for this draw only.
    """
    ordered = sorted(labels)
    words = entropy.draw("cohort", _WORD * len(ordered))
    threshold = int(rate * 2**64)
    return [
        label
        for place, label in enumerate(ordered)
        if int.from_bytes(words[_WORD * place : _WORD * (place + 1)], "little") < threshold
    ]


class Cohorts:
    """The cohort of each round of a run.

    Args:
        labels: Every node's label, by node id: the population.
        sampling: How to choose.
        size: Of a cohort; the mean size of a Poisson sample of `devices`.
        devices: How many there should be: size / devices is the rate.
        seed: Of the public choice.
        entropy: Of the secret one; the operating system's but in simulations.
        first_round: Number of the round that comes first.
        spacing: Who may take part in which round, and how often each did; if None,
            everybody may.
        absences: Who is left out because of earlier failures; nobody if None.
    """

    def __init__(
        self,
        labels: Mapping[int, str],
        sampling: SamplingConfig,
        *,
        size: int,
        devices: int,
        seed: int,
        entropy: Entropy,
        first_round: int = 1,
        spacing: MatrixRun | None = None,
        absences: Absences | None = None,
    ) -> None:
        self._labels = dict(labels)
        self.absences = absences or Absences(NoBackOff())
        self._nodes = {label: node_id for node_id, label in labels.items()}
        self._sampling = sampling
        self._size = size
        self._rate = min(1.0, size / devices)
        self._seed = seed
        self._entropy = entropy.child("cohort")
        self._round = first_round
        self._spacing = spacing
        self._current: list[int] | None = None
        self._paused: frozenset[str] = frozenset()

    @property
    def varies(self) -> bool:
        """Whether a cohort may turn out too small for its round."""
        return isinstance(self._sampling, Poisson)

    def current(self) -> list[int]:
        """Return the nodes of the current round, drawn when first asked for.

        Raises:
            BudgetExhaustedError: Too few may take part in this round.
        """
        if self._current is None:
            self._paused = self.absences.paused(self._nodes, self._round)
            self._current = [self._nodes[label] for label in self._choose()]
        return list(self._current)

    @property
    def paused(self) -> int:
        """How many devices the current draw left out, as far as there were others."""
        return len(self._paused)

    def note(self, alive: Iterable[int], failed: Iterable[int]) -> None:
        """Note which nodes gave a sign of life in the current round, and which did not."""
        self.absences.note(
            self._round,
            [self._labels[node_id] for node_id in alive if node_id in self._labels],
            [self._labels[node_id] for node_id in failed if node_id in self._labels],
        )

    def finish(self) -> None:
        """End the round: the next cohort is another one."""
        self._current = None
        self._round += 1

    def executed(self, invited: Collection[int]) -> Drawn:
        """Return how the `invited` nodes were chosen: as configured if they are the draw."""
        chosen = self._current is not None and set(invited) == set(self._current)
        if not chosen or self._current is None or self._spacing is not None or self._paused:
            return Drawn()
        population = len(self._nodes)
        match self._sampling:
            case FixedSize():
                rate = len(self._current) / population
                return Drawn("fixed_size_without_replacement", rate, population)
            case Poisson():
                return Drawn("poisson", self._rate, population)
            case Everyone():
                return Drawn("all", 1.0, population)
            case _:
                assert_never(self._sampling)

    def _choose(self) -> list[str]:
        match self._sampling:
            case FixedSize():
                choose = partial(
                    choose_cohort, size=self._size, seed=self._seed, round_number=self._round
                )
                if self._spacing is None:
                    return choose(self._nodes, used=self._pause)
                may = self._spacing.candidates(self._nodes, self._round, wanted=self._size)
                return choose(may, used=self._spacing.participations)
            case Poisson():
                source = self._entropy.child(f"round={self._round}")
                return draw_poisson(set(self._nodes) - self._paused, self._rate, source)
            case Everyone():
                return sorted(self._nodes)
            case _:
                assert_never(self._sampling)

    def _pause(self, label: str) -> int:
        return self.absences.remaining(label, self._round)


def refused_size(plan: RunPlan, layouts: Sequence[Layout], clients: int) -> str | None:
    """Return why `plan` cannot be carried out by so many clients, or None if it can.

    Args:
        plan: Of the run.
        layouts: Of the model in each phase of the run.
        clients: How many were drawn.
    """
    try:
        if isinstance(plan.secagg, Bonawitz):
            plan.secagg.check_margin(clients)
        for layout in layouts:
            bind_first(plan, clients=clients, dim=layout.dim, layers=layers_of(plan, layout))
    except ConfigurationError as error:
        return str(error)
    return None
