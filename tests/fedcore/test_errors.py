import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore import errors
from fedcore.errors import FedcoreError, HeadroomError, RoundAbortedError

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, FedcoreError)
}
PLAIN = [c for name, c in CLASSES.items() if name not in {"HeadroomError", "RoundAbortedError"}]
ABORT = RoundAbortedError(stage="upload", needed=5, found=3, reason="two boards lost power")


def test_the_hierarchy_says_who_can_repair_it():
    bases = {name: value.__bases__[0].__name__ for name, value in CLASSES.items()}
    assert bases == {
        "FedcoreError": "Exception",
        "ConfigurationError": "FedcoreError",
        "DataError": "ConfigurationError",
        "HeadroomError": "ConfigurationError",
        "BudgetExhaustedError": "FedcoreError",
        "VerificationError": "FedcoreError",
        "ProtocolError": "FedcoreError",
        "PeerProtocolError": "ProtocolError",
        "LocalProtocolError": "ProtocolError",
        "StateReusedError": "LocalProtocolError",
        "RoundAbortedError": "FedcoreError",
    }
    assert issubclass(errors.ConfigurationError, ValueError)


@pytest.mark.parametrize("error_type", CLASSES.values(), ids=CLASSES)
def test_every_class_has_its_own_explanation(error_type):
    assert error_type.__doc__
    assert error_type.__doc__ != Exception.__doc__


@given(clients=st.integers(1, 10**6), magnitude=st.integers(1, 2**31))
def test_the_needed_ring_is_the_narrowest_that_holds_the_sum(clients, magnitude):
    error = HeadroomError(clients=clients, magnitude=magnitude, bits=8)
    largest = clients * magnitude
    assert largest < 2 ** (error.needed_bits - 1)
    assert largest >= 2 ** (error.needed_bits - 2)
    assert f"a ring of {error.needed_bits} bits, got 8" in str(error)


def test_an_aborted_round_carries_its_facts_and_what_to_do():
    assert (ABORT.stage, ABORT.needed, ABORT.found) == ("upload", 5, 3)
    assert str(ABORT) == (
        "round aborted at upload: needed 5 clients, found 3 (two boards lost power); "
        "nothing was released, start a new attempt"
    )
    assert "()" not in str(RoundAbortedError(stage="upload", needed=5, found=3))


@pytest.mark.parametrize("error", [ABORT, *(c("what to do") for c in PLAIN)], ids=repr)
@pytest.mark.parametrize("travel", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_an_error_survives_the_way_between_processes(error, travel):
    arrived = travel(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


@pytest.mark.parametrize("clone", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_headroom_error_crosses_a_process_boundary_with_its_facts(clone):
    error = HeadroomError(clients=100, magnitude=127, bits=8)
    assert str(clone(error)) == str(error)
    assert clone(error).needed_bits == 15
