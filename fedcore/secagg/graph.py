"""The public graph of who shares secrets with whom.

Clients sit on a ring in an order that depends on the round's context, and each
is joined to the k/2 on either side: a Harary graph under a random permutation
[BBGLR20, section 3.1]. Everybody computes it from public data, so the server
cannot choose anybody's neighbours.
"""

from __future__ import annotations

from functools import lru_cache

from fedcore.crypto import transcript_hash


def neighbourhood(client: int, clients: int, degree: int, context: bytes) -> frozenset[int]:
    """Return the neighbours of one client.

    A device asks for its own only: the whole graph of a large cohort takes hundreds
    of megabytes.

    Args:
        client: Index, 0..clients-1.
        clients: Number of clients invited.
        degree: Even, or clients - 1 for the complete graph.
        context: Orders the ring; both sides use the plan's digest.

    Example:
        >>> graph = [neighbourhood(client, 5, 2, b"") for client in range(5)]
        >>> all(a in graph[b] for b in range(5) for a in range(5) if b in graph[a])
        True
    """
    if degree >= clients - 1:
        return frozenset(range(clients)) - {client}
    return _around(client, clients, degree, context)


@lru_cache(maxsize=8192)
def _around(client: int, clients: int, degree: int, context: bytes) -> frozenset[int]:
    """Return who sits at most degree/2 places from `client`."""
    ring, places = _seating(clients, context)
    return frozenset(
        ring[(places[client] + sign * distance) % clients]
        for distance in range(1, degree // 2 + 1)
        for sign in (-1, 1)
    )


@lru_cache(maxsize=64)
def _seating(clients: int, context: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the client at each place of the ring, and the place of each client."""
    ring = sorted(range(clients), key=lambda index: _position(context, index))
    return tuple(ring), tuple(sorted(range(clients), key=ring.__getitem__))


def _position(context: bytes, index: int) -> bytes:
    return transcript_hash("fedcore/v1/graph", context, index.to_bytes(4, "little"))
