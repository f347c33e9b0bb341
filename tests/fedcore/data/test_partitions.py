"""The laws of partitions: disjoint, covering, large enough, repeatable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedcore.data import (
    Dirichlet,
    Iid,
    Natural,
    PartitionConfig,
    Shards,
    from_arrays,
    partition,
)
from fedcore.errors import ConfigurationError


def labelled(y, client_ids=None):
    x = np.zeros((len(y), 1), np.float32)
    y = np.asarray(y)
    return from_arrays("toy", x, y, x[:1], y[:1], client_ids=client_ids)


@st.composite
def problems(draw):
    examples = draw(st.integers(12, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    y = rng.integers(draw(st.integers(2, 8)), size=examples)
    y[:2] = [0, 1]
    each = draw(st.integers(1, 4))
    clients = draw(st.integers(1, examples // each))
    config = draw(
        st.one_of(
            st.just(Iid()),
            st.builds(Shards, shards_per_client=st.just(each)),
            st.builds(Dirichlet, alpha=st.floats(1e-4, 1e6), min_examples=st.just(each)),
        )
    )
    return labelled(y), config, clients, each


@settings(deadline=None, max_examples=150)
@given(problem=problems(), seed=st.integers(0, 2**40))
def test_every_example_belongs_to_exactly_one_client_and_no_client_is_short(problem, seed):
    dataset, config, clients, each = problem
    parts = partition(dataset, config, clients, seed)
    assert len(parts) == clients
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(dataset.y_train)))
    assert min(map(len, parts)) >= (1 if isinstance(config, Iid) else each)
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)


@settings(deadline=None, max_examples=50)
@given(problem=problems(), seed=st.integers(0, 2**40))
def test_the_seed_alone_decides_and_global_seeds_do_not_matter(problem, seed):
    dataset, config, clients, _ = problem
    one = partition(dataset, config, clients, seed)
    np.random.seed(seed % 7)  # noqa: NPY002
    two = partition(dataset, config, clients, seed)
    assert all(map(np.array_equal, one, two))


@pytest.mark.parametrize("config", [Iid(), Dirichlet(), Shards()])
def test_another_seed_gives_another_partition(config):
    dataset = labelled(np.arange(200) % 10)
    one, two = (partition(dataset, config, 10, seed) for seed in (0, 1))
    assert not all(map(np.array_equal, one, two))


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(part) for part in partition(labelled(np.arange(103) % 3), Iid(), 10, seed=5)]
    assert max(sizes) - min(sizes) == 1


def classes_per_client(config, clients=20):
    y = np.repeat(np.arange(10), 200)
    return np.mean([len(np.unique(y[part])) for part in partition(labelled(y), config, clients, 0)])


def test_smaller_alpha_gives_fewer_classes_a_client():
    skewed, usual, even = (classes_per_client(Dirichlet(alpha=a)) for a in (0.05, 0.5, 1000.0))
    assert skewed < 4 < usual < 9.5 < even


def test_two_shards_give_two_classes_a_client():
    assert classes_per_client(Shards(shards_per_client=2)) <= 2


def test_natural_clients_are_the_ids_in_sorted_order():
    dataset = labelled([0, 1, 0, 1, 0, 1], client_ids=np.array([9, 4, 9, 7, 4, 4]))
    everyone = partition(dataset, Natural(), clients=3, seed=0)
    assert [part.tolist() for part in everyone] == [[1, 4, 5], [3], [0, 2]]
    first = partition(dataset, Natural(), clients=2, seed=1)
    assert [part.tolist() for part in first] == [[1, 4, 5], [3]]


@pytest.mark.parametrize(
    ("config", "clients", "message"),
    [
        (Iid(), 0, "clients must be at least 1, got 0"),
        (Iid(), 13, "13 clients with at least 1 examples each need 13, but .* has 12"),
        (Shards(shards_per_client=3), 5, "need 15, but .* has 12"),
        (Dirichlet(min_examples=5), 3, "need 15, but .* has 12"),
        (Natural(), 2, "does not say who recorded"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(config, clients, message):
    with pytest.raises(ConfigurationError, match=message):
        partition(labelled(np.arange(12) % 2), config, clients, seed=0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigurationError, match="seed must not be negative"):
        partition(labelled([0, 1]), Iid(), 1, seed=-1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dirichlet(alpha=0.0), "partition.alpha"),
        (lambda: Dirichlet(alpha=float("nan")), "partition.alpha"),
        (lambda: Dirichlet(alpha=float("inf")), "partition.alpha"),
        (lambda: Dirichlet(min_examples=0), "partition.min_examples"),
        (lambda: Shards(shards_per_client=0), "partition.shards_per_client"),
    ],
)
def test_a_partition_out_of_range_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize("config", [Iid(), Dirichlet(alpha=0.1), Shards(), Natural()])
def test_configuration_is_validated_by_kind(config):
    fields = {name: getattr(config, name) for name in config.__slots__}
    assert TypeAdapter(PartitionConfig).validate_python(fields) == config
