"""What local training lowers: cross-entropy, alone or beside a teacher's opinion.

A larger model's probabilities say more about an example than its label does: which
other classes it resembles, and how much. A small student that is trained towards them
learns from every example what the teacher knows of all classes [HVD15]. With logits z,
label y, the teacher's probabilities p, temperature T and weight w,

    loss = (1 - w) CE(z, y) + w T^2 KL(p_T || softmax(z / T)),   p_T = softmax(log p / T)

T^2 keeps the gradient of the second term as large as that of the first, whatever T is.
Softmax does not see constants, so log p serves as the teacher's logits: whoever runs a
release gets probabilities and needs nothing else.

Each objective comes with its error: the gradient at the logits times the batch size,
from which the step of a chain of linear layers starts without autograd.

[HVD15] Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network".
        https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from fedcore.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """A teacher's opinion on a client's examples.

    Attributes:
        probabilities: Shape [n, classes], float32; rows sum to 1.
        temperature: Softens both distributions; positive.
        weight: Of the teacher in the loss, in [0, 1]; the label has the rest.
    """

    probabilities: npt.NDArray[np.float32] = field(repr=False)
    temperature: float
    weight: float

    def __post_init__(self) -> None:
        """Check ranges."""
        if not (0 < self.temperature < inf and 0 <= self.weight <= 1):
            msg = (
                "soft targets need a positive temperature and a weight in [0, 1], got "
                f"{self.temperature} and {self.weight}"
            )
            raise ConfigurationError(msg)

    def softened(self) -> Tensor:
        """Return p_T, shape [n, classes]."""
        tiny = np.finfo(np.float32).tiny  # an int8 teacher may be certain: log 0
        logits = torch.from_numpy(np.log(np.maximum(self.probabilities, tiny)))
        return (logits / self.temperature).softmax(1)


class Objective(Protocol):
    """A loss of logits [batch, classes], labels [batch] and p_T [batch, classes], if any."""

    def loss(self, logits: Tensor, y: Tensor, soft: Tensor | None) -> Tensor:
        """Return the mean over the batch."""
        ...

    def error(self, logits: Tensor, onehot: Tensor, soft: Tensor | None) -> Tensor:
        """Return batch times the gradient of `loss`; labels come as rows [batch, classes]."""
        ...


@dataclass(frozen=True, slots=True)
class Labels:
    """Cross-entropy with the labels."""

    def loss(self, logits: Tensor, y: Tensor, soft: Tensor | None) -> Tensor:
        """Return it."""
        del soft
        return cross_entropy(logits, y)

    def error(self, logits: Tensor, onehot: Tensor, soft: Tensor | None) -> Tensor:
        """Return softmax - onehot."""
        del soft
        return logits.softmax(1).sub_(onehot)


@dataclass(frozen=True, slots=True)
class Distillation:
    """Labels and a teacher, as above."""

    temperature: float
    weight: float

    def loss(self, logits: Tensor, y: Tensor, soft: Tensor | None) -> Tensor:
        """Return it."""
        assert soft is not None  # noqa: S101 - `objective_of` gives both or neither
        ours = (logits / self.temperature).log_softmax(1)
        teacher = kl_div(ours, soft, reduction="batchmean") * self.temperature**2
        return (1 - self.weight) * cross_entropy(logits, y) + self.weight * teacher

    def error(self, logits: Tensor, onehot: Tensor, soft: Tensor | None) -> Tensor:
        """Return it; the derivative of z / T turns T^2 into T."""
        assert soft is not None  # noqa: S101 - as above
        label = logits.softmax(1).sub_(onehot).mul_(1 - self.weight)
        teacher = (logits / self.temperature).softmax(1).sub_(soft)
        return label.add_(teacher, alpha=self.weight * self.temperature)


def objective_of(
    teacher: SoftTargets | None, examples: int, device: str
) -> tuple[Objective, Tensor | None]:
    """Return what to lower, and p_T for all examples if there is a teacher.

    Raises:
        ConfigurationError: The teacher has not one opinion for each example.
    """
    if teacher is None:
        return Labels(), None
    if teacher.probabilities.ndim != 2 or len(teacher.probabilities) != examples:
        msg = (
            f"a teacher needs probabilities [n, classes] for the client's {examples} examples, "
            f"got {list(teacher.probabilities.shape)}"
        )
        raise ConfigurationError(msg)
    return Distillation(teacher.temperature, teacher.weight), teacher.softened().to(device)
