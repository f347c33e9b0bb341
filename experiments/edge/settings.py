"""What the processes of a board are told, in one file: written by `deploy node`, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final

from experiments.edge.pace import Pace
from fedcore.errors import ConfigurationError

FILE: Final = "board.json"
LOG: Final = "supernode.log"


@dataclass(frozen=True, slots=True)
class Settings:
    """A board.

    Attributes:
        superlink: Host and port of the coordinator.
        authority: File with the certificate of the TLS authority.
        node_key: File with the key that signs requests.
        state: Folder for what a restart must not forget, and the log.
        state_key: File with the key under which it is sealed.
        node_config: What apps are told of this device.
        pace: How often it asks for work.
        warm_seconds: How long an app stays loaded after its last message.
    """

    superlink: str
    authority: str
    node_key: str
    state: str
    state_key: str
    node_config: Mapping[str, str | int | float | bool]
    pace: Pace
    warm_seconds: float

    def __post_init__(self) -> None:
        """Check ranges."""
        if not (self.warm_seconds >= 0 and isfinite(self.warm_seconds)):
            msg = f"an app stays loaded for 0 seconds or longer, got {self.warm_seconds:g}"
            raise ConfigurationError(msg)

    def to_json(self) -> str:
        """Return the file."""
        return json.dumps({**asdict(self), "node_config": dict(self.node_config)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Read the file.

        Raises:
            ConfigurationError: It is no such file.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            return cls(**{**values, "pace": Pace(**values["pace"])})
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{FILE} must be a file of `deploy node` ({error}): start the node with it"
            raise ConfigurationError(msg) from error

    @property
    def log(self) -> Path:
        """Where the processes write."""
        return Path(self.state) / LOG
