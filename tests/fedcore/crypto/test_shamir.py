import json
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import SECRET_BYTES, SHARE_BYTES, ReplayedEntropy, combine, shamir, split
from fedcore.errors import LocalProtocolError, PeerProtocolError

FILE = Path(__file__).parents[2] / "vectors/shamir_v1.json"
VECTORS = json.loads(FILE.read_text())["vectors"]
P = shamir.PRIME
LIMBS = 18

secrets_of_32 = st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES)
laws = settings(deadline=None)


class Scripted:
    """Entropy whose draw is given in advance."""

    def __init__(self, words):
        self.bytes = np.asarray(words, "<u8").tobytes()

    def draw(self, purpose, size):
        assert (purpose, size) == ("shamir", len(self.bytes))
        return self.bytes

    def child(self, name):
        return self


@st.composite
def sharings(draw, largest=12):
    """Draw holders, a threshold and a subset that is large enough."""
    holders = draw(st.lists(st.integers(1, P - 1), min_size=1, max_size=largest, unique=True))
    threshold = draw(st.integers(1, len(holders)))
    subset = draw(st.lists(st.sampled_from(holders), min_size=threshold, unique=True))
    return holders, threshold, subset


def one_secret(secret, holders, threshold, seed=b"seed"):
    (shares,) = split([secret], holders, threshold, ReplayedEntropy(seed))
    return dict(zip(holders, shares, strict=True))


def naive_split(secrets, holders, threshold, entropy):
    """Return the specification: each limb the constant term of its own polynomial."""
    width = LIMBS * len(secrets)
    words = np.frombuffer(entropy.draw("shamir", 8 * (threshold - 1) * width), "<u8").tolist()
    shares = []
    for s, secret in enumerate(secrets):
        value = int.from_bytes(secret, "little")
        row = []
        for x in holders:
            share = b""
            for limb in range(LIMBS):
                column = s * LIMBS + limb
                terms = [words[k * width + column] for k in range(threshold - 1)]
                constant = (value >> 15 * limb) & 0x7FFF
                y = constant + sum(c * pow(x, k, P) for k, c in enumerate(terms, start=1))
                share += (y % P).to_bytes(2, "little")
            row.append(share)
        shares.append(row)
    return shares


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_known_answer(vector):
    secrets = [bytes.fromhex(secret) for secret in vector["secrets"]]
    holders, threshold = vector["holders"], vector["threshold"]
    entropy = ReplayedEntropy(bytes.fromhex(vector["entropy"]))
    shares = split(secrets, holders, threshold, entropy)
    assert [[share.hex() for share in row] for row in shares] == vector["shares"]
    assert naive_split(secrets, holders, threshold, entropy) == shares
    for secret, row in zip(secrets, shares, strict=True):
        assert combine(dict(zip(holders, row, strict=True)), threshold) == secret


@laws
@given(secret=secrets_of_32, sharing=sharings())
def test_any_threshold_of_shares_reconstructs(secret, sharing):
    holders, threshold, subset = sharing
    shares = one_secret(secret, holders, threshold)
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    assert combine({x: shares[x] for x in subset}, threshold) == secret


@laws
@given(secrets=st.lists(secrets_of_32, min_size=1, max_size=4), sharing=sharings(6))
def test_secrets_shared_together_are_independent_sharings(secrets, sharing):
    holders, threshold, subset = sharing
    entropy = ReplayedEntropy(b"seed")
    rows = split(secrets, holders, threshold, entropy)
    assert rows == naive_split(secrets, holders, threshold, entropy)
    for secret, row in zip(secrets, rows, strict=True):
        by_holder = dict(zip(holders, row, strict=True))
        assert combine({x: by_holder[x] for x in subset}, threshold) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32], ids=["zeros", "ones"])
