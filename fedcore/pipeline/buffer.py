"""A buffer: one sum over updates that were trained from different versions of the model.

In asynchronous training [NMZ+22] devices check in when they are done, and K updates are
added at a time. An update that began from version v and is added when the model is at
version v + tau is tau versions stale, and counts less:

    s(tau) = (1 + tau)^-exponent,    0 < s <= 1,    s(0) = 1

Under a secure sum nobody can scale a single update but its own device. So the device
multiplies what its clip left by s(tau), before anything is rounded or noise is added; the
norm of what it sends never exceeds the clip, and the sensitivity of the sum stays what it
was. The coordinator divides the sum by the sum of s over the survivors, which is public:

    mean = (sum of s(tau_i) clip(x_i) + noise) / sum of s(tau_i)

tau is public, too: it counts versions, and follows from when a device was asked and when
it was done.

**Who shares what.** In a round, every key is bound to one model, so that nobody can be
given a model of its own. The members of a buffer have different models, and a coordinator
that may choose each of them could leave one update standing alone: it gives everybody else
models whose updates are zero. So a buffer names the digests of the versions that are
admitted, and for each *seat* (index in the plan) which of them its device trained from.
A device takes its seat only if the digest there is that of the model that it was given.
Seats of one version are then devices that hold the same model, and a device may demand
that there are several, whoever drops out (`alike`).

[NMZ+22] Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation",
         https://arxiv.org/abs/2106.06639
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING, Final

from fedcore.errors import ConfigurationError, PeerProtocolError

if TYPE_CHECKING:  # a plan holds a buffer
    from fedcore.pipeline.plan import RunPlan

MOST_VERSIONS: Final = 1024
"""Each takes 67 bytes of the plan."""
LARGEST_EXPONENT: Final = 4.0


def staleness_weight(staleness: int, exponent: float) -> float:
    """Return what an update counts that is so many versions old, in (0, 1].

    Example:
        >>> [round(staleness_weight(tau, 0.5), 3) for tau in (0, 1, 3, 8)]
        [1.0, 0.707, 0.5, 0.333]
    """
    return float((1 + staleness) ** -exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Which versions the members of a sum trained from.

    Attributes:
        versions: Digests of the models that are admitted, the current one first: the place
            in this list is the staleness.
        staleness: Of each seat, by index.
        exponent: Of the weights; 0 weighs all alike.
    """

    versions: tuple[str, ...]
    staleness: tuple[int, ...]
    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= len(self.versions) <= MOST_VERSIONS:
            msg = f"buffer.versions must hold 1 to {MOST_VERSIONS}, got {len(self.versions)}"
            raise ConfigurationError(msg)
        if len(set(self.versions)) < len(self.versions):
            msg = "buffer.versions must differ from each other: one model has one staleness"
            raise ConfigurationError(msg)
        if not all(0 <= tau < len(self.versions) for tau in self.staleness):
            msg = f"buffer.staleness must be in 0..{len(self.versions) - 1}, got {self.staleness}"
            raise ConfigurationError(msg)
        check_exponent("buffer.exponent", self.exponent)

    def weight(self, staleness: int) -> float:
        """Return what an update counts, in (0, 1]."""
        return staleness_weight(staleness, self.exponent)

    def total(self, survivors: Iterable[int]) -> float:
        """Return the sum of the weights of these seats: what their sum is divided by."""
        return fsum(self.weight(self.staleness[seat]) for seat in survivors)

    def alike(self, dropped: int) -> int:
        """Return how many members have the model of any one, at least, the one included.

        Args:
            dropped: How many members may be declared lost; all from one version, at worst.
        """
        return max(1, min(Counter(self.staleness).values()) - dropped)

    def seated(self, model_digest: str, seat: int | None) -> int:
        """Return the staleness of an update, for the device that made it.

        Args:
            model_digest: Of the model that the device trained from.
            seat: Its index in the plan; None in the clear, where it has none.

        Raises:
            PeerProtocolError: The model is not admitted, or not the one of this seat.
        """
        if model_digest not in self.versions:
            msg = (
                f"this device trained from the model {model_digest[:12]}, which is none of the "
                f"{len(self.versions)} versions that the buffer admits: it does not take part"
            )
            raise PeerProtocolError(msg)
        found = self.versions.index(model_digest)
        if seat is not None and (seat >= len(self.staleness) or self.staleness[seat] != found):
            msg = (
                f"seat {seat} must name the model that this device trained from, and names "
                "another: those who share its model would be others than the plan says; this "
                "device does not take part"
            )
            raise PeerProtocolError(msg)
        return found


def check_exponent(name: str, value: float) -> None:
    """Refuse an exponent by which weights would grow, or vanish.

    Raises:
        ConfigurationError: It is out of range.
    """
    if not 0 <= value <= LARGEST_EXPONENT:
        msg = f"{name} must be in [0, {LARGEST_EXPONENT:g}], got {value}"
        raise ConfigurationError(msg)


def check_buffered(run: RunPlan) -> None:
    """Refuse stages that have no meaning for updates of different versions.

    Raises:
        ConfigurationError: Names the stage, and what to choose.
    """
    for broken, why in (
        (
            run.weighting.kind != "uniform",
            "an update counts by its staleness, which is public, and numbers of examples are "
            f"not: choose weighting=uniform, got weighting={run.weighting.kind}",
        ),
        (
            run.error_feedback,
            "what error feedback puts aside belongs to the model of its round, and buffers mix "
            "models: choose error_feedback=false",
        ),
        (
            run.clip.kind == "adaptive",
            "clip=adaptive follows norms that were all trained from one model: choose clip=norm "
            "or clip=per_layer",
        ),
        (
            run.downlink.kind != "full",
            "changes of the model are sent to devices that are a round apart, and here they are "
            "many: choose downlink=full",
        ),
        (
            run.privacy.kind == "matrix_gaussian",
            "correlated noise needs participations that keep their distance, and who checks in "
            "is left to the devices: choose privacy=central_gaussian or distributed_gaussian",
        ),
        (
            run.shares.kind != "whole",
            "means over those who trained a weight are not weighed by staleness: choose "
            "devices=equal",
        ),
    ):
        if broken:
            msg = f"schedule=buffered: {why}"
            raise ConfigurationError(msg)
