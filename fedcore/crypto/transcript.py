"""Hashing of structured values without ambiguity.

A transcript hash binds a list of byte strings: each is prefixed with its length
and the whole with a label, so that no two different lists have the same input
to SHA-256.
"""

from __future__ import annotations

import hashlib

DIGEST_BYTES = 32


def transcript_hash(label: str, *parts: bytes) -> bytes:
    """Return SHA-256 over `label` and `parts`, each with its 8-byte length.

    Example:
        >>> transcript_hash("a", b"bc") == transcript_hash("a", b"b", b"c")
        False
    """
    digest = hashlib.sha256()
    for part in (label.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
