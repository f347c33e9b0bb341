"""The update that a device has trained, and keeps until its buffer is added up.

In asynchronous training a device works while others are asked for their sums: it trains,
keeps what changed, and checks in. Later it is invited to a buffer, for which it encodes,
masks and sends what it kept. Beside the update it keeps the digest of the model that it
trained from, from which its staleness follows.

An update leaves its device once. It is forgotten as it is taken, before anything is sent:
two sums with the very same update, over members that differ by one, would show that one.
If the buffer is given up after that, the update is lost, and the device waits to be asked
to train again. It is kept in Flower's Context, in the memory of the node, and is gone
with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context

from fedcore.errors import PeerProtocolError
from fedcore.pipeline import Layer, LocalUpdate, typed
from fedcore.vectors import Layout

_TRAINED: Final = "fedcore.trained"
_UPDATE: Final = f"{_TRAINED}/update"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a device has to give.

    Attributes:
        model_digest: Of the model that it trained from.
        layers: Of that model.
        update: What came of it.
    """

    model_digest: str
    layers: tuple[Layer, ...]
    update: LocalUpdate = field(repr=False)


class KeptUpdate:
    """A node's update in its Context."""

    def __init__(self, context: Context) -> None:
        self._records = context.state

    def keep(self, digest: str, layout: Layout, update: LocalUpdate) -> None:
        """Keep what was trained, in place of what was kept before."""
        self._records[_TRAINED] = ConfigRecord(
            {
                "model": digest,
                "layers": [entry.name for entry in layout.entries],
                "sizes": [entry.size for entry in layout.entries],
                "examples": update.examples,
                "metrics": list(update.metrics),
                "values": [float(value) for value in update.metrics.values()],
            }
        )
        delta = Array(update.delta.astype(np.float32))
        self._records[_UPDATE] = ArrayRecord({"delta": delta})

    def check(self) -> None:
        """Refuse a buffer for which there is nothing.

        Raises:
            PeerProtocolError: Nothing was trained, or it was sent before.
        """
        if _TRAINED not in self._records.config_records:
            msg = (
                "this device has no update to give, and gives each only once: ask it to train "
                "again, and invite it to a buffer then"
            )
            raise PeerProtocolError(msg)

    def take(self) -> Trained:
        """Return what was trained, and forget it.

        Raises:
            PeerProtocolError: As `check`.
        """
        self.check()
        kept = self._records.config_records[_TRAINED]
        names, values = typed(kept, "metrics", list), typed(kept, "values", list)
        layers, sizes = typed(kept, "layers", list), typed(kept, "sizes", list)
        delta = self._records.array_records[_UPDATE]["delta"].numpy()
        del self._records[_TRAINED], self._records[_UPDATE]
        return Trained(
            model_digest=typed(kept, "model", str),
            layers=tuple(Layer(name, size) for name, size in zip(layers, sizes, strict=True)),
            update=LocalUpdate(
                delta, typed(kept, "examples", int), dict(zip(names, values, strict=True))
            ),
        )
