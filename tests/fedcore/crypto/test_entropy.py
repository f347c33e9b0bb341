import hmac
import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import ReplayedEntropy, SystemEntropy, generator
from fedcore.errors import LocalProtocolError

FILE = Path(__file__).parents[2] / "vectors/replay_v1.json"
VECTORS = json.loads(FILE.read_text())["vectors"]

purposes = st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=10)
paths = st.lists(purposes, max_size=3)
laws = settings(deadline=None)


def descend(entropy, path):
    for name in path:
        entropy = entropy.child(name)
    return entropy


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_known_answer(vector):
    entropy = descend(ReplayedEntropy(bytes.fromhex(vector["seed"])), vector["path"])
    expected = bytes.fromhex(vector["bytes"])
    assert entropy.draw(vector["purpose"], len(expected)) == expected
    raw = generator(entropy, vector["purpose"]).bit_generator.random_raw(3)
    assert [f"{word:016x}" for word in raw.tolist()] == vector["philox"]

    # The same, from HMAC and the block cipher: counters 0, 1, 2, ... encrypted.
    path = "".join(f"/{name}" for name in vector["path"])
    info = f"fedcore/replay/{path}/{vector['purpose']}\x01".encode()
    extracted = hmac.digest(bytes(32), bytes.fromhex(vector["seed"]), "sha256")
    key = hmac.digest(extracted, info, "sha256")
    blocks = b"".join(i.to_bytes(16, "big") for i in range(-(-len(expected) // 16)))
    stream = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)
    assert stream[: len(expected)] == expected


@laws
@given(
    seed=st.binary(max_size=40),
    calls=st.lists(st.tuples(paths, purposes), max_size=6),
    data=st.data(),
)
def test_a_replay_does_not_depend_on_the_order_of_draws(seed, calls, data):
    def draws(order):
        root = ReplayedEntropy(seed)
        return {
            (tuple(path), purpose): descend(root, path).draw(purpose, 16) for path, purpose in order
        }

    assert draws(calls) == draws(data.draw(st.permutations(calls)))


@laws
@given(one=st.tuples(paths, purposes), other=st.tuples(paths, purposes))
def test_different_paths_or_purposes_have_different_draws(one, other):
    root = ReplayedEntropy(b"seed")
    (path_1, purpose_1), (path_2, purpose_2) = one, other
    same = descend(root, path_1).draw(purpose_1, 16) == descend(root, path_2).draw(purpose_2, 16)
    assert same == (one == other)


def test_a_purpose_that_looks_like_a_path_is_refused():
    # Or child("client=1").draw("noise") would be the parent's draw of "client=1/noise".
    with pytest.raises(LocalProtocolError, match="a purpose is one name without a slash"):
        ReplayedEntropy(b"seed").draw("client=1/noise", 8)


def test_a_child_named_by_a_path_is_the_child_of_a_child():
    root = ReplayedEntropy(b"seed")
    assert root.child("round=3/client=7") == root.child("round=3").child("client=7")


@given(size=st.integers(0, 100))
def test_a_shorter_draw_is_a_prefix_and_another_seed_another_draw(size):
    entropy = ReplayedEntropy(b"seed")
    assert entropy.draw("noise", size) == entropy.draw("noise", 100)[:size]
    assert entropy.draw("noise", 16) != ReplayedEntropy(b"seeds").draw("noise", 16)


def test_the_system_never_repeats_itself_whatever_the_name():
    entropy = SystemEntropy()
    draws = {entropy.child("client=1").draw("noise", 32) for _ in range(100)}
    assert len(draws) == 100
    assert {len(draw) for draw in draws} == {32}
    assert entropy.draw("noise", 0) == b""


def test_a_generator_is_determined_by_entropy_and_purpose():
    entropy = ReplayedEntropy(b"seed")

    def floats(source, purpose):
        return generator(source, purpose).random(8)

    np.testing.assert_array_equal(floats(entropy, "rounding"), floats(entropy, "rounding"))
    assert (floats(entropy, "rounding") != floats(entropy, "shuffling")).all()
    assert (floats(entropy, "rounding") != floats(entropy.child("a"), "rounding")).all()
    assert (floats(SystemEntropy(), "x") != floats(SystemEntropy(), "x")).all()


def test_the_representation_shows_the_path_but_not_the_seed():
    assert repr(ReplayedEntropy(b"secret").child("a")) == "ReplayedEntropy(path='/a')"
