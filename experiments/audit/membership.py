"""Was a device in the training? Asked with shadow models [CCNSTT22].

Every shadow model is a run of the real pipeline, with its own weights, cohorts, noise
and masks. In each of them a fair coin decides for every device whether it trains or is
silent. A device's score in a model is the mean over its examples of

    log p / (1 - p),   p the model's probability of the right label,

which is about Gaussian. The attack knows the scores and coins of all models but one,
fits a Gaussian to the device's scores in the models with it, another to those in the
models without it, and takes the likelihood ratio of the score in the model under attack
(LiRA). Their spreads are shared by all devices, as [CCNSTT22, section VI-B] advises
for few shadow models. Each model is under attack once, which gives devices x models
pairs for the curve; a rate of false alarms below one over their number is not resolved.

The attack sees the final model only, and a member for a non-member is the very
difference that a device-level ledger bounds. The lower bound on epsilon is that of
[SNJ23] for the first model alone: its coins are fair, and the others' results are
independent of them.

[CCNSTT22] Carlini et al., "Membership Inference Attacks From First Principles".
           https://arxiv.org/abs/2112.03570
[SNJ23]    see `one_run`
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from experiments.audit.one_run import Bound, bound_from_scores
from experiments.audit.planted import Fleet, Silent, run_fleet
from experiments.audit.settings import MembershipSettings
from fedcore.job import Job, Preflight, check
from fedcore.models import build
from fedcore.training import one_thread, set_arrays

Scores: TypeAlias = npt.NDArray[np.float64]
"""Shape [models, devices]."""
Coins: TypeAlias = npt.NDArray[np.bool_]

FALSE_ALARMS = (0.001, 0.01, 0.1)
"""Rates at which the attack's hits are reported."""


@dataclass(frozen=True, slots=True)
class MembershipAudit:
    """The suite's result.

    Attributes:
        epsilon: What the ledger says of each run; infinite without noise.
        delta: At which all epsilons are stated.
        unit: Whom the ledger protects.
        accuracy: Of the models, mean.
        members: Pairs of a device and a model that it trained.
        strangers: Pairs of a device and a model that it did not train.
        false_alarms: Rates, ascending from 0 to 1: the curve's horizontal axis.
        hits: Rates of members that are recognised: its vertical axis.
        auc: Area under that curve; one half is chance.
        auc_error: Standard error of the area, devices taken as independent.
        balanced_accuracy: The best mean of both rates.
        bound: On epsilon, from the first model.
    """

    epsilon: float
    delta: float
    unit: str
    accuracy: float
    members: int
    strangers: int
    false_alarms: Scores = field(repr=False)
    hits: Scores = field(repr=False)
    auc: float
    auc_error: float
    balanced_accuracy: float
    bound: Bound

    def hits_at(self, rate: float) -> float:
        """Return the rate of hits at a rate of false alarms of at most `rate`."""
        return float(self.hits[np.searchsorted(self.false_alarms, rate, side="right") - 1])


@dataclass(frozen=True, slots=True)
class Shadow:
    """One model of the suite: small enough to be sent to another process.

    Attributes:
        job: Of the run that is audited, as JSON.
        seed: Of this model's run.
        silent: Devices that are no members.
        signed: Whether the devices are enrolled.
    """

    job: str
    seed: int
    silent: tuple[int, ...]
    signed: bool


@dataclass(frozen=True, slots=True)
class ShadowResult:
    """What one shadow model gives.

    Attributes:
        scores: Of every device, shape [devices].
        epsilon: Spent, by the run's ledger.
        delta: That goes with it.
        unit: Whom the ledger protects.
        accuracy: Of the final model.
    """

    scores: Scores = field(repr=False)
    epsilon: float
    delta: float
    unit: str
    accuracy: float


def audit_membership(
    job: Job, settings: MembershipSettings, *, signed: bool = False, quiet: bool = False
) -> MembershipAudit:
    """Train the shadow models and attack each with the help of the others.

    Args:
        job: The run to audit.
        settings: Of the suite.
        signed: Whether the devices are enrolled.
        quiet: Show no progress bar.

    Raises:
        ConfigurationError: The job cannot work.
    """
    coins = np.random.default_rng([settings.seed, 4]).random((settings.shadows, job.clients)) < 0.5
    described = job.to_json()
    _checked(described)  # before processes are forked, which then find it there
    shadows = [
        Shadow(described, job.seed + 1 + number, tuple(np.flatnonzero(~row).tolist()), signed)
        for number, row in enumerate(coins)
    ]
    results = list(_train(shadows, settings.processes, quiet=quiet))
    ratios = likelihood_ratios(np.stack([result.scores for result in results]), coins)
    false_alarms, hits, auc = curve(ratios.ravel(), coins.ravel())
    first = results[0]
    per_device = [curve(ratios[:, i], coins[:, i])[2] for i in range(job.clients)]
    return MembershipAudit(
        epsilon=first.epsilon,
        delta=first.delta,
        unit=first.unit,
        accuracy=float(np.mean([result.accuracy for result in results])),
        members=int(coins.sum()),
        strangers=int((~coins).sum()),
        false_alarms=false_alarms,
        hits=hits,
        auc=auc,
        auc_error=float(np.nanstd(per_device, ddof=1) / np.sqrt(job.clients)),
        balanced_accuracy=float(((hits + 1 - false_alarms) / 2).max()),
        bound=bound_from_scores(ratios[0], coins[0], first.delta),
    )


