"""The laws of composition: sums decode to sums, and only what fits can be put together."""

import json
from math import inf, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedcore.codec import (
    Clip,
    Dense,
    Discretize,
    Embed,
    Hadamard,
    Integers,
    NoRotation,
    Quantize,
    RandomK,
    Reals,
    RingElements,
    chain,
    narrowest_ring,
)
from fedcore.codec.sparsify import support
from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError
from fedcore.ring import Ring

FILE = Path(__file__).parents[2] / "vectors/codec_v1.json"
VECTORS = json.loads(FILE.read_text())["vectors"]

ENTROPY = ReplayedEntropy(b"codec")
laws = settings(deadline=None, max_examples=60)

norms = st.floats(1e-3, 1e3)
cohorts = arrays(
    st.sampled_from((np.float32, np.float64)),
    st.tuples(st.integers(1, 8), st.integers(1, 40)),
    elements=st.floats(-1000, 1000, width=32),
)


def clipped(x, norm):
    x = x.astype(np.float64)
    return x * min(1.0, norm / max(np.linalg.norm(x), 1e-300))


def embedded(count, *stages):
    """Bind `stages` and the narrowest ring that holds the sum."""
    inner = chain(*stages)
    return inner.then(Embed(narrowest_ring(inner.target, count), count).bind(inner.target))


def decoded_sum(codec, xs):
    dtype = Ring(codec.target.bits).dtype
    total = np.zeros(codec.target.dim, dtype)
    for i, x in enumerate(xs):
        x.setflags(write=False)  # a stage that wrote to its input would fail here
        encoded = codec.encode(x, ENTROPY.child(f"client={i}"))
        assert encoded.dtype == dtype
        total += encoded
    total.setflags(write=False)
    return codec.decode(total)


@laws
@given(xs=cohorts, bits=st.integers(2, 20), norm=norms)
def test_decoding_the_sum_returns_the_sum_of_the_clipped_vectors(xs, bits, norm):
    count, dim = xs.shape
    codec = embedded(count, Reals(dim), Clip(norm), Quantize(bits))
    step = norm / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(
        decoded_sum(codec, xs), sum(clipped(x, norm) for x in xs), rtol=0, atol=count * step * 1.001
    )


@laws
@given(
    xs=cohorts,
    norm=norms,
    fraction=st.floats(0.05, 1),
    seed=st.integers(0, 99),
    unbiased=st.booleans(),
)
def test_a_shared_support_keeps_the_law_on_its_coordinates(xs, norm, fraction, seed, unbiased):
    count, dim = xs.shape
    sparsify = RandomK(fraction, seed, unbiased=unbiased)
    codec = embedded(count, Reals(dim), Clip(norm), sparsify, Quantize(12))
    kept = support(seed, dim, codec.target.dim)
    expected = np.zeros(dim)
    expected[kept] = sum(clipped(x, norm) for x in xs)[kept]
    gain = dim / len(kept) if unbiased else 1.0
    np.testing.assert_allclose(
        decoded_sum(codec, xs), gain * expected, rtol=0, atol=gain * count * norm / 2047 * 1.001
    )


@laws
@given(xs=cohorts, norm=norms, seed=st.integers(0, 99))
def test_a_rotation_keeps_the_law_in_euclidean_norm(xs, norm, seed):
    count, dim = xs.shape
    codec = embedded(count, Reals(dim), Clip(norm), Hadamard(seed), Quantize(12))
    loss = decoded_sum(codec, xs) - sum(clipped(x, norm) for x in xs)
    assert np.linalg.norm(loss) <= sqrt(dim) * count * norm / 2047 * 1.001


@laws
@given(
    xs=cohorts,
    norm=norms,
    units=st.floats(1, 1e4),
    slack=st.floats(0, 2),
    rotation=st.sampled_from((NoRotation(), Hadamard(3))),
    sparsify=st.sampled_from((Dense(), RandomK(0.3, 5), RandomK(0.3, 5, unbiased=True))),
)
def test_the_whole_upload_path_keeps_the_law(xs, norm, units, slack, rotation, sparsify):
    count, dim = xs.shape
    scale = units / norm
    inner = chain(Reals(dim), sparsify, Clip(norm), rotation)
    bound = scale * norm + slack * sqrt(inner.target.dim)
    discretize = Discretize(scale, rounded_norm=bound, spread=(count * bound + 1) / 4)
    codec = embedded(count, Reals(dim), sparsify, Clip(norm), rotation, discretize)

    dense = isinstance(sparsify, Dense)
    kept = np.arange(dim) if dense else support(5, dim, codec.target.dim)
    gain = dim / len(kept) if sparsify != RandomK(0.3, 5) else 1.0
    expected = np.zeros(dim)
    expected[kept] = gain * sum(clipped(x[kept], norm) for x in xs)
    loss = decoded_sum(codec, xs) - expected
    assert np.linalg.norm(loss) <= gain * sqrt(len(kept)) * count / scale * 1.001


