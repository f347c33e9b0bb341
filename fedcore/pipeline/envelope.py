"""What stands on the outside of a protocol message.

Coordinator and device exchange one flat record per stage. The protocol's own
bytes stay opaque in it: there is one parser for them, and the transport may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, TypeVar

from fedcore.errors import PeerProtocolError

RECORD: Final = "fedcore.secagg"
"""Name of the record in a message."""
VECTOR: Final = "vector"
"""Name of the array that carries an upload."""
BOX: Final = "box"
"""Name of the field that carries a sealed seed."""
PART: Final = "part"
"""Name of the field beside an upload that says of which class its device is; and of the record,
with a field of the same name, by which a train function says it."""
VECTOR_TYPE: Final = "fedcore/packed/v1"
"""Serialisation type of that array: bytes, one uint8 each."""

Stage: TypeAlias = Literal[
    "identify", "check_in", "advertise", "share", "upload", "endorse", "reveal"
]
STAGES: Final[tuple[Stage, ...]] = ("advertise", "share", "upload", "endorse", "reveal")
"""The stages of a round; a device answers each of them once."""
IDENTIFY: Final = "identify"
"""Before rounds of enrolled devices, and outside of them: who a node is."""
CHECK_IN: Final = "check_in"
"""Before buffers, and outside of them: train, keep the update, and say that it is there."""
Field: TypeAlias = str | int | bytes
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Envelope:
    """One request to a device.

    Attributes:
        stage: What the device is asked for.
        round_number: For logs and fault scripts; what counts is in the plan.
        label: The device's name in the fleet.
        plan: Canonical bytes of the round plan.
        message: Canonical bytes of the protocol message; empty in the clear.
        weight_key: Name of the metric that weighs the mean.
        counted: With error feedback and the stage `upload`, the last round of this run in
            which an upload of this device went into the model; 0 for none.
    """

    stage: Stage
    round_number: int
    label: str
    plan: bytes = field(repr=False)
    message: bytes = field(repr=False)
    weight_key: str
    counted: int = 0

    def to_fields(self) -> dict[str, Field]:
        """Return the entries of the record."""
        return {
            "stage": self.stage,
            "round": self.round_number,
            "label": self.label,
            "plan": self.plan,
            "message": self.message,
            "weight-key": self.weight_key,
            "counted": self.counted,
        }

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> Envelope:
        """Return the envelope that a record holds.

        Raises:
            PeerProtocolError: An entry is missing or of the wrong type.
        """
        stage = typed(fields, "stage", str)
        known = (*STAGES, IDENTIFY, CHECK_IN)
        if stage not in known:
            msg = f"stage must be one of {known}, found {stage!r:.40}"
            raise PeerProtocolError(msg)
        return cls(
            stage=stage,
            round_number=typed(fields, "round", int),
            label=typed(fields, "label", str),
            plan=typed(fields, "plan", bytes),
            message=typed(fields, "message", bytes),
            weight_key=typed(fields, "weight-key", str),
            counted=typed(fields, "counted", int),
        )


def typed(fields: Mapping[str, object], name: str, kind: type[T]) -> T:
    """Return the entry `name`, which must be of type `kind`.

    Raises:
        PeerProtocolError: It is missing or of another type.
    """
    value = fields.get(name)
    if not isinstance(value, kind):
        msg = (
            f"record {RECORD!r} must hold {name!r} as {kind.__name__}, found {type(value).__name__}"
        )
        raise PeerProtocolError(msg)
    return value
