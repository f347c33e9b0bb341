import json
import tracemalloc
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedcore.crypto import SEED_BYTES, Mask, add_masks, expand, streams
from fedcore.errors import LocalProtocolError
from fedcore.ring import Ring

FOLDER = Path(__file__).parents[2] / "vectors"
CTR = json.loads((FOLDER / "aes256_ctr_sp800_38a.json").read_text())["vectors"]
VECTORS = json.loads((FOLDER / "streams_v1.json").read_text())

SEEDS = [sha256(bytes([i])).digest() for i in range(5)]
laws = settings(deadline=None, max_examples=50)


def name(vector):
    return vector["name"]


def from_hex(values, ring):
    return np.array([int(value, 16) for value in values], ring.dtype)


def encrypted_counters(seed, dim, ring):
    """Return the specification: encrypted counters 0, 1, 2, ... read as little-endian words."""
    size = dim * ring.dtype.itemsize
    counters = b"".join(i.to_bytes(16, "big") for i in range(-(-size // 16)))
    stream = Cipher(algorithms.AES(seed), modes.ECB()).encryptor().update(counters)[:size]
    return ring.reduce(np.frombuffer(stream, ring.dtype.newbyteorder("<")))


@pytest.mark.parametrize("vector", CTR, ids=name)
def test_the_cipher_answers_as_in_sp_800_38a(vector):
    key, counter, plaintext, ciphertext = (
        bytes.fromhex(vector[field]) for field in ("key", "counter", "plaintext", "ciphertext")
    )
    out = np.empty(len(plaintext) + 16, np.uint8)
    written = (
        Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update_into(plaintext, out.data)
    )
    assert out[:written].tobytes() == ciphertext


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=name)
def test_known_answer(vector):
    seed, ring = bytes.fromhex(vector["seed"]), Ring(vector["bits"])
    expected = from_hex(vector["elements"], ring)
    np.testing.assert_array_equal(expand(seed, len(expected), ring), expected)
    np.testing.assert_array_equal(encrypted_counters(seed, len(expected), ring), expected)


@pytest.mark.parametrize("vector", VECTORS["masked"], ids=name)
def test_known_answer_of_several_masks(vector):
    ring = Ring(vector["bits"])
    masks = [Mask(bytes.fromhex(mask["seed"]), mask["sign"]) for mask in vector["masks"]]
    masked = add_masks(from_hex(vector["x"], ring), masks, ring)
    np.testing.assert_array_equal(masked, from_hex(vector["masked"], ring))


@pytest.mark.parametrize("vector", VECTORS["long"], ids=name)
def test_known_answer_over_several_blocks(vector):
    ring = Ring(vector["bits"])
    x = expand(bytes.fromhex(vector["seed"]), vector["dim"], ring)
    assert sha256(x.astype(x.dtype.newbyteorder("<")).tobytes()).hexdigest() == vector["sha256"]


@pytest.mark.parametrize("bits", [3, 8, 12, 16, 20, 32, 40, 64])
def test_block_boundaries_leave_no_trace(bits):
    ring = Ring(bits)
    block = streams._BLOCK_BYTES // ring.dtype.itemsize
    longest = expand(SEEDS[0], 2 * block + 3, ring)
    np.testing.assert_array_equal(longest, encrypted_counters(SEEDS[0], len(longest), ring))
    for dim in (0, 1, 15, block - 1, block, block + 1, 2 * block):
        np.testing.assert_array_equal(expand(SEEDS[0], dim, ring), longest[:dim])


@laws
@given(
    bits=st.integers(1, 64),
    dim=st.integers(0, 100),
    block=st.sampled_from((8, 16, 24, 64, 1024)),
    at_once=st.integers(1, 6),
    signs=st.lists(st.sampled_from((1, -1)), max_size=5),
)
def test_masking_is_the_naive_sum_of_signed_streams_for_every_block_size(
    bits, dim, block, at_once, signs
):
    ring = Ring(bits)
    masks = [Mask(seed, sign) for seed, sign in zip(SEEDS, signs, strict=False)]
    x = expand(bytes(SEED_BYTES), dim, ring)
    before = x.copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_BLOCK_BYTES", block)
        patch.setattr(streams, "MASKS_AT_ONCE", at_once)
        masked = add_masks(x, masks, ring)

    naive = [
        (value + sum(mask.sign * stream for mask, stream in zip(masks, words, strict=True)))
        % 2**bits
        for value, *words in zip(
            x.tolist(),
            *(encrypted_counters(mask.seed, dim, ring).tolist() for mask in masks),
            strict=True,
        )
    ]
    assert masked.tolist() == naive
    assert masked.dtype == ring.dtype
    np.testing.assert_array_equal(x, before)


@laws
@given(bits=st.integers(1, 64), dim=st.integers(0, 300), data=st.data())
def test_opposite_masks_cancel_in_any_order(bits, dim, data):
    ring = Ring(bits)
    x = expand(bytes(SEED_BYTES), dim, ring)
    masks = data.draw(st.permutations([Mask(seed, s) for seed in SEEDS for s in (1, -1)]))
    np.testing.assert_array_equal(add_masks(x, iter(masks), ring), x)
    np.testing.assert_array_equal(add_masks(add_masks(x, masks[:4], ring), masks[4:], ring), x)


@pytest.mark.parametrize(("bits", "dim"), [(8, 1 << 16), (12, 1 << 18), (16, 1 << 21)])
@pytest.mark.parametrize("value", [0, 1])
def test_a_masked_vector_is_uniform_whatever_it_hides(bits, dim, value):
    ring = Ring(bits)
    x = ring.reduce(np.full(dim, value * 37))
    masked = add_masks(x, [Mask(SEEDS[1]), Mask(SEEDS[2], -1)], ring)
    counts = np.bincount(masked, minlength=1 << bits)
    assert 1e-3 < stats.chisquare(counts).pvalue < 1 - 1e-3


def test_masks_of_different_seeds_are_uncorrelated():
    dim, ring = 1 << 16, Ring(32)
    lifted = [ring.lift(expand(seed, dim, ring)) / 2**31 for seed in SEEDS]
    correlations = np.corrcoef(lifted)[np.triu_indices(len(SEEDS), 1)]
    assert np.abs(correlations).max() < 4.5 / np.sqrt(dim)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_seed_of_wrong_length_is_refused(size):
    with pytest.raises(LocalProtocolError, match=f"32 bytes, got {size}"):
        expand(bytes(size), 4, Ring(16))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int16, np.float64])
