"""From an update back to the images that it was computed from.

Two attacks, both on an update that is taken for a gradient g of the cross-entropy:

analytic    In a dense first layer y = W x + b, row i of dW is the sum over examples of
            (dL/dy_i) x, and entry i of db the sum of the dL/dy_i. Their ratio is an
            example itself if only one of them activates unit i [PMAC17; BLLF20].
            Any number of steps on one example keeps that true, and so does any clip.
gradient    Search images whose own gradient points where the update points:
            minimise 1 - cos(grad L(x), g) + weight * TV(x) by signed Adam [GBDM20].
            Labels are taken as known, which favours the attack.

Both see an update through its public support alone: coordinates that a sparsifier left
out are compared with nothing. Candidates are matched to the originals afterwards, with
the originals at hand, so that what is reported is the best that an attacker could pick.

[BLLF20] Boenisch et al., "When the Curious Abandon Honesty".
         https://arxiv.org/abs/2112.02918
[GBDM20] Geiping et al., "Inverting Gradients". https://arxiv.org/abs/2003.14053
[PMAC17] Phong et al., "Privacy-Preserving Deep Learning via Additively Homomorphic
         Encryption". https://eprint.iacr.org/2017/715
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcore.data import Inputs, Labels
from fedcore.vectors import RealVector

Images: TypeAlias = npt.NDArray[np.float32]
"""Shape [images, channels, height, width]."""

VARIATION_WEIGHT = 1e-3
"""Of the total variation; higher values blur images of few pixels."""
STEP = 0.05
"""Of Adam, in units of the range of a pixel."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The best match for every original.

    Attributes:
        images: In the order of the originals.
        correlation: Pearson's, of each with its original, in [-1, 1].
        psnr: Peak signal-to-noise ratio in dB, after the best brightness and contrast.
        attack: Which attack gave each.
    """

    images: Images = field(repr=False)
    correlation: npt.NDArray[np.float64]
    psnr: npt.NDArray[np.float64]
    attack: tuple[str, ...]


def analytic(model: nn.Module, update: RealVector, shape: tuple[int, ...]) -> Images:
    """Return one candidate for each unit of a dense first layer; none for other models.

    Args:
        model: The one that the update was computed from.
        update: What was observed, flat in the order of the model's state, shape [dim].
        shape: Of one image.
    """
    layers = [module for module in model.modules() if not list(module.children())]
    first = next((module for module in layers if list(module.parameters())), None)
    if not isinstance(first, nn.Linear):
        return np.zeros((0, *shape), np.float32)
    units, pixels = first.weight.shape
    weight = np.asarray(update[: units * pixels], np.float64).reshape(units, pixels)
    bias = np.asarray(update[units * pixels : units * (pixels + 1)], np.float64)
    # A unit that no example activates has only rounding and noise in its row.
    live = np.abs(bias) > 1e-3 * np.abs(bias).max(initial=0.0)
    with np.errstate(over="ignore"):
        found = (weight[live] / bias[live, np.newaxis]).astype(np.float32)
    usable: Images = found[np.isfinite(found).all(axis=1)].reshape(-1, *shape)
    return usable


def by_gradient(
    model: nn.Module,
    update: RealVector,
    labels: Labels,
    shape: tuple[int, ...],
    *,
    steps: int,
    seed: int,
    on_step: Callable[[], object],
) -> Images:
    """Return as many images as labels whose mean gradient points against the update.

    Args:
        model: The one that the update was computed from.
        update: What was observed, shape [dim].
        labels: Of the images to find.
        shape: Of one image.
        steps: How long to search.
        seed: Of the noise that the search starts from.
        on_step: Called after every step.
    """
    model.eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    wanted = -torch.from_numpy(np.asarray(update, np.float32))
    support = (wanted != 0).float()
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand((len(labels), *shape), generator=generator).requires_grad_()
    targets = torch.from_numpy(labels)
    moments = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, steps + 1):
        loss = cross_entropy(model(x), targets)
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        flat = torch.cat([part.flatten() for part in gradient]) * support
        distance = 1 - flat @ wanted / (flat.norm() * wanted.norm()).clamp(min=1e-20)
        (slope,) = torch.autograd.grad(distance + VARIATION_WEIGHT * _variation(x), x)
        with torch.no_grad():
            rate = STEP * (1 - (step - 1) / steps)
            x -= rate * _adam(moments, slope.sign(), step)
            x.clamp_(0, 1)
        on_step()
    result: Images = x.detach().numpy()
    return result


def best_matches(originals: Inputs, candidates: dict[str, Images]) -> Recovered:
    """Return for every original the candidate that correlates best with it."""
    names = [name for name, images in candidates.items() for _ in range(len(images))]
    found = np.concatenate(list(candidates.values()))
    table = _correlations(originals, found)
    chosen = table.argmax(axis=1)
    matched = np.stack(
        [_fitted(x, found[place]) for x, place in zip(originals, chosen, strict=True)]
    )
    error = ((matched - originals) ** 2).reshape(len(originals), -1).mean(axis=1)
    peak = np.ptp(originals.reshape(len(originals), -1), axis=1)
    return Recovered(
        matched,
        table[np.arange(len(originals)), chosen],
        10 * np.log10(peak**2 / error.clip(min=1e-10)),
        tuple(names[place] for place in chosen),
    )


def _correlations(originals: Inputs, found: Images) -> npt.NDArray[np.float64]:
    """Return Pearson's correlation of every original with every candidate."""

    def standard(images: Images) -> npt.NDArray[np.float64]:
        flat = images.reshape(len(images), -1).astype(np.float64)
        flat -= flat.mean(axis=1, keepdims=True)
        scaled: npt.NDArray[np.float64] = flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(
            min=1e-12
        )
        return scaled

    table: npt.NDArray[np.float64] = standard(originals) @ standard(found).T
    return table


def _fitted(original: Images, candidate: Images) -> Images:
    """Return the candidate with the brightness and contrast that suit the original best."""
    x, y = candidate.ravel().astype(np.float64), original.ravel().astype(np.float64)
    centred = x - x.mean()
    contrast = max(0.0, float(centred @ y)) / max(float(centred @ centred), 1e-12)
    fitted: Images = (y.mean() + contrast * centred).astype(np.float32).reshape(original.shape)
    return fitted


def _variation(x: Tensor) -> Tensor:
    return (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()) / 2


def _adam(moments: tuple[Tensor, Tensor], slope: Tensor, step: int) -> Tensor:
    """Return Adam's direction [KB15] and move its moments along (torch.optim loads slowly)."""
    first, second = moments
    first.mul_(0.9).add_(slope, alpha=0.1)
    second.mul_(0.999).addcmul_(slope, slope, value=0.001)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
