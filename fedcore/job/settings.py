"""One value that describes a whole run.

ServerApp and ClientApp read the same `Job` from the run configuration, on every
engine; experiments fill it from YAML. It names data, model, training, strategy and
every stage of a round by frozen dataclasses, each of which checks its own ranges.
What only makes sense together is checked here, so that no combination that cannot
work reaches a device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from math import inf
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Discriminator, TypeAdapter, ValidationError

from fedcore.codec import Clip, Dense, Full, Hadamard
from fedcore.data import DataConfig, Digits, Dirichlet, PartitionConfig
from fedcore.engine import AtOnce, DropScript, HeavyTailed
from fedcore.errors import ConfigurationError
from fedcore.job import sampling as cohorts
from fedcore.job.backoff import BackOff, NoBackOff
from fedcore.job.devices import Devices, Equal, check_devices, shares_of
from fedcore.job.levels import PrivacyConfig, of_devices, of_examples
from fedcore.job.optimisation import (
    Distillation,
    NoDistillation,
    NoQat,
    Qat,
    check_optimisation,
)
from fedcore.job.sampling import FixedSize, SamplingConfig, check_sampling
from fedcore.job.schedule import Rounds, ScheduleConfig, check_schedule
from fedcore.models import Mlp, ModelConfig, NoPruning, Pruning
from fedcore.pipeline import (
    AdaptiveClip,
    Bonawitz,
    ByExamples,
    Modular,
    NoSecAgg,
    PerLayerClip,
    RunPlan,
    Uniform,
)
from fedcore.pipeline.choices import Downlink, Quantizer, Rotate, SecAgg, Sparsify, Weighting
from fedcore.pipeline.envelope import STAGES
from fedcore.pipeline.round_plan import canonical_json
from fedcore.privacy import NoPrivacy
from fedcore.training import LocalTraining


@dataclass(frozen=True, slots=True)
class NoClip:
    """Leave updates as long as they are; only without quantisation."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class NoQuantize:
    """Send float32 through Flower's own path: no stage of the codec runs."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class NoFaults:
    """Nobody disappears on purpose."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class LocalHelper:
    """A seed helper inside the coordinator's process: for simulations only."""

    kind: Literal["local"] = "local"


@dataclass(frozen=True, slots=True)
class RemoteHelper:
    """A seed helper run by a second party, reached over gRPC with mutual TLS.

    Attributes:
        address: Host and port.
        public_key: The helper's key that devices pin, 64 hexadecimal digits.
        authority: PEM file with the certificate authority of the helper.
        certificate: PEM file with the coordinator's TLS certificate.
        private_key: PEM file with its key, mode 0600.
    """

    address: str
    public_key: str
    authority: str
    certificate: str
    private_key: str
    kind: Literal["remote"] = "remote"


@dataclass(frozen=True, slots=True)
class FedAvg:
    """The mean of the clients' models [MMRHA17]."""

    kind: Literal["fedavg"] = "fedavg"


