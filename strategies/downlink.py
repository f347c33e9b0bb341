"""Which version of the global model each node has, and what it is sent next.

The strategy's model and the one that devices train from differ by what rounding the last
deltas lost; `Broadcast` makes up for it later. Which version a node has, the coordinator
infers from its last upload. If it is wrong (the node was replaced, its memory was lost or
damaged), the node says so and gets the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedcore.codec import Broadcast, Delta
from fedcore.codec.broadcast import NO_VERSION
from fedcore.pipeline.download import DOWNLOAD, MODEL, UPDATE, UPDATE_TYPE, Download
from fedcore.vectors import Layout
from strategies.grid_state import DownlinkState

Arrays = Mapping[str, npt.NDArray[Any]]


class Downlink:
    """The state of all nodes' models.

    Args:
        config: How deltas are rounded.
    """

    def __init__(self, config: Delta) -> None:
        self._config = config
        self._layout: Layout | None = None
        self._broadcast: Broadcast | None = None
        self._versions: dict[int, bytes] = {}

    @classmethod
    def restored(cls, config: Delta, state: DownlinkState | None) -> Downlink:
        """Return what goes on from `state`; None for the start."""
        downlink = cls(config)
        if state is not None:
            downlink._layout, downlink._broadcast = state.layout, state.broadcast
            downlink._versions = dict(state.versions)
        return downlink

    @property
    def state(self) -> DownlinkState | None:
        """What `restored` goes on from; None before the first model."""
        if self._broadcast is None or self._layout is None:
            return None
        return DownlinkState(self._layout, self._broadcast, dict(self._versions))

    def publish(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the model that devices train from: as near to `arrays` as one delta brings them.

        Raises:
            ConfigurationError: `arrays` hold numbers that are not finite.
        """
        layout = Layout.of(arrays)
        if self._broadcast is None or layout != self._layout:
            sizes = tuple(entry.size for entry in layout.entries)
            self._layout, self._broadcast = layout, Broadcast.of(sizes, self._config.bits)
        self._broadcast = self._broadcast.towards(layout.flatten(arrays))
        return layout.unflatten(self._broadcast.model)

    def content(self, content: RecordDict, name: str) -> ModelDownload:
        """Return what a round sends instead of the record `name` of `content`."""
        if self._broadcast is None or self._layout is None:
            msg = "publish a model first"
            raise RuntimeError(msg)
        return ModelDownload(content, name, self._layout, self._broadcast, self._versions)


class ModelDownload:
    """One round's messages to nodes with different versions."""

    def __init__(
        self,
        content: RecordDict,
        name: str,
        layout: Layout,
        broadcast: Broadcast,
        versions: dict[int, bytes],
    ) -> None:
        self._rest = {key: record for key, record in content.items() if key != name}
        self._name = name
        self._layout = layout
        self._broadcast = broadcast
        self._versions = versions
        self._update_from = cache(broadcast.update_from)

    def for_node(self, node_id: int, *, whole: bool = False) -> RecordDict:
        """Return what the node is sent: an update of what it has, or the `whole` model."""
        base = NO_VERSION if whole else self._versions.get(node_id, self._broadcast.origin)
        data = self._update_from(base)
        download = Download(self._name, self._layout, self._broadcast.version, data)
        array = Array(dtype="uint8", shape=(len(data),), stype=UPDATE_TYPE, data=data)
        return RecordDict(
            {
                **self._rest,
                DOWNLOAD: ConfigRecord(dict(download.to_fields())),
                MODEL: ArrayRecord({UPDATE: array}),
            }
        )

    def answered(self, node_id: int, *, has_model: bool) -> None:
        """Note that the node answered, and whether it could make the round's model."""
        if has_model:
            self._versions[node_id] = self._broadcast.version
        else:
            self._versions.pop(node_id, None)
