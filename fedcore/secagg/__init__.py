"""Secure aggregation: the server learns the sum of the clients' vectors and nothing else."""

from fedcore.secagg.client import (
    AwaitingDelivery,
    AwaitingEndorsements,
    AwaitingRoster,
    AwaitingSurvivors,
    ClientState,
    Finished,
    join,
)
from fedcore.secagg.identity import Certificate, Identity
from fedcore.secagg.loopback import RoundResult, run_round
from fedcore.secagg.machine import CLIENT_TRANSITIONS, OneShot, expected_request, step
from fedcore.secagg.parameters import Degree, Threat, choose_degree, sparse_degree
from fedcore.secagg.plan import Plan, make_plan
from fedcore.secagg.seating import roster_digest
from fedcore.secagg.server import Outcome, invite
from fedcore.secagg.storage import dump_state, load_state
from fedcore.secagg.wire import decode, encode

__all__ = [
    "CLIENT_TRANSITIONS",
    "AwaitingDelivery",
    "AwaitingEndorsements",
    "AwaitingRoster",
    "AwaitingSurvivors",
    "Certificate",
    "ClientState",
    "Degree",
    "Finished",
    "Identity",
    "OneShot",
    "Outcome",
    "Plan",
    "RoundResult",
    "Threat",
    "choose_degree",
    "decode",
    "dump_state",
    "encode",
    "expected_request",
    "invite",
    "join",
    "load_state",
    "make_plan",
    "roster_digest",
    "run_round",
    "sparse_degree",
    "step",
]
