"""Shamir secret sharing of 32-byte secrets as one matrix product.

A secret is cut into 18 limbs of 15 bits; each limb is the constant term of its
own random polynomial of degree t-1 over the field of p = 65521 elements
[Sha79]. Holder x gets the values at x >= 1: any t of them determine the limbs,
t-1 of them are independent of the secret.

All values are below 2^16, so a sum of t products stays below t * 2^32 and is
exact in double precision for every t below 2^21: shares and reconstruction are
matrix products that BLAS computes, followed by one reduction modulo p. Since p
exceeds every limb and every index, there is room for 65,520 holders.

[Sha79] https://doi.org/10.1145/359168.359176
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.crypto.entropy import Entropy
from fedcore.errors import LocalProtocolError, PeerProtocolError

PRIME = 65521
SECRET_BYTES = 32
SHARE_BYTES = 36
_LIMBS = 18
_LIMB_BITS = 15
_SHARE = Struct(f"<{_LIMBS}H")

_Matrix = npt.NDArray[np.float64]


def split(
    secrets: Sequence[bytes], holders: Sequence[int], threshold: int, entropy: Entropy
) -> list[list[bytes]]:
    """Share each of `secrets` among `holders`.

    Args:
        secrets: 32 bytes each.
        holders: Distinct evaluation points, 1 to 65520.
        threshold: How many shares reconstruct, 1 to len(holders).
        entropy: Source of the polynomials; drawn once, as ``"shamir"``.

    Returns:
        For each secret the shares in the order of `holders`, 36 bytes each.

    Raises:
        LocalProtocolError: A size is out of range.
    """
    points = tuple(holders)
    if not 1 <= threshold <= len(points):
        msg = f"threshold must be in 1..{len(points)}, got {threshold}"
        raise LocalProtocolError(msg)
    if len(set(points)) != len(points) or not all(1 <= x < PRIME for x in points):
        msg = f"holders must be distinct points in 1..{PRIME - 1}"
        raise LocalProtocolError(msg)
    if any(len(secret) != SECRET_BYTES for secret in secrets):
        msg = f"a shared secret must be {SECRET_BYTES} bytes long"
        raise LocalProtocolError(msg)
    limbs = np.concatenate([_to_limbs(secret) for secret in secrets])
    coefficients = np.concatenate([limbs[None, :], _uniform((threshold - 1, len(limbs)), entropy)])
    values = np.fmod(_powers(points, threshold) @ coefficients, PRIME)
    words = values.astype("<u2").reshape(len(points), len(secrets), _LIMBS)
    return [[words[i, s].tobytes() for i in range(len(points))] for s in range(len(secrets))]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret that any `threshold` of `shares` determine.

    Args:
        shares: Share of each holder, by evaluation point.
        threshold: The one used to split; the lowest such points are used.

    Raises:
        PeerProtocolError: Too few shares, a malformed one, or shares that do not
            belong together.
    """
    if len(shares) < threshold:
        msg = f"reconstruction needs {threshold} shares, found {len(shares)}"
        raise PeerProtocolError(msg)
    points = tuple(sorted(shares))[:threshold]
    limbs = np.fmod(_weights(points) @ _parse_shares([shares[x] for x in points]), PRIME)
    return _from_limbs(limbs)


def check_share(share: bytes) -> None:
    """Accept what can be a share of some secret.

    Raises:
        PeerProtocolError: Wrong length, or not made of field elements.
    """
    if len(share) != SHARE_BYTES:
        msg = f"a share must be {SHARE_BYTES} bytes, found {len(share)}"
        raise PeerProtocolError(msg)
    if max(_SHARE.unpack(share)) >= PRIME:
        msg = f"a share must consist of field elements below {PRIME}"
        raise PeerProtocolError(msg)


def _parse_shares(shares: Sequence[bytes]) -> _Matrix:
    """Return the field elements [shares, limbs]."""
    for share in shares:
        check_share(share)
    return np.frombuffer(b"".join(shares), "<u2").astype(np.float64).reshape(-1, _LIMBS)


def _to_limbs(secret: bytes) -> npt.NDArray[np.float64]:
    value = int.from_bytes(secret, "little")
    mask = (1 << _LIMB_BITS) - 1
    return np.array([(value >> (_LIMB_BITS * i)) & mask for i in range(_LIMBS)], np.float64)


def _from_limbs(limbs: npt.NDArray[np.float64]) -> bytes:
    value = sum(int(limb) << (_LIMB_BITS * i) for i, limb in enumerate(limbs))
    if limbs.max() >= 1 << _LIMB_BITS or value >> (8 * SECRET_BYTES):
        msg = "the shares do not belong to one secret"
        raise PeerProtocolError(msg)
    return value.to_bytes(SECRET_BYTES, "little")


def _uniform(shape: tuple[int, int], entropy: Entropy) -> _Matrix:
    """Return uniform field elements: 64-bit words modulo p, off by less than 2^-47 each."""
    size = shape[0] * shape[1]
    words = np.frombuffer(entropy.draw("shamir", 8 * size), "<u8")
    return (words % np.uint64(PRIME)).astype(np.float64).reshape(shape)


@lru_cache(maxsize=256)
def _powers(points: tuple[int, ...], threshold: int) -> _Matrix:
    """Return the Vandermonde matrix [points, threshold] modulo p."""
    x = np.array(points, np.int64)
    columns = [np.ones_like(x)]
    for _ in range(threshold - 1):
        columns.append(columns[-1] * x % PRIME)
    return np.stack(columns, axis=1).astype(np.float64)


@lru_cache(maxsize=4096)
def _weights(points: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return the Lagrange weights [points] at zero, modulo p.

    Weight i is the product of all x_j over x_i times the product of the others' x_j - x_i.
    """
    x = np.array(points, np.int64)
    factors = (x[None, :] - x[:, None]) % PRIME
    np.fill_diagonal(factors, x)
    product = int(_products(x[None, :])[0])
    inverses = [pow(int(value), -1, PRIME) for value in _products(factors)]
    return (product * np.array(inverses, np.int64) % PRIME).astype(np.float64)


def _products(factors: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the product of each row of [rows, factors] modulo p, by halving the rows."""
    while factors.shape[1] > 1:
        half = factors.shape[1] // 2
        merged = factors[:, :half] * factors[:, half : 2 * half] % PRIME
        factors = np.concatenate([merged, factors[:, 2 * half :]], axis=1)
    return factors[:, 0]