@dataclass(frozen=True, slots=True)
class FedAvgM:
    """FedAvg with momentum at the server [HQB19]."""

    kind: Literal["fedavgm"] = "fedavgm"
    server_learning_rate: float = 1.0
    server_momentum: float = 0.9

    def __post_init__(self) -> None:
        _positive("strategy.server_learning_rate", self.server_learning_rate)
        if not 0 <= self.server_momentum < 1:
            msg = f"strategy.server_momentum must be in [0, 1), got {self.server_momentum}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class FedProx:
    """FedAvg whose clients are pulled towards the global model [LSZSTS20]."""

    kind: Literal["fedprox"] = "fedprox"
    proximal_mu: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.proximal_mu < inf:
            msg = f"strategy.proximal_mu must be 0 or more and finite, got {self.proximal_mu}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class FedOpt:
    """An adaptive optimizer at the server [RCZGRKKM21].

    Attributes:
        kind: Which one.
        eta: Server learning rate.
        beta_1: Decay of the first moment; not used by Adagrad.
        beta_2: Decay of the second moment; not used by Adagrad.
        tau: Degree of adaptivity.
    """

    kind: Literal["fedadam", "fedyogi", "fedadagrad"] = "fedadam"
    eta: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 0.001

    def __post_init__(self) -> None:
        _positive("strategy.eta", self.eta)
        _positive("strategy.tau", self.tau)
        for name, beta in (("beta_1", self.beta_1), ("beta_2", self.beta_2)):
            if not 0 <= beta < 1:
                msg = f"strategy.{name} must be in [0, 1), got {beta}"
                raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Robust:
    """A strategy that compares single updates: only for runs that show them.

    Attributes:
        kind: Which one.
        malicious: How many clients Krum assumes to lie.
        beta: Share that the trimmed mean cuts off at either end.
    """

    kind: Literal["krum", "fedmedian", "fedtrimmedavg"] = "fedmedian"
    malicious: int = 0
    beta: float = 0.2

    def __post_init__(self) -> None:
        if self.malicious < 0:
            msg = f"strategy.malicious must be 0 or more, got {self.malicious}"
            raise ConfigurationError(msg)
        if not 0 <= self.beta < 0.5:
            msg = f"strategy.beta must be in [0, 0.5), got {self.beta}"
            raise ConfigurationError(msg)


_BY_KIND = Discriminator("kind")
StrategyConfig: TypeAlias = Annotated[FedAvg | FedAvgM | FedProx | FedOpt | Robust, _BY_KIND]
ClipConfig: TypeAlias = Annotated[Clip | AdaptiveClip | PerLayerClip | NoClip, _BY_KIND]
QuantizeConfig: TypeAlias = Annotated[Quantizer | NoQuantize, _BY_KIND]
HelperConfig: TypeAlias = Annotated[LocalHelper | RemoteHelper, _BY_KIND]
FaultConfig: TypeAlias = Annotated[DropScript | NoFaults, _BY_KIND]
PaceConfig: TypeAlias = Annotated[AtOnce | HeavyTailed, _BY_KIND]


