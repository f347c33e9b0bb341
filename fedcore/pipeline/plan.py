"""Every public parameter of a run's rounds.

A `RunPlan` chooses which stage and how much; the order of the stages is code:

    feedback, sparsify, clip, rotate, quantize, noise, embed, mask

Noise comes after the clip that bounds its sensitivity, the ring after the noise, the
mask last. Central noise is the coordinator's: it is added to the revealed sum, in the
ring, before anything is decoded (`fedcore.pipeline.central`).

A `RoundPlan` is a run plan for one round and cohort. Devices receive it as canonical
JSON, check it against their own minimums, and derive from its digest every key of the
round: devices that were told different things share no key.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING, Literal, TypeAlias

from fedcore.codec import (
    Clip,
    Compressor,
    Delta,
    Dense,
    Full,
    Hadamard,
    NoRotation,
    PublicTopK,
    Qsgd,
    Quantize,
    RandomK,
    Sketch,
    SparseTernary,
    TopK,
)
from fedcore.crypto import transcript_hash
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.pipeline.buffer import Buffer, check_buffered
from fedcore.pipeline.clipping import (
    AdaptiveClip,
    ClipChoice,
    Layer,
    PerLayerClip,
    check_layers,
    check_state,
)
from fedcore.pipeline.shares import ByClass, Shares, Whole
from fedcore.privacy import Central, Distributed, MatrixGaussian, NoPrivacy, stated_noise
from fedcore.secagg.parameters import COMPLETE_UP_TO, GRINDING_BITS, SECURITY_BITS

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_EXACT = 2**53
"""Below it a float that is whole is the integer."""


@dataclass(frozen=True, slots=True)
class Modular:
    """Quantise for a ring of `bits` bits, as finely as the cohort's sum allows.

    Finer than `Quantize` by a wide margin: the ring holds the sum's standard deviation
    `tails` times to either side instead of every conceivable sum. It needs a rotation.

    Attributes:
        bits: Of the ring, and so of every coordinate on the wire.
        tails: 4 leaves a chance below 1e-4 per coordinate that a sum of fully
            aligned updates wraps, and far less for real ones.
    """

    bits: int = 16
    tails: float = 4.0
    kind: Literal["modular"] = "modular"

    def __post_init__(self) -> None:
        if not 4 <= self.bits <= 32:
            msg = f"quantize.bits must be in 4..32, got {self.bits}"
            raise ConfigurationError(msg)
        if not 1 <= self.tails <= 64:
            msg = f"quantize.tails must be in [1, 64], got {self.tails}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class ByExamples:
    """Weigh each client by its number of examples, as FedAvg does.

    Attributes:
        max_examples: Counts above it are cut to it; it also sets the resolution.
    """

    max_examples: int = 1024
    kind: Literal["examples"] = "examples"

    def __post_init__(self) -> None:
        if not 1 <= self.max_examples < 1 << 24:
            msg = f"weighting.max_examples must be in 1..2^24, got {self.max_examples}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Weigh all clients alike; the number of examples stays on the device."""

    kind: Literal["uniform"] = "uniform"


