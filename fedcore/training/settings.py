"""What a client's local training is told, and what it reports: values without torch.

A report is computed on the client's own examples. Under differential privacy it
is not covered by the noise on the weights: it stays on the device, or leaves
through a mechanism of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

from fedcore.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """Stochastic gradient descent on one client.

    Attributes:
        epochs: Passes over the client's examples in one round.
        batch_size: Examples a step; 0 takes all of them.
        learning_rate: Step length.
        momentum: As in `torch.optim.SGD`; starts from zero in every round.
        weight_decay: As in `torch.optim.SGD`, on all weights.
    """

    kind: Literal["sgd"] = "sgd"
    epochs: int = 1
    batch_size: int = 10
    learning_rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.epochs < 1:
            msg = f"training.epochs must be at least 1, got {self.epochs}"
            raise ConfigurationError(msg)
        if self.batch_size < 0:
            msg = f"training.batch_size must be 0 (all examples) or more, got {self.batch_size}"
            raise ConfigurationError(msg)
        if not 0 < self.learning_rate < inf:
            msg = (
                f"training.learning_rate must be positive and finite, got {self.learning_rate}: "
                "0.1 is a usual choice"
            )
            raise ConfigurationError(msg)
        if not 0 <= self.momentum < 1:
            msg = f"training.momentum must be in [0, 1), got {self.momentum}: 0 turns it off"
            raise ConfigurationError(msg)
        if not 0 <= self.weight_decay < inf:
            msg = (
                f"training.weight_decay must be 0 or more and finite, got {self.weight_decay}: "
                "0 turns it off"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class ExampleLevelPrivacy:
    """DP-SGD on the client: one example more or less changes little of its update.

    Attributes:
        noise_multiplier: Standard deviation of the noise on a sum of gradients, in
            units of `max_grad_norm`. 0 clips only and gives no privacy; None to have it
            found for `epsilon`.
        epsilon: What all rounds together may cost; None if the noise is given.
        max_grad_norm: Each example's gradient is clipped to this l2 norm.
        delta: Failure probability at which epsilon is reported.
        epsilon_budget: No round is begun that would exceed it; None for no limit other
            than `epsilon`.
        secure_mode: Draw sampling and noise from the operating system; results then
            differ from run to run.
        ghost: Ghost clipping: no per-example gradients in memory, a second backward pass.
        one_by_one: One example at a time, without Opacus: the least memory.
    """

    kind: Literal["example_level"] = "example_level"
    noise_multiplier: float | None = 1.0
    epsilon: float | None = None
    max_grad_norm: float = 1.0
    delta: float = 1e-5
    epsilon_budget: float | None = None
    secure_mode: bool = False
    ghost: bool = False
    one_by_one: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.ghost and self.one_by_one:
            msg = "privacy.ghost and privacy.one_by_one are two ways to clip: set one of them"
            raise ConfigurationError(msg)
        if (self.noise_multiplier is None) == (self.epsilon is None):
            msg = (
                "exactly one of privacy.noise_multiplier and privacy.epsilon must be given, got "
                f"{self.noise_multiplier} and {self.epsilon}: set the other to null"
            )
            raise ConfigurationError(msg)
        if self.epsilon is not None and not isfinite(self.epsilon):
            # One that no run reaches is refused with the smallest that this run does.
            msg = f"privacy.epsilon must be a finite number or null, got {self.epsilon}"
            raise ConfigurationError(msg)
        if self.epsilon_budget is not None and not 0 < self.epsilon_budget < inf:
            msg = f"privacy.epsilon_budget must be in (0, inf) or null, got {self.epsilon_budget}"
            raise ConfigurationError(msg)
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < inf:
            msg = (
                "privacy.noise_multiplier must be 0 or more and finite, "
                f"got {self.noise_multiplier}: 1 is a usual choice"
            )
            raise ConfigurationError(msg)
        if not 0 < self.max_grad_norm < inf:
            msg = f"privacy.max_grad_norm must be positive and finite, got {self.max_grad_norm}"
            raise ConfigurationError(msg)
        if not 0 < self.delta < 1:
            msg = (
                f"privacy.delta must be in (0, 1), got {self.delta}: "
                "choose less than one over the number of examples"
            )
            raise ConfigurationError(msg)

    @property
    def stated_noise(self) -> float:
        """The noise multiplier.

        Raises:
            ConfigurationError: There is a target instead, whose noise was not found yet.
        """
        if self.noise_multiplier is None:
            msg = (
                f"privacy.epsilon={self.epsilon:g} is for all rounds together, and a device does "
                "not know how many there are: the coordinator finds the noise and states it"
            )
            raise ConfigurationError(msg)
        return self.noise_multiplier


@dataclass(frozen=True, slots=True)
class TrainReport:
    """How the last epoch went, measured on its own forward passes.

    Attributes:
        loss: Mean cross-entropy, in nats.
        accuracy: Share of examples whose label had the largest logit.
        examples: How many examples the client holds.
    """

    loss: float
    accuracy: float
    examples: int


@dataclass(frozen=True, slots=True)
class ExampleLevelReport(TrainReport):
    """The same for DP-SGD, with what an accountant needs.

    Attributes:
        steps: Noisy steps that were taken.
        sample_rate: Probability with which each step took each example.
    """

    steps: int
    sample_rate: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model does on labelled examples; fields as in `TrainReport`."""

    loss: float
    accuracy: float
    examples: int
