"""How a round's clip is chosen, where one number for all rounds and layers will not do.

*Adaptive* [ATMR21]. A clip that is far too low slows training down, one that is far too
high drowns it in noise, and nobody knows the norms of updates beforehand. So the clip
follows a quantile of them: with b~ the (noisy) fraction of updates that fitted C,

    C  <-  C exp(-eta (b~ - gamma)),

which rests where a fraction gamma fits. The step is geometric, so the unit does not
matter: a start that is ten times too low is made up for in ln(10) / (eta gamma) rounds,
one that is ten times too high in ln(10) / (eta (1 - gamma)). The next clip follows from
the last one and from what a round revealed anyway: it is post-processing, public, and
deterministic.

*The price.* Without noise the exact count of clipped updates is in the tally. With noise
the bits ride behind the update in the same noisy vector (`fedcore.codec.TellingClip`), as
a coordinate of +-beta C. In the terms of [ATMR21, Theorem 1]: noise z on the pair has
standard deviation z C sqrt(1 + beta^2), which is z_Delta C on the update and, divided by
2 beta C, sigma_b on the sum of the bits. Solving for beta,

    beta^2 = 1 / ((2 sigma_b / z)^2 - 1),    z_Delta = z sqrt(1 + beta^2)
           = (z^-2 - (2 sigma_b)^-2)^(-1/2),

the paper's trade to the letter, read as a longer norm instead of more noise. The noise
multiplier that is configured, and that the ledger states, is z, for the pair. The scale
is calibrated in units of the norm, so nothing that the ledger records depends on C: the
rounds compose as rounds whose parameters were fixed before the run.

*Per layer* [MRTZ18]: `fedcore.codec.ClipSegments`. Each array of the model is a layer.

[ATMR21] https://arxiv.org/abs/1905.03871
[MRTZ18] https://arxiv.org/abs/1710.06963
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil, exp, inf, isfinite, sqrt
from typing import Literal, TypeAlias

from fedcore.codec import Clip
from fedcore.errors import ConfigurationError

_MOST_DEARER = 2.0
"""Refuse bits that would multiply the noise on the update by more."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One array of the model, as the round's plan names it.

    Attributes:
        name: As in the model's state dict.
        size: Number of its elements.
    """

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class AdaptiveClip:
    """Follow a quantile of the updates' norms from round to round.

    Attributes:
        initial: Norm of the first round.
        quantile: gamma, the fraction of updates that shall fit.
        learning_rate: eta; a round changes the clip by a factor of e^eta at most.
        fraction_noise: sigma_b over the number of invited clients: the standard deviation
            of the fraction that a noisy round tells. Smaller costs the update more noise;
            without noise in the sum it plays no part, for the count is exact.
        lowest: The clip never falls below it.
        highest: The clip never rises above it.
    """

    initial: float = 1.0
    quantile: float = 0.5
    learning_rate: float = 0.2
    fraction_noise: float = 0.05
    lowest: float = 1e-3
    highest: float = 1e3
    kind: Literal["adaptive"] = "adaptive"

    def __post_init__(self) -> None:
        _check_range("clip.quantile", self.quantile, 0, 1)
        _check_range("clip.learning_rate", self.learning_rate, 0, 2)
        _check_range("clip.fraction_noise", self.fraction_noise, 0, 1)
        _check_range("clip.lowest", self.lowest, 0, inf)
        if not (self.lowest <= self.initial <= self.highest and isfinite(self.highest)):
            msg = (
                "clip.initial must be in [clip.lowest, clip.highest], got "
                f"{self.initial} in [{self.lowest}, {self.highest}]"
            )
            raise ConfigurationError(msg)

    def next(self, norm: float, fraction: float) -> float:
        """Return the clip of the round after one that was clipped to `norm`.

        One step is bounded by e^eta either way. The bound is symmetric about the
        quantile, so it does not move the point of rest; it keeps a device that lies
        about its bit, or a sum that wrapped, from throwing the clip far off at once.

        Args:
            norm: Of the round.
            fraction: Of its updates that fitted, as estimated; any finite number.
        """
        error = max(-1.0, min(1.0, fraction - self.quantile))
        return max(self.lowest, min(self.highest, norm * exp(-self.learning_rate * error)))

    def weight(self, noise_multiplier: float, clients: int) -> float:
        """Return beta: the size of a device's bit in units of the clip.

        Raises:
            ConfigurationError: So exact a fraction would more than double the update's noise.
        """
        ratio = 2 * self.fraction_noise * clients / noise_multiplier
        # The update's noise grows by sqrt(1 + beta^2) = ratio / sqrt(ratio^2 - 1).
        least = _MOST_DEARER / sqrt(_MOST_DEARER**2 - 1)
        if ratio < least:
            needed = ceil(1e4 * self.fraction_noise * least / ratio) / 1e4
            msg = (
                f"clip.fraction_noise must be at least {needed:g} for {clients} clients and "
                f"a noise multiplier of {noise_multiplier:g}, got {self.fraction_noise:g}: raise "
                "it, or invite more clients"
            )
            raise ConfigurationError(msg)
        return 1 / sqrt(ratio**2 - 1)


@dataclass(frozen=True, slots=True)
class PerLayerClip:
    """Give each array of the model a bound of its own.

    Layer l gets c_l = norm * r_l / |r|, where r_l = share_l * size_l^size_power, and |r| is
    the root of the sum of the squares. The bounds are the same in every round.

    Attributes:
        norm: Bound on the l2 norm of all layers together.
        size_power: 0 bounds all layers alike; 0.5 bounds them by the root of their size,
            as if all weights of a model moved alike.
        shares: Pairs of a pattern for names, as in the shell, and a factor for the layers
            that it matches; the first match counts, and 1 without any.
    """

    norm: float = 1.0
    size_power: float = 0.0
    shares: tuple[tuple[str, float], ...] = ()
    kind: Literal["per_layer"] = "per_layer"

    def __post_init__(self) -> None:
        _check_range("clip.norm", self.norm, 0, inf)
        if not 0 <= self.size_power <= 1:
            msg = f"clip.size_power must be in [0, 1], got {self.size_power}"
            raise ConfigurationError(msg)
        for pattern, share in self.shares:
            _check_range(f"clip.shares: the share of {pattern!r:.60}", share, 0, inf)

    def bounds(self, layers: tuple[Layer, ...]) -> tuple[float, ...]:
        """Return the bound of each layer.

        Raises:
            ConfigurationError: A pattern matches no layer.
        """
        for pattern, _ in self.shares:
            if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                names = ", ".join(layer.name for layer in layers[:6])
                msg = f"clip.shares: {pattern!r:.60} must match a layer, found {names}"
                raise ConfigurationError(msg)
        parts = [self._share(layer.name) * layer.size**self.size_power for layer in layers]
        largest = max(parts)  # squares of what is left neither overflow nor vanish together
        whole = largest * sqrt(sum((part / largest) ** 2 for part in parts))
        return tuple(self.norm * (part / whole) for part in parts)

    def _share(self, name: str) -> float:
        return next((share for pattern, share in self.shares if fnmatchcase(name, pattern)), 1.0)


ClipChoice: TypeAlias = Clip | AdaptiveClip | PerLayerClip


def first_norm(clip: ClipChoice) -> float | None:
    """Return what an adaptive clip starts from; None for a clip that stays."""
    return clip.initial if isinstance(clip, AdaptiveClip) else None


def check_state(clip: ClipChoice, norm: float | None) -> None:
    """Refuse a round whose norm is not the one that its kind of clip needs.

    Raises:
        ConfigurationError: It is missing, superfluous or out of range.
    """
    if isinstance(clip, AdaptiveClip):
        if norm is None or not clip.lowest <= norm <= clip.highest:
            msg = f"clip_norm must be in [{clip.lowest}, {clip.highest}], got {norm}"
            raise ConfigurationError(msg)
    elif norm is not None:
        msg = f"clip_norm belongs to clip=adaptive, got {norm} with clip={clip.kind}"
        raise ConfigurationError(msg)


def check_layers(layers: tuple[Layer, ...], dim: int, *, needed: bool) -> None:
    """Refuse a round whose layers are not those of its model.

    Args:
        layers: As the round's plan names them.
        dim: Length of the flat update.
        needed: Whether the round treats layers apart.

    Raises:
        ConfigurationError: They are missing, superfluous or of another size.
    """
    sizes = [layer.size for layer in layers]
    if needed and (not sizes or min(sizes) < 1 or sum(sizes) != dim):
        msg = (
            f"layers must each have an element and add up to dim={dim}, got {len(sizes)} "
            f"layers of {sum(sizes)} elements in all"
        )
        raise ConfigurationError(msg)
    if layers and not needed:
        msg = (
            "layers belong to clip=per_layer and to sparsify.dense_below, got "
            f"{len(layers)} without either"
        )
        raise ConfigurationError(msg)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        msg = f"{name} must be in ({low:g}, {high:g}), got {value}"
        raise ConfigurationError(msg)
