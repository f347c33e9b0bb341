"""What clients say beside their vectors, and what follows from it for their sum.

    metrics    what the numbers in the tally's free slots are called
    part       of which class the device is, where the plan has classes

Both must fit together before anything is revealed: clients that call their metrics
differently have no common sum of them, and a weight that too few of the survivors have
trained is not summed at all (`fedcore.pipeline.shares`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message

from fedcore.errors import PeerProtocolError, RoundAbortedError
from fedcore.pipeline import (
    PART,
    RECORD,
    VECTOR,
    VECTOR_TYPE,
    BoundRound,
    ByClass,
    Trainers,
    agreed_names,
    trainers_of,
    typed,
)
from fedcore.pipeline.bound import FIXED_SLOTS
from fedcore.vectors import Layout, RealVector


@dataclass(slots=True)
class Contributions:
    """What was said in one round, by client.

    Attributes:
        bound: The round.
        layout: Of the model; needed if not every device trains all of it.
    """

    bound: BoundRound
    layout: Layout | None = None
    _names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    _classes: dict[int, int] = field(default_factory=dict)

    def read(self, client: int, reply: Message) -> bytes:
        """Return the bytes of an upload, and note what is said beside it.

        Raises:
            PeerProtocolError: It is malformed.
        """
        fields = record_of(reply)
        names = fields.get("metrics", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            msg = f"client {client} must name its metrics in a list of strings"
            raise PeerProtocolError(msg)
        slots = max(0, self.bound.tally.slots - FIXED_SLOTS)
        if len(names) > slots:
            msg = f"client {client} must name at most {slots} metrics, found {len(names)}"
            raise PeerProtocolError(msg)
        arrays = reply.content.array_records.get(f"{RECORD}.{VECTOR}")
        array = None if arrays is None else arrays.get(VECTOR)
        if array is None or array.stype != VECTOR_TYPE:
            msg = f"client {client} must send its vector as an array of type {VECTOR_TYPE!r}"
            raise PeerProtocolError(msg)
        shares = self.bound.plan.run.shares
        if isinstance(shares, ByClass):
            index = typed(fields, PART, int)
            if not 0 <= index < len(shares.widths):
                msg = f"client {client} must be of one of {len(shares.widths)} classes"
                raise PeerProtocolError(msg)
            self._classes[client] = index
        self._names[client] = tuple(str(name) for name in names)
        return array.data

    def names_of(self, clients: Iterable[int]) -> list[tuple[str, ...]]:
        """Return what these clients call their metrics."""
        return [self._names[client] for client in sorted(clients)]

    def factor_of(self, clients: Collection[int]) -> RealVector | None:
        """Return what makes a mean of each coordinate's sum; None if one number does for all."""
        trainers = self._trainers(clients)
        return None if trainers is None else trainers.factor

    def check(self, clients: Collection[int]) -> None:
        """Refuse a sum over these clients, before it is revealed.

        Raises:
            RoundAbortedError: They say what does not fit together, or too few of them have
                trained some weight.
        """
        agreed_names(self.names_of(clients))
        self.check_trainers(clients)

    def check_trainers(self, clients: Collection[int]) -> None:
        """Refuse a sum in which some weight was trained by too few of these clients.

        Raises:
            RoundAbortedError: As said.
        """
        trainers, shares = self._trainers(clients), self.bound.plan.run.shares
        if trainers is None or not isinstance(shares, ByClass):
            return
        if trainers.fewest < shares.least_trainers:
            raise RoundAbortedError(
                stage="uploading",
                needed=shares.least_trainers,
                found=trainers.fewest,
                reason="some weights were trained by too few devices to be summed",
            )

    def _trainers(self, clients: Iterable[int]) -> Trainers | None:
        """Return who trained which coordinate; None if all trained all."""
        if self.layout is None or not isinstance(self.bound.plan.run.shares, ByClass):
            return None
        classes = (self._classes[client] for client in clients)
        return trainers_of(self.bound.plan, self.layout, classes)


def record_of(reply: Message) -> ConfigRecord:
    """Return what a device answered.

    Raises:
        PeerProtocolError: It answered something else.
    """
    record = reply.content.config_records.get(RECORD)
    if record is None:
        msg = f"a reply must hold the record {RECORD!r}: is secagg_mod in the ClientApp's mods?"
        raise PeerProtocolError(msg)
    return record