_CHOICES: Final = frozenset(
    (
        *("data", "partition", "model", "strategy", "clip", "sparsify", "rotate", "quantize"),
        *("privacy", "secagg", "weighting", "sampling", "faults", "helper", "engine", "downlink"),
        *("pruning", "distillation", "qat", "schedule", "pace", "backoff", "devices"),
    )
)
"""Keys whose value is one of several kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a run depends on, except where it runs.

    Attributes:
        name: Of the experiment.
        seed: Of partition, initial weights, cohorts, supports and faults; of all
            randomness in a simulation.
        rounds: How many.
        clients: How many devices there are.
        clients_per_round: How many updates a round wants, and how many devices it invites:
            with over-selection more, with Poisson sampling on average.
        classes: How many classes the data must have; None for as many as it has.
        evaluate_every: Test the global model after every so many rounds.
        data: Training examples of the devices, and the coordinator's test examples.
        partition: How a central data set is spread over simulated devices.
        model: What is trained.
        training: What a device does in a round.
        pruning: Whether the model loses its weakest channels on the way.
        distillation: Whether a released model teaches this one.
        qat: Whether the last rounds train for int8.
        strategy: What the coordinator does with the mean.
        clip: Bound on the norm of what is sent; fixed, adaptive or for each layer.
        sparsify: Which coordinates are sent.
        rotate: Whether coordinates are made alike first.
        quantize: How reals become integers; `NoQuantize` for plain float32.
        privacy: Noise in the sum, in local training, or in both.
        secagg: Who sees a single update.
        weighting: What the mean is weighted by.
        sampling: How the devices of a round are chosen.
        devices: Whether devices are of different classes, and what each of them trains.
        backoff: Whether devices that fail again and again are left out of the draw.
        downlink: How devices get the global model.
        error_feedback: Devices keep what was not sent for their next update.
        dropout: Fraction of a cohort that may disappear before a round is aborted.
        metric_slots: Numbers that a client may report inside the sum.
        attempts: How often a round is tried.
        stage_seconds: How long the coordinator waits at each protocol stage.
        schedule: Whether updates are added in rounds, or whenever enough have checked in.
        pace: How long simulated devices take.
        faults: Who disappears on purpose.
        helper: The second party of secagg=seed_helper.
    """

    name: str = "default"
    seed: int = 0
    rounds: int = 10
    clients: int = 10
    clients_per_round: int = 10
    classes: int | None = None
    evaluate_every: int = 1
    data: Annotated[DataConfig, _BY_KIND] = Digits()
    partition: Annotated[PartitionConfig, _BY_KIND] = Dirichlet()
    model: Annotated[ModelConfig, _BY_KIND] = Mlp()
    training: LocalTraining = LocalTraining()
    pruning: Annotated[Pruning, _BY_KIND] = NoPruning()
    distillation: Annotated[Distillation, _BY_KIND] = NoDistillation()
    qat: Annotated[Qat, _BY_KIND] = NoQat()
    strategy: StrategyConfig = FedAvg()
    clip: ClipConfig = Clip(100.0)
    sparsify: Annotated[Sparsify, _BY_KIND] = Dense()
    rotate: Annotated[Rotate, _BY_KIND] = Hadamard()
    quantize: QuantizeConfig = Modular(32)
    privacy: PrivacyConfig = NoPrivacy()
    secagg: Annotated[SecAgg, _BY_KIND] = Bonawitz()
    weighting: Annotated[Weighting, _BY_KIND] = ByExamples()
    sampling: Annotated[SamplingConfig, _BY_KIND] = FixedSize()
    devices: Annotated[Devices, _BY_KIND] = Equal()
    backoff: Annotated[BackOff, _BY_KIND] = NoBackOff()
    downlink: Annotated[Downlink, _BY_KIND] = Full()
    error_feedback: bool = False
    dropout: float = 0.1
    metric_slots: int = 4
    attempts: int = 2
    stage_seconds: float = 600.0
    schedule: Annotated[ScheduleConfig, _BY_KIND] = Rounds()
    pace: PaceConfig = AtOnce()
    faults: FaultConfig = NoFaults()
    helper: HelperConfig = LocalHelper()

    def __post_init__(self) -> None:
        for name, value in (
            ("rounds", self.rounds),
            ("clients", self.clients),
            ("clients_per_round", self.clients_per_round),
            ("evaluate_every", self.evaluate_every),
        ):
            if value < 1:
                msg = f"{name} must be at least 1, got {value}"
                raise ConfigurationError(msg)
        if not 0 <= self.seed < 1 << 62:
            msg = f"seed must be in 0..2^62, got {self.seed}"
            raise ConfigurationError(msg)
        if self.clients_per_round > self.clients:
            msg = (
                f"clients_per_round must be at most clients={self.clients}, "
                f"got {self.clients_per_round}: lower it, or raise clients"
            )
            raise ConfigurationError(msg)
        self._check_combination()
        check_sampling(self)
        check_devices(self)
        check_optimisation(self)
        check_schedule(self)

    @property
    def invited(self) -> int:
        """How many devices a round invites; with Poisson sampling, on average."""
        return cohorts.invited(self.sampling, self.clients_per_round)

    @property
    def plan(self) -> RunPlan | None:
        """How a round encodes, protects and adds; None for plain float32.

        Raises:
            ConfigurationError: The stages do not fit each other.
        """
        if isinstance(self.quantize, NoQuantize) or isinstance(self.clip, NoClip):
            return None
        return RunPlan(
            clip=self.clip,
            sparsify=self.sparsify,
            rotate=self.rotate,
            quantize=self.quantize,
            privacy=of_devices(self.privacy),
            secagg=self.secagg,
            weighting=self.weighting,
            downlink=self.downlink,
            shares=shares_of(self.devices),
            error_feedback=self.error_feedback,
            dropout=self.dropout,
            metric_slots=self.metric_slots,
            attempts=self.attempts,
            stage_seconds=self.stage_seconds,
            seed=self.seed,
        )

    def to_json(self) -> str:
        """Return canonical JSON: equal jobs give equal text."""
        return canonical_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that `text` describes.

        Raises:
            ConfigurationError: A key is missing, unknown, of the wrong type or out of range.
        """
        try:
            return _parser().validate_json(text, extra="forbid")
        except ValidationError as error:
            raise ConfigurationError(explain(error)) from None

    def _check_combination(self) -> None:
        if isinstance(self.quantize, NoQuantize):
            self._check_plain()
        elif isinstance(self.clip, NoClip):
            msg = "quantize needs a bounded norm: choose clip=norm, or quantize=none"
            raise ConfigurationError(msg)
        if self.plan is not None and isinstance(self.strategy, Robust):
            msg = (
                f"strategy={self.strategy.kind} compares single updates, but an encoded round "
                "reveals their sum only: choose fedavg, fedprox, fedavgm, fedadam, fedyogi or "
                "fedadagrad, or run it with quantize=none secagg=none"
            )
            raise ConfigurationError(msg)
        if isinstance(self.faults, DropScript) and not set(self.faults.stages) <= set(STAGES):
            msg = f"faults.stages must be among {STAGES}, got {self.faults.stages}"
            raise ConfigurationError(msg)
        if of_examples(self.privacy) is not None and not isinstance(self.weighting, Uniform):
            msg = (
                f"privacy={self.privacy.kind} hides single examples, so their number must not "
                "weigh the mean: choose weighting=uniform"
            )
            raise ConfigurationError(msg)

    def _check_plain(self) -> None:
        """Refuse stages that plain float32 updates would silently leave out."""
        active = [
            name
            for name, config, off in (
                ("clip", self.clip, NoClip),
                ("sparsify", self.sparsify, Dense),
                ("secagg", self.secagg, NoSecAgg),
                ("downlink", self.downlink, Full),
                ("privacy", of_devices(self.privacy), NoPrivacy),
            )
            if not isinstance(config, off)
        ]
        if active or self.error_feedback:
            found = [*active, *(["error_feedback"] if self.error_feedback else [])]
            msg = (
                f"quantize=none sends plain float32, which leaves {', '.join(found)} without "
                "effect: turn these off as well, or choose a quantizer"
            )
            raise ConfigurationError(msg)


@lru_cache(maxsize=1)
def _parser() -> TypeAdapter[Job]:
    """Return what reads jobs; to make it takes a thousand times as long as to use it."""
    return TypeAdapter(Job)


def explain(error: ValidationError) -> str:
    """Return one line for the first thing that is wrong: the key, the rule and the value."""
    details = error.errors(include_url=False)
    first = details[0]
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return rule  # our own checks name the key themselves
    top, *path = (str(part) for part in first["loc"]) if first["loc"] else ("job",)
    if top in _CHOICES and path:
        path = path[1:]  # the tag of the alternative, which is no key
    if first["type"] == "unexpected_keyword_argument":
        rule = "unknown key; remove it or check its spelling"
    if first["type"] == "union_tag_invalid":
        rule = f"expected kind to be one of {first['ctx']['expected_tags']}"
    shown = "" if first["type"] == "missing_argument" else f", got {first['input']!r:.60}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{'.'.join([top, *path])}: {rule}{shown}{more}"


def _positive(name: str, value: float) -> None:
    if not 0 < value < inf:
        msg = f"{name} must be positive and finite, got {value}"
        raise ConfigurationError(msg)
