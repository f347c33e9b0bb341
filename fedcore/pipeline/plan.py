"""Every public parameter of a run's rounds.

A `RunPlan` chooses which stage and how much; the order of the stages is code:

    feedback, sparsify, clip, rotate, quantize, noise, embed, mask

Noise comes after the clip that bounds its sensitivity, the ring after the noise, the
mask last. Central noise is the coordinator's: it is added to the revealed sum, in the
ring, before anything is decoded (`fedcore.pipeline.central`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fedcore.codec import (
    Clip,
    Compressor,
    Dense,
    Full,
    Hadamard,
    NoRotation,
    Qsgd,
    RandomK,
    Sketch,
    SparseTernary,
    TopK,
)
from fedcore.errors import ConfigurationError
from fedcore.pipeline.choices import (
    Bonawitz,
    ByExamples,
    Downlink,
    Modular,
    NoSecAgg,
    Quantizer,
    Rotate,
    SecAgg,
    Sparsify,
    SumPrivacy,
    Uniform,
    Weighting,
)
from fedcore.pipeline.clipping import (
    AdaptiveClip,
    ClipChoice,
    PerLayerClip,
)
from fedcore.pipeline.shares import ByClass, Shares, Whole
from fedcore.privacy import Central, MatrixGaussian, NoPrivacy


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