def train_shadow(shadow: Shadow) -> ShadowResult:
    """Run one shadow model and score every device's examples with it."""
    devices, preflight = _checked(shadow.job)
    fleet = Fleet(
        replace(devices, seed=shadow.seed, evaluate_every=devices.rounds),
        devices,
        preflight,
        dict.fromkeys(shadow.silent, Silent()),
    )
    trace = run_fleet(fleet, signed=shadow.signed, quiet=True)
    dataset = preflight.dataset
    model = build(fleet.job.model, dataset.input_shape, dataset.classes, fleet.job.seed)
    set_arrays(model, trace.arrays)
    scores = confidences(model, dataset.x_train, dataset.y_train)
    released = trace.ledger.releases
    return ShadowResult(
        np.array([scores[rows].mean() for rows in preflight.shards]),
        trace.ledger.epsilon,
        trace.ledger.delta,
        released[-1].unit if released else "device",
        trace.accuracy,
    )


def confidences(
    model: nn.Module, x: npt.NDArray[np.float32], y: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return log p / (1 - p) of the right label for every example, shape [n].

    It is computed from logits, where it is the right one's minus the log of the summed
    exponentials of the others: exact where p rounds to 1.
    """
    inputs = torch.from_numpy(x)
    with torch.inference_mode():
        parts = [model(inputs[start : start + 1000]) for start in range(0, len(x), 1000)]
        logits = torch.cat(parts)
        rows = torch.arange(len(logits))
        labels = torch.from_numpy(y)
        right = logits[rows, labels].double()
        others = logits.double().index_put((rows, labels), torch.tensor(-torch.inf).double())
        found: npt.NDArray[np.float64] = (right - others.logsumexp(1)).numpy()
    return found


def likelihood_ratios(scores: Scores, coins: Coins) -> Scores:
    """Return for every model the devices' log likelihood ratios, by all other models.

    Args:
        scores: Of every device in every model, shape [models, devices].
        coins: Whether the device trained it, same shape.

    Returns:
        Same shape; higher means that the device was a member.
    """
    with_it, without = coins.astype(np.float64), (~coins).astype(np.float64)
    log_in, log_out = (_leave_one_out(scores, weights) for weights in (with_it, without))
    ratios: Scores = log_in - log_out
    return ratios


def _leave_one_out(scores: Scores, weights: Scores) -> Scores:
    """Return each score's log density under the other models' Gaussian for its device.

    A device that no other model has on this side gets the mean over all devices.
    """
    densities = np.empty_like(scores)
    for left_out in range(len(scores)):
        kept = np.delete(weights, left_out, axis=0)
        values = np.delete(scores, left_out, axis=0)
        counts = kept.sum(axis=0)
        overall = (kept * values).sum() / max(kept.sum(), 1)
        means = np.where(counts, (kept * values).sum(axis=0) / counts.clip(min=1), overall)
        degrees = max(1.0, (counts - 1).clip(min=0).sum())
        variance = max(1e-12, (kept * (values - means) ** 2).sum() / degrees)
        # A mean of n scores is itself off by a variance of 1/n.
        spread = variance * (1 + 1 / counts.clip(min=1))
        gap = scores[left_out] - means
        densities[left_out] = -(gap**2) / (2 * spread) - np.log(2 * np.pi * spread) / 2
    return densities


def curve(scores: Scores, members: Coins) -> tuple[Scores, Scores, float]:
    """Return rates of false alarms and of hits over all thresholds, and the area under them.

    The area is NaN where there are only members, or none.
    """
    from sklearn.metrics import roc_curve  # noqa: PLC0415 - a second to import

    if members.all() or not members.any():
        return np.array([0.0, 1.0]), np.array([0.0, 1.0]), float("nan")
    false_alarms, hits, _ = roc_curve(members, scores, drop_intermediate=False)
    return false_alarms, hits, float(np.trapezoid(hits, false_alarms))


@lru_cache(maxsize=1)
def _checked(job: str) -> tuple[Job, Preflight]:
    """Return a job and its preflight; the data is read once a process."""
    described = Job.from_json(job)
    return described, check(described)


def _train(shadows: list[Shadow], processes: int, *, quiet: bool) -> Iterator[ShadowResult]:
    """Yield the results in the order of the shadows; show how long the rest takes."""
    one_thread()
    bar = tqdm(
        total=len(shadows),
        desc="membership",
        unit="model",
        disable=quiet,
        dynamic_ncols=True,
        file=sys.stderr,
    )
    with bar:
        if processes == 1:
            for shadow in shadows:
                yield train_shadow(shadow)
                bar.update()
            return
        # Forked, like the engine's workers: data and torch are shared, not loaded again.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(
            min(processes, len(shadows)), mp_context=context, initializer=_end_when_interrupted
        ) as pool:
            futures = [pool.submit(train_shadow, shadow) for shadow in shadows]
            for _ in as_completed(futures):
                bar.update()
            yield from (future.result() for future in futures)


def _end_when_interrupted() -> None:
    """Let Ctrl-C end this process without a word: the parent says what there is to say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
