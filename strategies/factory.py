"""From a strategy's description to Flower's own, unmodified strategy."""

from __future__ import annotations

from typing import Any, assert_never

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedcore.job import FedAvg, FedAvgM, FedOpt, FedProx, Robust, StrategyConfig


def build_strategy(config: StrategyConfig, *, cohort: int) -> Strategy:
    """Return the strategy, set to train everybody whom the grid shows.

    Args:
        config: Which one, and its numbers.
        cohort: How many clients a round has; 0 if that is left to chance.
    """
    everybody: dict[str, Any] = {
        "fraction_train": 1.0,
        "fraction_evaluate": 0.0,
        "min_train_nodes": cohort,
        "min_available_nodes": cohort,
    }
    match config:
        case FedAvg():
            return flower.FedAvg(**everybody)
        case FedAvgM(_, rate, momentum):
            return flower.FedAvgM(**everybody, server_learning_rate=rate, server_momentum=momentum)
        case FedProx(_, mu):
            return flower.FedProx(**everybody, proximal_mu=mu)
        case FedOpt():
            return _adaptive(config, everybody)
        case Robust("krum", malicious, _):
            return flower.Krum(**everybody, num_malicious_nodes=malicious)
        case Robust("fedtrimmedavg", _, beta):
            return flower.FedTrimmedAvg(**everybody, beta=beta)
        case Robust():
            return flower.FedMedian(**everybody)
        case _:
            assert_never(config)


def _adaptive(config: FedOpt, everybody: dict[str, Any]) -> Strategy:
    if config.kind == "fedadagrad":
        return flower.FedAdagrad(**everybody, eta=config.eta, tau=config.tau)
    kind = flower.FedAdam if config.kind == "fedadam" else flower.FedYogi
    return kind(
        **everybody, eta=config.eta, beta_1=config.beta_1, beta_2=config.beta_2, tau=config.tau
    )
