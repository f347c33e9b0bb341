"""A run plan for one round and cohort: what all of its keys are bound to.

Devices receive a `RoundPlan` as canonical JSON, check it against their own minimums, and
derive from its digest every key of the round: devices that were told different things share
no key.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedcore.crypto import transcript_hash
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.pipeline.buffer import Buffer, check_buffered
from fedcore.pipeline.choices import check_key
from fedcore.pipeline.clipping import (
    AdaptiveClip,
    Layer,
    check_layers,
    check_state,
)
from fedcore.pipeline.plan import RunPlan
from fedcore.privacy import stated_noise

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_EXACT = 2**53
"""Below it a float that is whole is the integer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """A run plan for one round, cohort and model.

    Attributes:
        run: What all rounds have in common.
        run_id: Names the run.
        round_number: 1-based.
        attempt: 1-based; a round that was aborted is tried again as the next attempt.
        clients: How many are invited.
        dim: Length of the flat update.
        model_digest: SHA-256 of the model that the clients train from, in hex.
        roster: Hash of the invited devices' identity keys, in hex (see
            `fedcore.secagg.seating`); empty if they do not sign, or are not known yet.
        clip_norm: What an adaptive clip has come to; None for any other.
        layers: Of the model, in the order of the flat update, where each has a bound of
            its own or small ones are sent whole; empty otherwise.
        support: The coordinates of sparsify=public_top_k; empty for all others.
        buffer: Which versions of the model the members trained from, where they differ; None
            in a round, where all have the model of `model_digest`.
    """

    run: RunPlan
    run_id: str
    round_number: int
    attempt: int
    clients: int
    dim: int
    model_digest: str
    roster: str = ""
    clip_norm: float | None = None
    layers: tuple[Layer, ...] = ()
    support: str = ""
    buffer: Buffer | None = None

    def __post_init__(self) -> None:
        for name, value, low in (
            ("round_number", self.round_number, 1),
            ("attempt", self.attempt, 1),
            ("clients", self.clients, 1),
            ("dim", self.dim, 1),
        ):
            if not low <= value < 1 << 48:
                msg = f"{name} must be in {low}..2^48, got {value}"
                raise ConfigurationError(msg)
        if self.roster:
            check_key("roster", self.roster)
        stated_noise(self.run.privacy)  # what travels to devices always names its noise

        check_state(self.run.clip, self.clip_norm)
        check_layers(self.layers, self.dim, needed=self.run.names_layers)
        if self.buffer is not None:
            self._check_buffer(self.buffer)

    def _check_buffer(self, buffer: Buffer) -> None:
        check_buffered(self.run)
        if len(buffer.staleness) != self.clients or buffer.versions[0] != self.model_digest:
            msg = (
                f"a buffer must have {self.clients} seats, and the current model as its first "
                f"version, found {len(buffer.staleness)} seats: make it from the same cohort"
            )
            raise ConfigurationError(msg)

    @property
    def norm(self) -> float:
        """Bound on the l2 norm of what a client sends of its update."""
        clip = self.run.clip
        if isinstance(clip, AdaptiveClip):
            return clip.initial if self.clip_norm is None else self.clip_norm
        return clip.norm

    def to_bytes(self) -> bytes:
        """Return canonical JSON: equal plans give equal bytes."""
        return canonical_json(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundPlan:
        """Return the plan that `data` encodes.

        Raises:
            PeerProtocolError: Not the canonical encoding of a valid plan.
        """
        return _parse(data)

    def digest(self) -> bytes:
        """Return the 32 bytes that every key of the round is bound to."""
        return transcript_hash("fedcore/v1/round-plan", self.to_bytes())

    def stage_seed(self, stage: str) -> int:
        """Return a public 63-bit seed, fresh for this round and stage."""
        label = f"{self.run.seed}/{self.round_number}/{stage}".encode()
        return int.from_bytes(transcript_hash("fedcore/v1/stage-seed", label)[:8], "little") >> 1


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: equal values give equal text.

    Whole numbers lose their point, since 1 and 1.0 are equal: a parameter of type float
    that was written as an integer comes back from the wire as a float.
    """
    return json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _whole(value: object) -> object:
    match value:
        case dict():
            return {key: _whole(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_whole(entry) for entry in value]
        case float() if value.is_integer() and abs(value) < _EXACT:
            return int(value)
        case _:
            return value


@lru_cache(maxsize=16)
def _parse(data: bytes) -> RoundPlan:
    from pydantic import ValidationError  # noqa: PLC0415 - only where plans are read

    try:
        plan = _parser().validate_json(data, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        msg = f"the coordinator's plan is refused: {where}: {first['msg']}"
        raise PeerProtocolError(msg) from None
    if plan.to_bytes() != data:
        msg = "the coordinator's plan is refused: it is not in canonical form"
        raise PeerProtocolError(msg)
    return plan


@lru_cache(maxsize=1)
def _parser() -> TypeAdapter[RoundPlan]:
    """Return what reads plans; to make it takes a hundred times as long as to use it."""
    from pydantic import TypeAdapter  # noqa: PLC0415 - only where plans are read

    return TypeAdapter(RoundPlan)
