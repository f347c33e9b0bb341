"""A sum in which not everybody has trained everything, and the mean that it stands for.

Devices are of public classes. One of class c trains the coordinates M_c of the model
(`fedcore.models.parts`), takes the fraction s_c of the local steps, and sends

    z_i = M_c * update_i / s_c        with s_c = 1 unless steps are normalised

through the same stages as ever: sparsified, clipped, rotated, noised, masked. The sum is
one sum over all, of whole vectors; outside of M_c a device adds zeros. With T_j the survivors
whose class trains coordinate j, the coordinator makes of it

    mean_j = sum_j / |T_j| * (sum of s_c over T_j) / |T_j|,     0 if nobody trained j

which is the mean over those who trained j, as HeteroFL takes it from single models; with
normalised steps it is FedNova's, whose fixed point does not lean towards devices that take
more steps [WLLJP20]. Dividing by |T_j| is what makes it unbiased: divided by all survivors, a
weight that half of them train would move half as far.

What makes it possible under masks is that classes are public. A device says its class
beside its upload, for the round's sum and for nothing else, and nobody can tell it to be of
another one. A coordinate that few devices train is a sum over few devices: a round in
which survivors leave one to fewer than `least_trainers` is aborted before anything is
revealed. The clip bounds z_i as a whole, so sensitivity and noise of the sum are what they
are without classes; the mean of a coordinate that few train has more of the noise.

[WLLJP20] Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous
          Federated Optimization", NeurIPS 2020. https://arxiv.org/abs/2007.07481
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigurationError
from fedcore.models.parts import Structure, part_of
from fedcore.vectors import Layout, RealVector

if TYPE_CHECKING:
    from fedcore.pipeline.round_plan import RoundPlan

MOST_CLASSES = 16


@dataclass(frozen=True, slots=True)
class Whole:
    """Every device trains the whole model, and takes all steps."""

    kind: Literal["whole"] = "whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class ByClass:
    """Each class of devices trains its share.

    Attributes:
        widths: Share of each hidden layer's channels, by class, in (0, 1].
        steps: Share of the local steps, by class, in (0, 1].
        structure: Which channels a part has.
        normalise: Whether updates are divided by the share of steps.
        least_trainers: No coordinate's sum over fewer survivors is revealed.
    """

    widths: tuple[float, ...]
    steps: tuple[float, ...]
    structure: Structure = "rolling"
    normalise: bool = False
    least_trainers: int = 2
    kind: Literal["by_class"] = "by_class"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= len(self.widths) == len(self.steps) <= MOST_CLASSES:
            msg = (
                f"a plan has 1 to {MOST_CLASSES} classes with one width and one share of steps "
                f"each, got {len(self.widths)} widths and {len(self.steps)} shares"
            )
            raise ConfigurationError(msg)
        for name, shares in (("width", self.widths), ("steps", self.steps)):
            wrong = [share for share in shares if not (isfinite(share) and 0 < share <= 1)]
            if wrong:
                msg = f"the {name} of a class that takes part must be in (0, 1], got {wrong[0]}"
                raise ConfigurationError(msg)
        if self.least_trainers < 1:
            msg = f"devices.least_trainers must be at least 1, got {self.least_trainers}"
            raise ConfigurationError(msg)

    @property
    def narrow(self) -> bool:
        """Whether some class trains less than the whole model."""
        return min(self.widths) < 1


Shares: TypeAlias = Whole | ByClass


def mask_of(plan: RoundPlan, layout: Layout, share: ByClass, index: int) -> npt.NDArray[np.bool_]:
    """Return which coordinates a class trains in a round, shape [dim]; not to be written to.

    Raises:
        ConfigurationError: The model is no chain.
    """
    return _mask(layout, share.widths[index], share.structure, plan.round_number - 1)


@lru_cache(maxsize=MOST_CLASSES)
def _mask(layout: Layout, width: float, structure: Structure, turn: int) -> npt.NDArray[np.bool_]:
    mask = part_of(layout, width, structure, turn).mask()
    mask.setflags(write=False)
    return mask


def sent_by(plan: RoundPlan, layout: Layout, index: int, update: RealVector) -> RealVector:
    """Return what a device of a class sends of its update: z_i above.

    Args:
        plan: Of the round.
        layout: Of the model.
        index: Of the class.
        update: Shape [dim].

    Raises:
        ConfigurationError: There is no such class, the model is no chain, or the update changes
            what the class does not train.
    """
    shares = plan.run.shares
    if not isinstance(shares, ByClass):
        return update
    if not 0 <= index < len(shares.widths):
        msg = f"the plan has {len(shares.widths)} classes of devices, got class {index}"
        raise ConfigurationError(msg)
    if np.any(update[~mask_of(plan, layout, shares, index)]):
        msg = (
            f"a device of class {index} must leave weights outside of its part as they are in "
            f"round {plan.round_number}, found some changed: train `part_of` the model"
        )
        raise ConfigurationError(msg)
    return update / np.float32(shares.steps[index]) if shares.normalise else update


@dataclass(frozen=True, slots=True)
class Trainers:
    """Who trained which coordinate of a sum.

    Attributes:
        count: |T_j|, shape [dim].
        factor: By which the sum is multiplied to give the mean, shape [dim].
    """

    count: npt.NDArray[np.int64]
    factor: RealVector

    @property
    def fewest(self) -> int:
        """The smallest |T_j| that is not zero; 0 without survivors."""
        present = self.count[self.count > 0]
        return int(present.min()) if len(present) else 0


def trainers_of(plan: RoundPlan, layout: Layout, classes: Iterable[int]) -> Trainers:
    """Return what follows from the classes of the survivors.

    Args:
        plan: Of the round; with `ByClass`.
        layout: Of the model.
        classes: One for each survivor.

    Raises:
        ConfigurationError: The plan has no classes, or the model is no chain.
    """
    shares = plan.run.shares
    if not isinstance(shares, ByClass):
        msg = "the plan has no classes of devices"
        raise ConfigurationError(msg)
    sizes = np.bincount(np.fromiter(classes, np.int64), minlength=len(shares.widths))
    count = np.zeros(layout.dim, np.int64)
    steps = np.zeros(layout.dim)
    for index, size in enumerate(sizes):
        if size:
            mask = mask_of(plan, layout, shares, index)
            count += mask * int(size)
            steps += mask * (float(size) * (shares.steps[index] if shares.normalise else 1.0))
    divisor = np.maximum(count, 1).astype(np.float64)
    return Trainers(count, steps / divisor**2)