@dataclass(frozen=True, slots=True)
class NoSecAgg:
    """Uploads in the clear: the coordinator sees every client's encoded update."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class Bonawitz:
    """Pairwise masks with drop-out recovery; see `fedcore.secagg`.

    Attributes:
        corrupt: Fraction of the cohort that may collude with the coordinator.
        security_bits: Secrecy fails with probability 2^-this for one draw of the graph. None
            takes `bits`.
        correctness_bits: An honest round fails with probability 2^-this.
        authority: Public key of the root that enrolled the devices, 64 hexadecimal digits.
            With it every key is signed and the survivors are agreed upon; None is for
            simulations, and for coordinators that are trusted not to invent devices.
    """

    corrupt: float = 0.1
    security_bits: int | None = None
    correctness_bits: int = 30
    authority: str | None = None
    kind: Literal["bonawitz"] = "bonawitz"

    def __post_init__(self) -> None:
        if not 0 <= self.corrupt < 0.5:
            msg = f"secagg.corrupt must be in [0, 0.5), got {self.corrupt}"
            raise ConfigurationError(msg)
        for name, bits in (
            ("security_bits", self.bits(clients=0)),
            ("correctness_bits", self.correctness_bits),
        ):
            if not 10 <= bits <= 128:
                msg = f"secagg.{name} must be in 10..128, got {bits}"
                raise ConfigurationError(msg)
        if self.authority is not None:
            _check_key("secagg.authority", self.authority)

    def must_pay_for_draws(self, clients: int) -> bool:
        """Return whether the draw of the graph is what protects enrolled devices.

        A complete graph is drawn in one way only, and without certificates the coordinator
        can be anybody: there is nothing to protect.
        """
        return self.authority is not None and clients > COMPLETE_UP_TO

    def bits(self, clients: int) -> int:
        """Return `security_bits`; by default 40, and 80 where the coordinator may draw often."""
        if self.security_bits is not None:
            return self.security_bits
        return SECURITY_BITS + GRINDING_BITS * self.must_pay_for_draws(clients)

    def check_margin(self, clients: int) -> None:
        """Refuse bits that no device's policy accepts, unless its owner changed it.

        Raises:
            ConfigurationError: Fewer than 80 where the coordinator may draw often.
        """
        needed = SECURITY_BITS + GRINDING_BITS
        if self.must_pay_for_draws(clients) and self.bits(clients) < needed:
            msg = (
                f"secagg.security_bits must be at least {needed} for more than {COMPLETE_UP_TO} "
                f"enrolled devices, got {self.security_bits} for {clients}: set it to {needed} or "
                f"null, or invite at most {COMPLETE_UP_TO}"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class SeedHelper:
    """One upload per client, its mask's seed sealed to a second party that does not collude.

    Attributes:
        public_key: Of the helper, X25519, 64 hexadecimal digits; devices compare it with
            the one they pin. None until the helper is known.
        authority: Public key of the root that enrolled the devices; boxes are then signed.
    """

    public_key: str | None = None
    authority: str | None = None
    kind: Literal["seed_helper"] = "seed_helper"

    def __post_init__(self) -> None:
        for name in ("public_key", "authority"):
            value = getattr(self, name)
            if value is not None:
                _check_key(f"secagg.{name}", value)


Sparsify: TypeAlias = Dense | RandomK | Sketch | PublicTopK
Rotate: TypeAlias = NoRotation | Hadamard
Quantizer: TypeAlias = Quantize | Modular | TopK | SparseTernary | Qsgd
Weighting: TypeAlias = ByExamples | Uniform
SumPrivacy: TypeAlias = NoPrivacy | Distributed | Central
SecAgg: TypeAlias = Bonawitz | SeedHelper | NoSecAgg
Downlink: TypeAlias = Full | Delta


def _check_key(name: str, value: str) -> None:
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        msg = f"{name} must be 64 lower-case hexadecimal digits, got {value!r:.80}"
        raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """How the updates of a run are encoded, protected and added.

    The defaults suit any application: they take as many bits as float32 does, and lose
    what exceeds a norm of 100 and a float's last digits.

    Attributes:
        clip: Bound on the l2 norm of what is sent: one number, one that follows a quantile
            of the norms, or one for each layer.
        sparsify: Which coordinates are sent.
        rotate: Whether coordinates are made alike first.
        quantize: How reals become integers; one of `fedcore.codec.compressors` codes each
            update by itself, which only a round without masks can add up.
        privacy: Noise in the sum.
        secagg: Who sees a single update.
        weighting: What the mean is weighted by.
        downlink: How devices get the global model.
        shares: What of the model each class of devices trains.
        error_feedback: Devices keep what was not sent and add it to their next update.
        dropout: Fraction of a cohort that may disappear; a round with fewer survivors
            is aborted and reveals nothing.
        metric_slots: Numbers a client may report beside its update; they are summed
            under the masks too. With 0, and always under differential privacy, a
            client's metrics stay on the device.
        attempts: How often a round is tried.
        stage_seconds: How long the coordinator waits at each protocol stage.
        seed: Public; supports and rotations follow from it.
    """

    clip: ClipChoice = Clip(100.0)
    sparsify: Sparsify = Dense()
    rotate: Rotate = Hadamard()
    quantize: Quantizer = Modular(32)
    privacy: SumPrivacy = NoPrivacy()
    secagg: SecAgg = Bonawitz()
    weighting: Weighting = ByExamples()
    downlink: Downlink = Full()
    shares: Shares = Whole()
    error_feedback: bool = False
    dropout: float = 0.1
    metric_slots: int = 8
    attempts: int = 2
    stage_seconds: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            msg = f"plan.dropout must be in [0, 1), got {self.dropout}"
            raise ConfigurationError(msg)
        if not 0 <= self.metric_slots <= 64:
            msg = f"plan.metric_slots must be in 0..64, got {self.metric_slots}"
            raise ConfigurationError(msg)
        if not 1 <= self.attempts <= 10:
            msg = f"plan.attempts must be in 1..10, got {self.attempts}"
            raise ConfigurationError(msg)
        if not 0 < self.stage_seconds <= 86_400:
            msg = f"plan.stage_seconds must be in (0, 86400], got {self.stage_seconds}"
            raise ConfigurationError(msg)
        self._check_combination()

    @property
    def compressor(self) -> Compressor | None:
        """What codes each update by itself; None if updates are summed encoded."""
        quantize = self.quantize
        return quantize if isinstance(quantize, (TopK, SparseTernary, Qsgd)) else None

    @property
    def names_layers(self) -> bool:
        """Whether a round treats layers of the model apart, so that its plan names them."""
        sparse = not isinstance(self.sparsify, Dense) and self.sparsify.dense_below > 0
        return sparse or isinstance(self.clip, PerLayerClip)

    @property
    def private(self) -> bool:
        """Whether noise is added to the sum."""
        return not isinstance(self.privacy, NoPrivacy)

    @property
    def central(self) -> bool:
        """Whether that noise is the coordinator's to add."""
        return isinstance(self.privacy, Central)

    def minimum_survivors(self, clients: int) -> int:
        """Return below how many survivors a round with `clients` is aborted."""
        return max(1, ceil((1 - self.dropout) * clients - 1e-9))

    def _check_combination(self) -> None:
        if isinstance(self.quantize, Modular) and isinstance(self.rotate, NoRotation):
            msg = (
                "quantize=modular relies on coordinates that are alike: "
                "choose rotate=hadamard or quantize=uniform"
            )
            raise ConfigurationError(msg)
        if self.private and not isinstance(self.quantize, Modular):
            msg = (
                "noise in the sum is calibrated for quantize=modular with rotate=hadamard, "
                f"got quantize={self.quantize.kind}"
            )
            raise ConfigurationError(msg)
        if self.private and not isinstance(self.weighting, Uniform):
            msg = (
                "with noise in the sum the number of examples must stay on the device: "
                f"choose weighting=uniform, got weighting={self.weighting.kind}"
            )
            raise ConfigurationError(msg)
        if self.error_feedback and isinstance(self.clip, AdaptiveClip):
            msg = (
                "error_feedback adds what the clip cut off to the next update, so the norms that "
                "clip=adaptive measures would follow from the clip itself: choose "
                "error_feedback=false, or clip=norm"
            )
            raise ConfigurationError(msg)
        if isinstance(self.privacy, MatrixGaussian) and not isinstance(self.sparsify, Dense):
            msg = (
                "privacy=matrix_gaussian cancels noise from round to round in every coordinate, "
                "and supports that change with the round would keep most of it: choose "
                f"sparsify=dense or privacy=central_gaussian, got sparsify={self.sparsify.kind}"
            )
            raise ConfigurationError(msg)
        if isinstance(self.shares, ByClass):
            self._check_shares(self.shares)
        self._check_compressor()
        if isinstance(self.clip, PerLayerClip) and isinstance(self.sparsify, Sketch):
            msg = (
                "sparsify=sketch adds coordinates of different layers, which clip=per_layer could "
                "no longer tell apart: choose clip=norm, or sparsify=random_k"
            )
            raise ConfigurationError(msg)
        sparsify = self.sparsify
        if self.error_feedback and isinstance(sparsify, (RandomK, Sketch)) and sparsify.unbiased:
            msg = (
                "error_feedback sends later what is left out now: "
                "choose sparsify.unbiased=false, or error_feedback=false"
            )
            raise ConfigurationError(msg)

    def _check_shares(self, shares: ByClass) -> None:
        """Refuse what cannot be a mean over those who trained a coordinate."""
        if not isinstance(self.weighting, Uniform):
            msg = (
                "devices of classes are counted, and the number of examples of those who trained "
                "one coordinate is nobody's to know: choose weighting=uniform, got "
                f"weighting={self.weighting.kind}"
            )
            raise ConfigurationError(msg)
        if isinstance(self.privacy, MatrixGaussian):
            msg = (
                "privacy=matrix_gaussian takes back in later rounds what it added in earlier ones, "
                "and a mean over other devices in each coordinate would keep it: choose "
                "devices=equal, or privacy=central_gaussian"
            )
            raise ConfigurationError(msg)
        if not self.error_feedback or not shares.narrow:
            return
        if shares.structure != "nested" or isinstance(self.sparsify, Sketch):
            msg = (
                "error_feedback would send later what a device did not train then: choose "
                "error_feedback=false, or devices.structure=nested without sparsify=sketch"
            )
            raise ConfigurationError(msg)

    def _check_compressor(self) -> None:
        """Refuse what a compressor of single updates would leave without effect."""
        if self.compressor is None:
            return
        if not isinstance(self.secagg, NoSecAgg):
            msg = (
                f"quantize={self.quantize.kind} lets each client choose its own coordinates, and "
                "masks cancel position by position: choose secagg=none, or sparsify=random_k, "
                "sketch or public_top_k with quantize=modular"
            )
            raise ConfigurationError(msg)
        if not isinstance(self.clip, Clip):
            msg = (
                f"quantize={self.quantize.kind} keeps to one flat bound: choose clip=norm, got "
                f"clip={self.clip.kind}"
            )
            raise ConfigurationError(msg)
        if not isinstance(self.sparsify, Dense):
            msg = (
                f"quantize={self.quantize.kind} chooses coordinates by itself: choose "
                f"sparsify=dense, got sparsify={self.sparsify.kind}"
            )
            raise ConfigurationError(msg)


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
            _check_key("roster", self.roster)
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
