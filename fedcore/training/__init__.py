"""Local training and evaluation; torch and opacus are loaded when a function is first used."""

from importlib import import_module
from typing import TYPE_CHECKING

from fedcore.training.settings import (
    Evaluation,
    ExampleLevelPrivacy,
    ExampleLevelReport,
    LocalTraining,
    TrainReport,
)

if TYPE_CHECKING:
    from fedcore.training.arrays import get_arrays, set_arrays
    from fedcore.training.evaluation import evaluate
    from fedcore.training.example_level import example_level_epsilon, train_example_level
    from fedcore.training.fake_quantize import fake_int8
    from fedcore.training.objectives import SoftTargets
    from fedcore.training.sgd import one_thread, train

__all__ = [
    "Evaluation",
    "ExampleLevelPrivacy",
    "ExampleLevelReport",
    "LocalTraining",
    "SoftTargets",
    "TrainReport",
    "evaluate",
    "example_level_epsilon",
    "fake_int8",
    "get_arrays",
    "one_thread",
    "set_arrays",
    "train",
    "train_example_level",
]

_HOMES = {
    "SoftTargets": "objectives",
    "evaluate": "evaluation",
    "example_level_epsilon": "example_level",
    "fake_int8": "fake_quantize",
    "get_arrays": "arrays",
    "one_thread": "sgd",
    "set_arrays": "arrays",
    "train": "sgd",
    "train_example_level": "example_level",
}


def __getattr__(name: str) -> object:
    """Import what needs torch when it is asked for [PEP 562]."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