def test_elements_of_a_wrong_dtype_are_refused(dtype):
    with pytest.raises(LocalProtocolError, match=f"dtype uint16, found {np.dtype(dtype)}"):
        add_masks(np.zeros(4, dtype), [], Ring(12))


def test_the_representation_of_a_mask_hides_its_seed():
    assert repr(Mask(SEEDS[0], -1)) == "Mask(sign=-1)"


@pytest.mark.parametrize("bits", [5, 12, 16, 64])
def test_masking_in_place_gives_the_same_and_needs_no_second_vector(bits):
    ring = Ring(bits)
    x = expand(SEEDS[0], 3000, ring)
    masks = [Mask(SEEDS[1]), Mask(SEEDS[2], -1)]
    expected = add_masks(x, masks, ring)
    other = ring.zeros(3000)
    assert add_masks(x, masks, ring, out=other) is other
    np.testing.assert_array_equal(other, expected)
    assert add_masks(x, masks, ring, out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_masking_holds_no_vector_beside_its_result():
    ring = Ring(12)
    x = ring.zeros(1 << 21)
    tracemalloc.start()
    masked = add_masks(x, [Mask(seed) for seed in SEEDS], ring)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert masked.nbytes <= peak < 1.2 * masked.nbytes


@pytest.mark.parametrize("first_byte", [16, 4096, 1 << 36])
def test_a_stream_can_be_entered_at_any_cipher_block(first_byte):
    ring = Ring(16)
    ((stream, sign),) = streams.open_streams([Mask(SEEDS[0])], first_byte)
    counter = (first_byte // 16).to_bytes(16, "big")
    cipher = Cipher(algorithms.AES(SEEDS[0]), modes.ECB()).encryptor()
    total = ring.zeros(8)
    streams.fold_streams(total, [(stream, sign)], ring)
    assert total.astype("<u2").tobytes() == cipher.update(counter)


def test_an_output_that_does_not_fit_is_refused():
    ring = Ring(16)
    with pytest.raises(LocalProtocolError, match=r"output of shape \(4,\), found \(5,\)"):
        add_masks(ring.zeros(4), [], ring, out=ring.zeros(5))
    with pytest.raises(LocalProtocolError, match="dtype uint16, found uint32"):
        add_masks(ring.zeros(4), [], ring, out=np.zeros(4, np.uint32))


@pytest.mark.parametrize("size", [0, 31])
def test_a_bad_seed_leaves_the_output_untouched(size):
    x = np.arange(4, dtype=np.uint16)
    with pytest.raises(LocalProtocolError, match="must be 32 bytes"):
        add_masks(x, [Mask(SEEDS[0]), Mask(bytes(size))], Ring(16), out=x)
    assert x.tolist() == [0, 1, 2, 3]
