"""Who holds which training examples.

A partition is one array of row numbers for each client. The arrays are disjoint
and sorted, no client is empty, the same seed gives the same partition, and
together they cover the training set (but for `Natural` with fewer clients than
there are, which leaves the others' data out).

    Iid        a random permutation, cut evenly
    Dirichlet  the share of each class that a client gets is drawn from
               Dir(alpha, ..., alpha) [HQB19]: small alpha, few classes a client
    Shards     sorted by label, cut into equal shards, some dealt to each client
               [MMRHA17, section 3]: two shards, about two digits a client
    Natural    as recorded: one writer, speaker or machine is one client

Data sets of the hub are partitioned by flwr-datasets, others by this module.

[HQB19] Hsu, Qi and Brown, https://arxiv.org/abs/1909.06335
[MMRHA17] McMahan et al., https://arxiv.org/abs/1602.05629
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

import numpy as np
import numpy.typing as npt

from fedcore.data.dataset import Dataset, Labels
from fedcore.errors import ConfigurationError

Indices: TypeAlias = npt.NDArray[np.int64]
"""Shape [examples of the client], sorted row numbers of the training set."""


@dataclass(frozen=True, slots=True)
class Iid:
    """Every client holds a random sample of the whole."""

    kind: Literal["iid"] = "iid"


@dataclass(frozen=True, slots=True)
class Dirichlet:
    """Label skew of strength 1/alpha.

    Attributes:
        alpha: Concentration; 100 is close to iid, 0.1 gives most clients one or two classes.
        min_examples: Clients that drew fewer get random ones from the largest client.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = 0.5
    min_examples: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1e-4 <= self.alpha <= 1e6:
            msg = (
                f"partition.alpha must be in [0.0001, 1000000], got {self.alpha}: "
                "0.5 is a usual choice"
            )
            raise ConfigurationError(msg)
        if self.min_examples < 1:
            msg = (
                f"partition.min_examples must be at least 1, got {self.min_examples}: "
                "a client without examples cannot train"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Shards:
    """Each client holds a few runs of the examples sorted by label."""

    kind: Literal["shards"] = "shards"
    shards_per_client: int = 2

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.shards_per_client < 1:
            msg = f"partition.shards_per_client must be at least 1, got {self.shards_per_client}"
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Natural:
    """One client for each id of the data set, in the order of the ids."""

    kind: Literal["natural"] = "natural"


PartitionConfig: TypeAlias = Iid | Dirichlet | Shards | Natural


def partition(
    dataset: Dataset, config: PartitionConfig, clients: int, seed: int
) -> tuple[Indices, ...]:
    """Return the row numbers of each client.

    Example:
        >>> from fedcore.data import Digits, load
        >>> [len(rows) for rows in partition(load(Digits()), Iid(), clients=3, seed=0)]
        [480, 479, 479]

    Raises:
        ConfigurationError: The data set has too few examples or natural clients.
    """
    _check_numbers(dataset, config, clients, seed)
    if dataset.origin == "hub":
        # flwr-datasets is an extra; only sets that came through it need it again.
        from fedcore.data.hub import partition_hub  # noqa: PLC0415

        return partition_hub(dataset, config, clients, seed)
    rng = np.random.default_rng(seed)
    match config:
        case Iid():
            parts = np.array_split(rng.permutation(len(dataset.y_train)), clients)
        case Dirichlet():
            parts = _dirichlet(dataset.y_train, config, clients, rng)
        case Shards():
            parts = _shards(dataset.y_train, config.shards_per_client, clients, rng)
        case Natural():
            parts = _natural(dataset, clients)
        case _:
            assert_never(config)
    return tuple(np.sort(part).astype(np.int64, copy=False) for part in parts)


def _check_numbers(dataset: Dataset, config: PartitionConfig, clients: int, seed: int) -> None:
    if clients < 1:
        msg = f"clients must be at least 1, got {clients}"
        raise ConfigurationError(msg)
    if seed < 0:
        msg = f"seed must not be negative, got {seed}"
        raise ConfigurationError(msg)
    if isinstance(config, Natural):
        if dataset.client_ids is None:
            msg = (
                f"data set {dataset.name!r} does not say who recorded its examples: "
                "set data.clients_key (or client_key), or choose another partition"
            )
            raise ConfigurationError(msg)
        found = len(np.unique(dataset.client_ids))
        if clients > found:
            msg = (
                f"data set {dataset.name!r} has {found} natural clients, got clients={clients}: "
                f"lower clients to at most {found}"
            )
            raise ConfigurationError(msg)
        return
    each = 1
    if isinstance(config, Dirichlet):
        each = config.min_examples
    elif isinstance(config, Shards):
        each = config.shards_per_client
    examples = len(dataset.y_train)
    if clients * each > examples:
        msg = (
            f"{clients} clients with at least {each} examples each need {clients * each}, but "
            f"data set {dataset.name!r} has {examples}: lower clients or what each must hold"
        )
        raise ConfigurationError(msg)


def _dirichlet(
    y: Labels, config: Dirichlet, clients: int, rng: np.random.Generator
) -> list[Indices]:
    owner = np.empty(len(y), dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        shares = rng.dirichlet(np.full(clients, config.alpha))
        ends = np.minimum(np.rint(np.cumsum(shares) * len(rows)).astype(np.int64), len(rows))
        ends[-1] = len(rows)
        owner[rows] = np.repeat(np.arange(clients), np.diff(ends, prepend=0))
    sizes = np.bincount(owner, minlength=clients)
    # Drawing again until all are large enough may never end; a few gifts always do.
    for poor in np.flatnonzero(sizes < config.min_examples):
        while sizes[poor] < config.min_examples:
            rich = int(sizes.argmax())
            # rich > min_examples > sizes[poor], since there are enough for all: count >= 1.
            need, surplus = config.min_examples - sizes[poor], sizes[rich] - config.min_examples
            count = int(min(need, surplus))
            owner[rng.choice(np.flatnonzero(owner == rich), count, replace=False)] = poor
            sizes[rich] -= count
            sizes[poor] += count
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(sizes)[:-1])


def _shards(
    y: Labels, shards_per_client: int, clients: int, rng: np.random.Generator
) -> list[Indices]:
    # A permutation before the stable sort: which examples of a label share a shard is random.
    shuffled = rng.permutation(len(y))
    by_label = shuffled[np.argsort(y[shuffled], kind="stable")]
    shards = np.array_split(by_label, clients * shards_per_client)
    hands = rng.permutation(len(shards)).reshape(clients, shards_per_client)
    return [np.concatenate([shards[i] for i in hand]) for hand in hands]


def _natural(dataset: Dataset, clients: int) -> list[Indices]:
    if dataset.client_ids is None:  # refused by _check_numbers
        return []
    order = np.argsort(dataset.client_ids, kind="stable")
    starts = np.flatnonzero(np.diff(dataset.client_ids[order])) + 1
    return np.split(order, starts)[:clients]
