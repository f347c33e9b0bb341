"""A whole run as one value, and what can be known about it before it starts."""

from fedcore.job.costs import Assessment, Cost, assess
from fedcore.job.levels import BothLevels, of_devices, of_examples
from fedcore.job.preflight import Preflight, check
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

__all__ = [
    "Assessment",
    "BothLevels",
    "Cost",
    "FedAvg",
    "FedAvgM",
    "FedOpt",
    "FedProx",
    "Job",
    "LocalHelper",
    "NoClip",
    "NoFaults",
    "NoQuantize",
    "Preflight",
    "RemoteHelper",
    "Robust",
    "StrategyConfig",
    "assess",
    "check",
    "explain",
    "of_devices",
    "of_examples",
]
