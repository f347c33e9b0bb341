"""Small runs to audit."""

from dataclasses import replace
from typing import Any

from fedcore.codec import Clip
from fedcore.data import Dirichlet, Iid
from fedcore.job import Job
from fedcore.models import Logistic, Mlp
from fedcore.pipeline import Modular, NoSecAgg, Uniform
from fedcore.privacy import DistributedGaussian
from fedcore.training import LocalTraining

JOB = Job(
    model=Mlp(hidden=(64,)),
    partition=Iid(),
    clients=4,
    clients_per_round=4,
    rounds=3,
    training=LocalTraining(epochs=1, batch_size=0, learning_rate=0.3),
    clip=Clip(0.1),
    quantize=Modular(16),
    weighting=Uniform(),
    dropout=0.2,
    secagg=NoSecAgg(),
)
SKEWED = replace(
    JOB,
    model=Logistic(),
    partition=Dirichlet(alpha=0.1),
    clients=16,
    clients_per_round=16,
    rounds=2,
    training=LocalTraining(epochs=5, batch_size=20, learning_rate=0.5),
    clip=Clip(10.0),
)


def noisy(job: Job, noise_multiplier: float, **changes: Any) -> Job:
    """Return the job with noise."""
    privacy = DistributedGaussian(noise_multiplier=noise_multiplier, delta=1e-3)
    return replace(job, privacy=privacy, **changes)
