"""The public graph of who shares secrets with whom.

Clients sit on a ring in an order that depends on the round's context, and each
is joined to the k/2 on either side: a Harary graph under a random permutation
[BBGLR20, section 3.1]. Everybody computes it from public data, so the server
cannot choose anybody's neighbours.
"""

from __future__ import annotations

from functools import lru_cache

from fedcore.crypto import transcript_hash


@lru_cache(maxsize=64)
def neighbourhoods(clients: int, degree: int, context: bytes) -> tuple[frozenset[int], ...]:
    """Return the neighbours of each client index 0..clients-1.

    Args:
        clients: Number of clients invited.
        degree: Even, or clients - 1 for the complete graph.
        context: Orders the ring; both sides use the plan's digest.

    Example:
        >>> graph = neighbourhoods(5, 2, b"")
        >>> all(a in graph[b] for b in range(5) for a in graph[b] if b in graph[a])
        True
    """
    everybody = frozenset(range(clients))
    if degree >= clients - 1:
        return tuple(everybody - {index} for index in range(clients))
    ring = sorted(everybody, key=lambda index: _position(context, index))
    graph: list[frozenset[int]] = [frozenset()] * clients
    for place, index in enumerate(ring):
        graph[index] = frozenset(
            ring[(place + sign * distance) % clients]
            for distance in range(1, degree // 2 + 1)
            for sign in (-1, 1)
        )
    return tuple(graph)


def _position(context: bytes, index: int) -> bytes:
    return transcript_hash("fedcore/v1/graph", context, index.to_bytes(4, "little"))
