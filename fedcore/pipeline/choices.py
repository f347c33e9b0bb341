"""The choices that a run has at each stage, as values.

What the codec and the privacy mechanisms define is taken from there. Here stands what only a
round knows: a quantizer for the sum of a cohort, what the mean is weighted by, and the protocol
that hides single uploads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedcore.codec import (
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
from fedcore.errors import ConfigurationError
from fedcore.privacy import Central, Distributed, NoPrivacy
from fedcore.secagg.parameters import COMPLETE_UP_TO, GRINDING_BITS, SECURITY_BITS


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
            check_key("secagg.authority", self.authority)

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
                check_key(f"secagg.{name}", value)


Sparsify: TypeAlias = Dense | RandomK | Sketch | PublicTopK
Rotate: TypeAlias = NoRotation | Hadamard
Quantizer: TypeAlias = Quantize | Modular | TopK | SparseTernary | Qsgd
Weighting: TypeAlias = ByExamples | Uniform
SumPrivacy: TypeAlias = NoPrivacy | Distributed | Central
SecAgg: TypeAlias = Bonawitz | SeedHelper | NoSecAgg
Downlink: TypeAlias = Full | Delta


def check_key(name: str, value: str) -> None:
    """Refuse what is no public key or digest of 32 bytes, in hexadecimal digits.

    Raises:
        ConfigurationError: Names it, and what was expected.
    """
    if len(value) != 64 or set(value) - set("0123456789abcdef"):
        msg = f"{name} must be 64 lower-case hexadecimal digits, got {value!r:.80}"
        raise ConfigurationError(msg)
