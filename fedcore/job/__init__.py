"""A whole run as one value, and what can be known about it before it starts."""

from fedcore.job.backoff import BackOff, ExponentialBackOff, NoBackOff
from fedcore.job.costs import Assessment, Cost, assess
from fedcore.job.devices import DeviceClass, Devices, Equal, Mixed, Profile
from fedcore.job.levels import BothLevels, of_devices, of_examples
from fedcore.job.optimisation import (
    Int8Aware,
    NoDistillation,
    NoQat,
    ReleaseTeacher,
    trains_for_int8,
)
from fedcore.job.preflight import Preflight, check
from fedcore.job.sampling import Everyone, FixedSize, Poisson, SamplingConfig
from fedcore.job.schedule import Buffered, Rounds
from fedcore.job.settings import (
    FedAvg,
    FedAvgM,
    FedOpt,
    FedProx,
    Job,
    LocalHelper,
    NoClip,
    NoFaults,
    NoQuantize,
    RemoteHelper,
    Robust,
    StrategyConfig,
    explain,
)
from fedcore.job.teacher import open_teacher

__all__ = [
    "Assessment",
    "BackOff",
    "BothLevels",
    "Buffered",
    "Cost",
    "DeviceClass",
    "Devices",
    "Equal",
    "Everyone",
    "ExponentialBackOff",
    "FedAvg",
    "FedAvgM",
    "FedOpt",
    "FedProx",
    "FixedSize",
    "Int8Aware",
    "Job",
    "LocalHelper",
    "Mixed",
    "NoBackOff",
    "NoClip",
    "NoDistillation",
    "NoFaults",
    "NoQat",
    "NoQuantize",
    "Poisson",
    "Preflight",
    "Profile",
    "ReleaseTeacher",
    "RemoteHelper",
    "Robust",
    "Rounds",
    "SamplingConfig",
    "StrategyConfig",
    "assess",
    "check",
    "explain",
    "of_devices",
    "of_examples",
    "open_teacher",
    "trains_for_int8",
]
