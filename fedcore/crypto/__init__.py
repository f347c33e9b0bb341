"""Primitives: entropy, key agreement, authenticated encryption, masks, shares, signatures."""

from fedcore.crypto.aead import TAG_BYTES, seal, unseal
from fedcore.crypto.agreement import (
    KEY_BYTES,
    AgreeAll,
    Agreement,
    Exchange,
    KeyPair,
    agree,
    agree_all,
    check_public_key,
)
from fedcore.crypto.entropy import Entropy, ReplayedEntropy, SystemEntropy, generator
from fedcore.crypto.parallel import ParallelMasks
from fedcore.crypto.parallel_keys import ParallelAgreement
from fedcore.crypto.shamir import SECRET_BYTES, SHARE_BYTES, check_share, combine, split
from fedcore.crypto.streams import SEED_BYTES, AddMasks, Mask, add_masks, expand
from fedcore.crypto.transcript import DIGEST_BYTES, transcript_hash

__all__ = [
    "DIGEST_BYTES",
    "KEY_BYTES",
    "SECRET_BYTES",
    "SEED_BYTES",
    "SHARE_BYTES",
    "TAG_BYTES",
    "AddMasks",
    "AgreeAll",
    "Agreement",
    "Entropy",
    "Exchange",
    "KeyPair",
    "Mask",
    "ParallelAgreement",
    "ParallelMasks",
    "ReplayedEntropy",
    "SystemEntropy",
    "add_masks",
    "agree",
    "agree_all",
    "check_public_key",
    "check_share",
    "combine",
    "expand",
    "generator",
    "seal",
    "split",
    "transcript_hash",
    "unseal",
]