@pytest.mark.parametrize("holder", [1, 2, 40000, P - 1])
def test_one_share_of_two_takes_every_value_exactly_once_whatever_the_secret(secret, holder):
    # Every coefficient once: the first 17 limbs of a secret are used, the last is short.
    copies = -(-P // (LIMBS - 1))
    coefficients = np.zeros((copies, LIMBS), np.int64)
    coefficients[:, :-1].flat[:] = np.arange(copies * (LIMBS - 1))
    other = holder % (P - 1) + 1
    rows = split([secret] * copies, [holder, other], 2, Scripted(coefficients))
    limbs = np.array([np.frombuffer(row[0], "<u2")[:-1] for row in rows]).ravel()[:P]
    np.testing.assert_array_equal(np.sort(limbs), np.arange(P))


@laws
@given(holders=st.lists(st.integers(1, P - 1), min_size=1, max_size=7, unique=True))
def test_fewer_shares_than_the_threshold_are_a_bijection_of_the_coefficients(holders):
    # For a fixed secret, t-1 shares = secret + M c with the t-1 uniform coefficients c.
    # M is invertible, so the shares are uniform: they do not depend on the secret.
    matrix = shamir._powers(tuple(holders), len(holders) + 1)[:, 1:].astype(int).tolist()
    determinant, size = 1, len(holders)
    for k in range(size):
        pivot = next(row for row in range(k, size) if matrix[row][k] % P)
        matrix[k], matrix[pivot] = matrix[pivot], matrix[k]
        determinant = determinant * matrix[k][k] % P
        inverse = pow(matrix[k][k], -1, P)
        for row in range(k + 1, size):
            factor = matrix[row][k] * inverse
            matrix[row] = [
                (a - factor * b) % P for a, b in zip(matrix[row], matrix[k], strict=True)
            ]
    assert determinant != 0


def test_sums_of_products_stay_exact_at_the_largest_values():
    assert (P - 1) * (P - 1) ** 2 < 2**53, "even with the largest threshold"
    threshold = 2000
    holders = list(range(P - threshold, P))
    (shares,) = split(
        [b"\xff" * 32], holders, threshold, Scripted(np.full((threshold - 1, LIMBS), P - 1))
    )
    for x, share in list(zip(holders, shares, strict=True))[::97]:
        geometric = sum(pow(x, k, P) for k in range(1, threshold))
        assert int.from_bytes(share[:2], "little") == (0x7FFF - geometric) % P
    assert combine(dict(zip(holders, shares, strict=True)), threshold) == b"\xff" * 32


@laws
@given(secret=secrets_of_32, sharing=sharings(), limb=st.integers(0, LIMBS - 1), data=st.data())
def test_an_altered_share_never_gives_the_secret(secret, sharing, limb, data):
    holders, threshold, _ = sharing
    shares = one_secret(secret, holders, threshold)
    victim = sorted(holders)[data.draw(st.integers(0, threshold - 1))]
    words = np.frombuffer(shares[victim], "<u2").copy()
    words[limb] = (int(words[limb]) + data.draw(st.integers(1, P - 1))) % P
    shares[victim] = words.tobytes()
    with suppress(PeerProtocolError):
        assert combine(shares, threshold) != secret


@pytest.mark.parametrize("threshold", [2, 3, 10])
def test_shares_of_different_secrets_do_not_combine(threshold):
    holders = list(range(1, threshold + 1))
    for attempt in range(20):
        one = one_secret(sha256(b"1").digest(), holders, threshold, bytes([attempt]))
        other = one_secret(sha256(b"2").digest(), holders, threshold, bytes([100 + attempt]))
        # By chance they would form a secret once in 2^32.
        with pytest.raises(PeerProtocolError, match="do not belong to one secret"):
            combine({**one, 1: other[1]}, threshold)


@laws
@given(
    shares=st.dictionaries(
        st.integers(1, P - 1),
        st.binary(max_size=40) | st.binary(min_size=SHARE_BYTES, max_size=SHARE_BYTES),
        max_size=4,
    ),
    threshold=st.integers(1, 4),
)
def test_arbitrary_bytes_give_a_secret_or_are_the_peers_fault(shares, threshold):
    with suppress(PeerProtocolError):
        assert len(combine(shares, threshold)) == SECRET_BYTES


@pytest.mark.parametrize(("limb", "value"), [(0, 2**15), (16, 2**15), (17, 2), (17, 2**15)])
def test_a_reconstructed_limb_that_no_secret_has_is_refused(limb, value):
    words = np.zeros(LIMBS, "<u2")
    words[limb] = value
    with pytest.raises(PeerProtocolError, match="do not belong to one secret"):
        combine({1: words.tobytes()}, 1)


@pytest.mark.parametrize("size", [0, SHARE_BYTES - 1, SHARE_BYTES + 1])
def test_a_share_of_wrong_length_is_refused(size):
    with pytest.raises(PeerProtocolError, match=f"must be 36 bytes, found {size}"):
        combine({1: bytes(size)}, 1)


@pytest.mark.parametrize("word", [P, 0xFFFF])
def test_a_share_outside_the_field_is_refused(word):
    share = bytes(SHARE_BYTES - 2) + word.to_bytes(2, "little")
    with pytest.raises(PeerProtocolError, match="field elements below 65521"):
        combine({1: share}, 1)


def test_too_few_shares_are_refused():
    shares = one_secret(bytes(32), [1, 2, 3], 3)
    del shares[2]
    with pytest.raises(PeerProtocolError, match="needs 3 shares, found 2"):
        combine(shares, 3)


@pytest.mark.parametrize(
    ("secret", "holders", "threshold", "message"),
    [
        (bytes(32), [1, 2], 0, r"threshold must be in 1\.\.2, got 0"),
        (bytes(32), [1, 2], 3, r"threshold must be in 1\.\.2, got 3"),
        (bytes(32), [1, 1], 2, "distinct points"),
        (bytes(32), [0, 1], 2, r"points in 1\.\.65520"),
        (bytes(32), [1, P], 2, r"points in 1\.\.65520"),
        (bytes(31), [1, 2], 2, "32 bytes"),
        (bytes(33), [1, 2], 2, "32 bytes"),
    ],
)
def test_a_sharing_that_cannot_work_is_refused(secret, holders, threshold, message):
    with pytest.raises(LocalProtocolError, match=message):
        split([secret], holders, threshold, ReplayedEntropy(b""))
