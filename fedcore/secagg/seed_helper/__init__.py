"""Secure aggregation with a second party: one upload per client, dropouts cost nothing."""

from fedcore.secagg.seed_helper.coordinator import (
    AwaitingInputs,
    AwaitingMaskSum,
    collect,
    unmask,
)
from fedcore.secagg.seed_helper.device import SealedInput, mask_and_seal
from fedcore.secagg.seed_helper.helper import AwaitingBoxes, Closed, open_round
from fedcore.secagg.seed_helper.loopback import run_helper_round
from fedcore.secagg.seed_helper.messages import CloseRequest, MaskSum, SeedBox, Voucher
from fedcore.secagg.seed_helper.plan import HelperPlan

__all__ = [
    "AwaitingBoxes",
    "AwaitingInputs",
    "AwaitingMaskSum",
    "CloseRequest",
    "Closed",
    "HelperPlan",
    "MaskSum",
    "SealedInput",
    "SeedBox",
    "Voucher",
    "collect",
    "mask_and_seal",
    "open_round",
    "run_helper_round",
    "unmask",
]
