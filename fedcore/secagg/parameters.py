"""How many neighbours, and how many of them must agree.

In the protocol of [BBGLR20] a client shares its secrets with k neighbours on a
random Harary graph, and t of them reconstruct. For n clients, of which a
fraction gamma collude with the server and a fraction delta do not respond, k and
t are the smallest that make all three of these fail only negligibly:

    connected   the honest clients that respond form a connected graph; two runs
                of k/2 bad positions on the ring would cut it
    secret      no honest client has t or more colluding neighbours
    correct     every client has at least t responding neighbours

A server that may lie about who dropped out could ask half of the neighbours for
one secret of a client and the other half for the other. Two such requests cannot
both succeed if 2t > k + (colluding neighbours); `malicious=True` asks for that.

Up to `COMPLETE_UP_TO` clients the graph is complete: it costs nothing there, and
its connectivity does not rest on the drop-outs being independent of the graph.

[BBGLR20] Bell et al., CCS 2020, sections 3.1 and 4. https://eprint.iacr.org/2020/704
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, lgamma, log

from fedcore.errors import ConfigurationError

COMPLETE_UP_TO = 128
SECURITY_BITS = 40
GRINDING_BITS = 40
"""A sparse graph follows from a digest that the coordinator can vary: 2^40 draws of it are
paid for by as many bits on top of 40."""
MOST_BITS = 128


@dataclass(frozen=True, slots=True)
class Threat:
    """What the parameters must withstand.

    Attributes:
        corrupt: Fraction of the clients that collude with the server, in [0, 1/2).
        dropout: Fraction of the clients that may not respond, in [0, 1).
        security_bits: The secrecy of the round fails with probability 2^-this.
        correctness_bits: An honest round fails with probability 2^-this.
        malicious: Whether the server may lie about who dropped out.
    """

    corrupt: float = 0.1
    dropout: float = 0.1
    security_bits: int = SECURITY_BITS
    correctness_bits: int = 30
    malicious: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.corrupt < 0.5:
            msg = f"secagg.corrupt must be in [0, 0.5), got {self.corrupt}"
            raise ConfigurationError(msg)
        if not 0 <= self.dropout < 1 or self.corrupt + self.dropout >= 1:
            msg = (
                "secagg.dropout must be in [0, 1) and below 1 - secagg.corrupt, "
                f"got dropout={self.dropout}, corrupt={self.corrupt}"
            )
            raise ConfigurationError(msg)
        for name in ("security_bits", "correctness_bits"):
            if not 1 <= getattr(self, name) <= MOST_BITS:
                msg = f"secagg.{name} must be in 1..{MOST_BITS}, got {getattr(self, name)}"
                raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class Degree:
    """The degree of the graph and the reconstruction threshold."""

    neighbours: int
    threshold: int


def choose_degree(clients: int, threat: Threat) -> Degree:
    """Return the complete graph for small cohorts, a sparse one for large ones.

    Raises:
        ConfigurationError: No threshold withstands `threat` with so many clients.
    """
    if clients <= COMPLETE_UP_TO:
        return _complete(clients, threat)
    return sparse_degree(clients, threat, majority=True)


def _complete(clients: int, threat: Threat) -> Degree:
    """Return k = n-1 and the lowest threshold; nothing is left to chance."""
    neighbours = clients - 1
    colluding, silent = int(threat.corrupt * clients), int(threat.dropout * clients)
    threshold = max(
        _threshold(neighbours, colluding, malicious=threat.malicious), _majority(neighbours)
    )
    if threshold > neighbours - silent:
        msg = (
            f"{clients} clients with corrupt={threat.corrupt} and dropout={threat.dropout} need "
            f"{threshold} responding neighbours, but only {neighbours - silent} are sure to "
            "respond: invite more clients, or lower secagg.corrupt or secagg.dropout"
        )
        raise ConfigurationError(msg)
    return Degree(neighbours, threshold)


@lru_cache(maxsize=256)
def sparse_degree(clients: int, threat: Threat, *, majority: bool = False) -> Degree:
    """Return the smallest even degree of a Harary graph that withstands `threat`.

    Args:
        clients: Number invited.
        threat: What to withstand.
        majority: Whether the threshold must exceed half of the neighbours, as a plan's must
            even where the server is trusted not to lie.

    Raises:
        ConfigurationError: There is none below the complete graph.
    """
    for neighbours in range(2, clients, 2):
        if not _connected(clients, neighbours, threat):
            continue
        colluding = _most_colluding(clients, neighbours, threat)
        threshold = _threshold(neighbours, colluding, malicious=threat.malicious)
        if majority:
            threshold = max(threshold, _majority(neighbours))
        if threshold <= _fewest_responding(clients, neighbours, threat):
            return Degree(neighbours, threshold)
    msg = (
        f"no neighbour graph on {clients} clients withstands corrupt={threat.corrupt} with "
        f"dropout={threat.dropout}: lower one of them, or invite more clients"
    )
    raise ConfigurationError(msg)


def _threshold(neighbours: int, colluding: int, *, malicious: bool) -> int:
    if not malicious:
        return colluding + 1
    return min(neighbours, ceil((colluding + neighbours - 1.25) / 2) + 1)


def _majority(neighbours: int) -> int:
    return neighbours // 2 + 1


def _connected(clients: int, neighbours: int, threat: Threat) -> bool:
    """Bound the probability of two runs of k/2 bad positions by a union over all pairs."""
    bad = int(threat.corrupt * clients) + int(threat.dropout * clients)
    if bad < neighbours:
        return True
    pairs = clients * (clients - neighbours - 1) / 2
    if pairs <= 0:
        return True
    log_cut = _log_choose(clients - neighbours, bad - neighbours) - _log_choose(clients, bad)
    return log(pairs) + log_cut <= -(threat.security_bits + 1) * log(2)


def _most_colluding(clients: int, neighbours: int, threat: Threat) -> int:
    """Return the t1 that the colluding neighbours of no client exceed."""
    allowed = 2.0 ** -(threat.security_bits + 1) / clients
    colluding = int(threat.corrupt * clients)
    tail = 0.0
    for count in range(min(colluding, neighbours), 0, -1):
        tail += _hypergeometric(clients - 1, colluding, neighbours, count)
        if tail > allowed:
            return count
    return 0


def _fewest_responding(clients: int, neighbours: int, threat: Threat) -> int:
    """Return the t2 that the responding neighbours of every client reach."""
    allowed = 2.0**-threat.correctness_bits / clients
    responding = clients - 1 - int(threat.dropout * clients)
    tail = 0.0
    for count in range(max(0, neighbours - (clients - 1 - responding)), neighbours + 1):
        tail += _hypergeometric(clients - 1, responding, neighbours, count)
        if tail > allowed:
            return count
    return neighbours


def _hypergeometric(population: int, marked: int, drawn: int, count: int) -> float:
    """Return P[`count` of `drawn` are marked], drawing without replacement."""
    if count > marked or drawn - count > population - marked:
        return 0.0
    return exp(
        _log_choose(marked, count)
        + _log_choose(population - marked, drawn - count)
        - _log_choose(population, drawn)
    )


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