PATHS = {
    "dense": (Clip(1.0), Quantize(8), Embed(12, 10)),
    "random_k": (RandomK(0.5, 3), Clip(0.5), Quantize(12), Embed(20, 10)),
    "discretize": (Clip(1.0), Hadamard(2), Discretize(50.0, 60.0, 100.0), Embed(16, 10)),
}


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_known_answer(vector):
    codec = chain(Reals(8), *PATHS[vector["name"]])
    assert codec.encode(np.linspace(-1, 1, 8), ENTROPY).tolist() == vector["elements"]


def test_encoding_follows_from_the_entropy_alone():
    codec = embedded(4, Reals(50), Clip(1.0), Hadamard(1), Quantize(8))
    x = np.linspace(-1, 1, 50)
    one, again, other = (
        codec.encode(x, ENTROPY.child(name)) for name in ("client=1", "client=1", "client=2")
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


DOMAINS = {
    "unbounded reals": Reals(4),
    "bounded reals": Reals(4, norm=1.0),
    "integers": Integers(4, 7),
    "ring elements": RingElements(4, 16),
}
EVERYTHING = set(DOMAINS)
REALS = {"unbounded reals", "bounded reals"}
ACCEPTS = {
    Clip(1.0): (REALS, "clip before quantising"),
    Dense(): (EVERYTHING, None),
    RandomK(0.5): (REALS, "sparsify before quantising"),
    NoRotation(): (EVERYTHING, None),
    Hadamard(): (REALS, "rotate before quantising"),
    Quantize(8): ({"bounded reals"}, "clip first"),
    Discretize(10.0, 20.0, 5.0): ({"bounded reals"}, "clip first"),
    Embed(16, 4): ({"integers"}, "quantise first"),
}
PAIRS = [(stage, name) for stage in ACCEPTS for name in DOMAINS]


@pytest.mark.parametrize(
    ("stage", "domain"), PAIRS, ids=[f"{type(s).__name__} of {d}" for s, d in PAIRS]
)
def test_a_stage_takes_exactly_the_domains_of_the_table(stage, domain):
    accepted, hint = ACCEPTS[stage]
    if domain in accepted:
        assert stage.bind(DOMAINS[domain]).source == DOMAINS[domain]
    else:
        with pytest.raises(ConfigurationError, match=f"{type(stage).__name__} takes .*{hint}"):
            stage.bind(DOMAINS[domain])


def test_a_chain_names_its_ends_and_each_target_says_what_is_known():
    inner = chain(Reals(100), RandomK(0.2), Clip(2.0), Hadamard())
    assert inner.source == Reals(100)
    assert inner.target == Reals(20, norm=2.0, peak=0.25)
    assert chain(Reals(3), Clip(2.0), Clip(5.0)).target == Reals(3, norm=2.0)
    quantised = chain(Reals(3), Clip(2.0), Quantize(3)).target
    assert quantised == Integers(3, magnitude=3, norm=inf, scale=1.5)
    assert chain(Reals(3)).target == Reals(3)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Quantize(8), Clip(1.0), Embed(16, 4)), "clip first"),
        ((Clip(1.0), Embed(16, 4), Quantize(8)), "quantise first"),
        ((Clip(1.0), Quantize(8), Hadamard()), "rotate before quantising"),
        ((Clip(1.0), Quantize(8), RandomK()), "sparsify before quantising"),
        ((Clip(1.0), Quantize(8), Embed(16, 4), Embed(16, 4)), "quantise first"),
        ((Hadamard(), Quantize(8)), "clip first"),
    ],
)
def test_a_wrong_order_fails_before_anything_is_encoded(stages, message):
    with pytest.raises(ConfigurationError, match=message):
        chain(Reals(8), *stages)
