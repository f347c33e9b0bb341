"""Decoders of updates and models: what devices upload without masks, and what they download."""

from functools import partial

import numpy as np

from fedcore.codec import Broadcast, Qsgd, SparseTernary, TopK, apply_update
from fedcore.codec.lossless import (
    decode_integers,
    decode_positions,
    encode_integers,
    encode_positions,
)
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import PeerProtocolError
from fedcore.pipeline.download import Download
from fedcore.vectors import Entry, Layout
from tests.fuzz.law import Target

ENTROPY = ReplayedEntropy(b"fuzz updates")
LAYERS = (20, 3, 17)
DIM = sum(LAYERS)


def update_targets() -> list[Target]:
    """All of this file."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=DIM).astype(np.float32)
    integers = [np.rint(scale * x).astype(np.int64) for scale in (0.2, 1.0, 20.0)]
    target = partial(Target, error=PeerProtocolError)
    return [
        target(
            "integers",
            [encode_integers(vector) for vector in integers],
            partial(decode_integers, dim=DIM),
        ),
        target(
            "positions",
            [encode_positions(np.arange(0, DIM, step)) for step in (1, 3, 9)],
            partial(decode_positions, dim=DIM),
        ),
        *(
            target(
                f"update by {compressor.kind}",
                [compressor.compress(x, ENTROPY), compressor.compress(-x, ENTROPY)],
                partial(compressor.decompress, dim=DIM),
            )
            for compressor in (TopK(0.2), SparseTernary(0.2), Qsgd(4, 16))
        ),
        *_models(x),
        target(
            "download",
            [_layout(Download("arrays", Layout((Entry("w", (2, 3), "float32"),)), bytes(32), b""))],
            _read_layout,
            text=True,
        ),
    ]


def _models(x: np.ndarray) -> list[Target]:
    first = Broadcast.of(LAYERS, 4).towards(x)
    last = first.towards(x + np.float32(0.1)).towards(x - np.float32(0.2))
    return [
        Target(
            "changes of a model",
            [last.update_from(first.version)],
            lambda data: apply_update(first.model, data, LAYERS, last.version),
            PeerProtocolError,
        ),
        Target(
            "whole model",
            [last.update_from(bytes(32)), last.update_from(last.origin)],
            lambda data: apply_update(None, data, LAYERS, last.version),
            PeerProtocolError,
        ),
    ]


def _layout(download: Download) -> bytes:
    return str(download.to_fields()["layout"]).encode()


def _read_layout(data: bytes) -> Download:
    fields = {"name": "arrays", "layout": data.decode("latin-1"), "version": bytes(32)}
    return Download.from_fields(fields, b"")
