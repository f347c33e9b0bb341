"""Which strategies can work on a sum.

Secure aggregation reveals one weighted mean. A strategy that is linear in the
replies (FedAvg, FedProx) or that only post-processes their mean (FedAvgM, FedAdam,
FedYogi, FedAdagrad) gets from it exactly what it computes itself. One that compares,
sorts or selects single replies has nothing to work on, and says so before anything
is sent.
"""

from __future__ import annotations

import sys
from types import FrameType

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedcore.errors import ConfigurationError

_REASONS: tuple[tuple[str, str], ...] = (
    ("Bulyan", "it selects single updates by their distances to each other"),
    ("MultiKrum", "it selects single updates by their distances to each other"),
    ("Krum", "it selects a single update by its distances to the others"),
    ("FedMedian", "it takes the median of single updates"),
    ("FedTrimmedAvg", "it drops the largest and smallest of single updates"),
    ("QFedAvg", "it weighs single updates by their clients' losses"),
    ("FedXgbBagging", "it concatenates trees, which have no sum"),
    ("FedXgbCyclic", "it hands one client's trees to the next"),
    (
        "DifferentialPrivacyServerSideFixedClipping",
        "it clips single updates at the server; use the plan's clip and privacy instead",
    ),
    (
        "DifferentialPrivacyServerSideAdaptiveClipping",
        "it clips single updates at the server; use the plan's clip and privacy instead",
    ),
    (
        "DifferentialPrivacyClientSideFixedClipping",
        "it counts single updates to calibrate noise; use the plan's clip and privacy instead",
    ),
    (
        "DifferentialPrivacyClientSideAdaptiveClipping",
        "it reads single clients' clipping bits; use the plan's clip and privacy instead",
    ),
)


def refuse_nonlinear(strategy: object) -> None:
    """Check that `strategy` can work on one aggregated reply.

    A strategy of yours that cannot declares ``requires_individual_updates = True``.

    Raises:
        ConfigurationError: It needs the updates of individual clients.
    """
    reason = next(
        (why for name, why in _REASONS if isinstance(strategy, getattr(flower, name, ()))), None
    )
    if getattr(strategy, "requires_individual_updates", False):
        reason = "it declares requires_individual_updates"
    if reason is not None:
        msg = (
            f"{type(strategy).__name__} cannot run under secure aggregation: {reason}, but only "
            "their sum is ever revealed. Use FedAvg, FedProx, FedAvgM, FedAdam, FedYogi or "
            "FedAdagrad, or run it on the plain grid"
        )
        raise ConfigurationError(msg)


def calling_strategy() -> Strategy | None:
    """Return the strategy whose method is calling a grid; None outside of one.

    Flower hands a grid the messages, not their author: `Strategy.start` calls
    `grid.send_and_receive` without naming itself. Its frame is the only place where
    the strategy can be found, and finding it is what spares users a third line.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - see above
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Strategy):
            return candidate
        frame = frame.f_back
    return None
