"""How many answers of a stage are enough, where more devices are invited than are wanted.

Of a fleet some are slow and some are gone. A coordinator that wants k updates invites
n > k, and goes on with the first k [BEG+19, section 2.3]. Under masks an update takes
several stages, and who is cut off at one of them is out of the round:

    keys, shares    k are enough, but cost little: the others get as much time again as
                    the k-th answer took, so that the reserve is still there for training
    vectors         the k-th ends the stage: now somebody is slow
    after that      only secrets are missing: as many as the plan demands to survive do

The plan that devices see names all n: masks, threshold, headroom and each share of the
noise are made for the n that may survive, and for no fewer than the plan's minimum.
The first k are the fast ones. That is a bias towards fast devices, and no random sample.

[BEG+19] Bonawitz et al., "Towards Federated Learning at Scale", MLSys 2019.
         https://arxiv.org/abs/1902.01046
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, TypeVar

from fedcore.crypto import transcript_hash
from fedcore.pipeline import BoundRound
from fedcore.pipeline.envelope import Stage

K = TypeVar("K")
WITH_GRACE: Final = frozenset[Stage](("identify", "advertise", "share"))
"""Stages that wait for more than their goal, for a while."""
AFTER_THE_VECTORS: Final = frozenset[Stage](("endorse", "reveal"))


def stage_goals(
    stages: Collection[Stage], *, invited: int, wanted: int, minimum: int
) -> dict[Stage, int]:
    """Return how many answers let each stage end early; nothing if all are wanted.

    Args:
        stages: Of the round.
        invited: How many clients it has.
        wanted: How many updates are enough.
        minimum: Survivors below which the round is aborted.

    Example:
        >>> stages = ("advertise", "share", "upload", "reveal")
        >>> stage_goals(stages, invited=13, wanted=10, minimum=8)
        {'advertise': 10, 'share': 10, 'upload': 10, 'reveal': 8}
    """
    if wanted >= invited:
        return {}
    return {
        stage: min(wanted, minimum) if stage in AFTER_THE_VECTORS else wanted for stage in stages
    }


def stages_of(bound: BoundRound) -> tuple[Stage, ...]:
    """Return the stages of a round, in their order."""
    if bound.secagg is None:
        return ("upload",)
    if bound.secagg.authenticated:
        return ("advertise", "share", "upload", "endorse", "reveal")
    return ("advertise", "share", "upload", "reveal")


def in_turn(messages: Mapping[K, object], labels: Mapping[K, str], context: str) -> list[K]:
    """Return the keys of `messages` in an order that favours nobody for long.

    An engine without a network answers in the order in which it is asked. Where the first
    answers are enough, that order decides who is in: so it changes with the round.

    Args:
        messages: By client.
        labels: Of the clients.
        context: Public; another one gives another order.
    """
    return sorted(
        messages,
        key=lambda key: transcript_hash("fedcore/v1/turn", context.encode(), labels[key].encode()),
    )
