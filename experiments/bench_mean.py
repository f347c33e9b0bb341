"""Means of random vectors under noise: what integers and few bits cost over a Gaussian.

The experiment of [KLS21, section 5.1], with the numbers of the authors' script [F]: vectors
of norm 10, uniform on the sphere, delta 1e-5, epsilon from 0.75 to 6; here 100 clients with
250 coordinates. Each point goes through the real thing: `make_upload` clips, rotates,
rounds and adds a share of noise on every client, masks are added and removed by a whole
round of the protocol, `decode_sum` makes the mean.

Repetitions have vectors, rotations, rounding and noise of their own. They share one round of
the protocol, laid end to end in one long vector: the sum is exact, so nothing about it
depends on its company, and agreeing on keys is what takes the time.

The rival is the central continuous Gaussian at the same epsilon by the same accounting,
drawn in the same run. Nobody is lost, so the noise is not increased for losses.

[KLS21] Kairouz, Liu and Steinke, https://arxiv.org/abs/2102.06387
[F]     google-research/federated, distributed_discrete_gaussian/dme_run.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import hypot, sqrt
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.codec import Clip
from fedcore.crypto import ReplayedEntropy
from fedcore.crypto.entropy import generator
from fedcore.errors import ConfigurationError, LocalProtocolError
from fedcore.pipeline import (
    BoundRound,
    LocalUpdate,
    Modular,
    RoundPlan,
    RunPlan,
    Uniform,
    bind_round,
    decode_sum,
    make_upload,
)
from fedcore.privacy import DistributedGaussian, DistributedSkellam, noise_multiplier_for
from fedcore.privacy.accounting import Curve, gaussian
from fedcore.secagg.loopback import run_round

Row: TypeAlias = dict[str, str | int | float]
Reals: TypeAlias = npt.NDArray[np.float64]

CLIENTS: Final = 100
DIM: Final = 250
NORM: Final = 10.0
DELTA: Final = 1e-5
MECHANISMS: Final = {
    "distributed_gaussian": DistributedGaussian,
    "distributed_skellam": DistributedSkellam,
}


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured.

    Attributes:
        epsilons: Privacy of one mean.
        bits: Widths of the ring.
        repetitions: Means for each point.
    """

    epsilons: tuple[float, ...]
    bits: tuple[int, ...]
    repetitions: int


SIZES: Final[dict[str, Size]] = {
    "quick": Size(epsilons=(0.75, 2.0, 6.0), bits=(10, 12, 16), repetitions=100),
    "full": Size(
        epsilons=(0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0),
        bits=(10, 12, 14, 16, 18),
        repetitions=200,
    ),
}


@dataclass(frozen=True, slots=True)
class Errors:
    """Mean squared errors of repeated means.

    Attributes:
        values: One for each repetition, shape [repetitions].
        noise_multiplier: Noise over the sensitivity, rounding counted.
    """

    values: Reals
    noise_multiplier: float

    @property
    def mean(self) -> float:
        """Mean over the repetitions."""
        return float(self.values.mean())

    @property
    def halfwidth(self) -> float:
        """Half of the 95 % confidence interval of `mean`, by Student's t."""
        from scipy.stats import t  # noqa: PLC0415 - half a second to import

        count = len(self.values)
        spread = float(self.values.std(ddof=1)) / sqrt(count)
        return float(t.ppf(0.975, count - 1)) * spread


def measure_means(size: str = "quick", seed: int = 0) -> list[Row]:
    """Return one row for each mechanism, width and epsilon.

    Args:
        size: ``"quick"`` (two minutes) or ``"full"`` (a quarter of an hour).
        seed: Of vectors, rotations, rounding and noise.

    Raises:
        ConfigurationError: There is no such size.
    """
    if size not in SIZES:
        msg = f"size must be one of {', '.join(SIZES)}, got {size!r}"
        raise ConfigurationError(msg)
    chosen = SIZES[size]
    rows = []
    for budget in chosen.epsilons:
        central = central_errors(budget, chosen.repetitions, seed)
        for kind in MECHANISMS:
            for bits in chosen.bits:
                ours = secure_errors(kind, bits, budget, chosen.repetitions, seed)
                rows.append(_row(kind, bits, budget, ours, central))
    return rows


def _row(kind: str, bits: int, budget: float, ours: Errors, central: Errors) -> Row:
    ratio = ours.mean / central.mean
    # Relative errors of independent means add in squares.
    doubt = ratio * hypot(ours.halfwidth / ours.mean, central.halfwidth / central.mean)
    return {
        "mechanism": kind,
        "bits": bits,
        "epsilon": budget,
        "noise_multiplier": round(ours.noise_multiplier, 5),
        "mse": round(ours.mean, 8),
        "mse_95": round(ours.halfwidth, 8),
        "central_mse": round(central.mean, 8),
        "central_mse_95": round(central.halfwidth, 8),
        "ratio": round(ratio, 4),
        "ratio_95": round(doubt, 4),
        "repetitions": len(ours.values),
    }


def vectors(repetition: int, seed: int) -> Reals:
    """Return what the clients hold in one repetition, [clients, dim], of norm `NORM`."""
    rng = generator(_entropy(seed).child(f"repetition={repetition}"), "vectors")
    x = rng.standard_normal((CLIENTS, DIM))
    scaled: Reals = x * (NORM / np.linalg.norm(x, axis=1, keepdims=True))
    return scaled


def central_errors(budget: float, repetitions: int, seed: int) -> Errors:
    """Return the errors of a trusted party that adds continuous Gaussian noise to the sum."""
    noise = noise_multiplier_for(budget, DELTA, rounds=1, curve=gaussian)
    rng = generator(_entropy(seed).child(f"central={budget:g}"), "noise")
    errors = []
    for repetition in range(repetitions):
        total = vectors(repetition, seed).sum(axis=0)
        noisy = total + rng.normal(scale=noise * NORM, size=DIM)
        errors.append(np.square((noisy - total) / CLIENTS).mean())
    return Errors(np.array(errors), noise)


def secure_errors(kind: str, bits: int, budget: float, repetitions: int, seed: int) -> Errors:
    """Return the errors of secure sums with noise in shares.

    Args:
        kind: Of the mechanism.
        bits: Of the ring.
        budget: Epsilon of one mean.
        repetitions: How many means.
        seed: Of all that is drawn.

    Raises:
        ConfigurationError: Signal and noise do not fit the ring.
        LocalProtocolError: The sum lost a client.
    """
    noise = noise_for(kind, bits, budget)
    entropy = _entropy(seed).child(f"{kind},bits={bits},epsilon={budget:g}")
    uploads: list[list[npt.NDArray[np.unsignedinteger]]] = [[] for _ in range(CLIENTS)]
    for repetition in range(repetitions):
        bound = bound_round(kind, bits, noise, repetition)
        for client, x in enumerate(vectors(repetition, seed)):
            source = entropy.child(f"repetition={repetition}").child(f"client={client}")
            update = LocalUpdate(x.astype(np.float32), 1, {})
            uploads[client].append(make_upload(bound, update, None, source).vector)
    bound = bound_round(kind, bits, noise, 0)
    if bound.secagg is None:
        msg = "the plan has no parameters for masks"
        raise LocalProtocolError(msg)
    plan = replace(bound.secagg, dim=repetitions * bound.dim)
    inputs = {client: np.concatenate(parts) for client, parts in enumerate(uploads)}
    outcome = run_round(inputs, plan, entropy=entropy.child("protocol"))
    if len(outcome.survivors) < CLIENTS:
        msg = f"expected {CLIENTS} clients in the sum, found {len(outcome.survivors)}"
        raise LocalProtocolError(msg)
    errors = []
    for repetition, total in enumerate(outcome.total.reshape(repetitions, bound.dim)):
        bound = bound_round(kind, bits, noise, repetition)
        mean = decode_sum(bound, total, CLIENTS, [()]).delta
        errors.append(np.square(mean - vectors(repetition, seed).mean(axis=0)).mean())
    return Errors(np.array(errors), noise)


def noise_for(kind: str, bits: int, budget: float) -> float:
    """Return the least noise multiplier whose sum costs at most epsilon `budget`.

    More noise leaves less of the ring for the signal, and the coarser rounding costs
    again: the whole round is put together for every noise that is tried.
    """
    return noise_multiplier_for(budget, DELTA, rounds=1, curve=partial(_curve, kind, bits))


def _curve(kind: str, bits: int, noise: float) -> Curve:
    try:
        return bound_round(kind, bits, noise, 0).release(CLIENTS).curve
    except ConfigurationError:
        if noise >= 1:
            raise
        return np.full_like(gaussian(1.0), np.inf)  # shares below the theorem's least sigma


def bound_round(kind: str, bits: int, noise: float, repetition: int) -> BoundRound:
    """Return one repetition's round put together: a rotation of its own, nobody may be lost."""
    run = RunPlan(
        clip=Clip(NORM),
        quantize=Modular(bits),
        privacy=MECHANISMS[kind](noise_multiplier=noise, delta=DELTA),
        weighting=Uniform(),
        dropout=0.0,
        metric_slots=0,
    )
    plan = RoundPlan(
        run=run,
        run_id="mean",
        round_number=repetition + 1,
        attempt=1,
        clients=CLIENTS,
        dim=DIM,
        model_digest="",
    )
    return bind_round(plan)


def expected_central_mse(budget: float) -> float:
    """Return what `central_errors` has in expectation: (noise * norm / clients)^2."""
    return (noise_multiplier_for(budget, DELTA, rounds=1) * NORM / CLIENTS) ** 2


def draw_means(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return a PNG: errors and their ratio to the central Gaussian's, against epsilon."""
    from experiments.plots_privacy import (  # noqa: PLC0415 - with the first picture
        Band,
        Panel,
        errors_over_epsilon,
    )

    def band(kind: str, bits: int, value: str) -> list[Band]:
        return [
            Band(
                x=float(str(row["epsilon"])),
                y=float(str(row[value])),
                halfwidth=float(str(row[f"{value}_95"])),
            )
            for row in rows
            if row["mechanism"] == kind and row["bits"] == bits
        ]

    widths = sorted({int(str(row["bits"])) for row in rows})
    return errors_over_epsilon(
        [
            Panel(
                title=kind.replace("_", " "),
                errors={bits: band(kind, bits, "mse") for bits in widths},
                ratios={bits: band(kind, bits, "ratio") for bits in widths},
                central=band(kind, widths[0], "central_mse"),
            )
            for kind in MECHANISMS
        ]
    )


def _entropy(seed: int) -> ReplayedEntropy:
    return ReplayedEntropy(str(seed).encode()).child("bench_mean")
