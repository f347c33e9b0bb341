import struct
from dataclasses import astuple, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import ConfigurationError
from fedcore.secagg import Plan, Threat, make_plan
from fedcore.secagg.plan import MOST_CLIENTS
from tests.fedcore.secagg.rehearsal import complete_plan, refusal

PLAN = Plan(20, 8, 6, 10, 16, 100, b"c" * 32)
BAD = [
    ("clients", 1), ("clients", 0), ("clients", MOST_CLIENTS + 1), ("clients", 8),
    ("neighbours", 7), ("neighbours", 0), ("neighbours", -2), ("neighbours", 20),
    ("neighbours", 12), ("threshold", 4), ("threshold", 1), ("threshold", 0), ("threshold", 9),
    ("minimum_survivors", 1), ("minimum_survivors", 0), ("minimum_survivors", 21),
    ("ring_bits", 0), ("ring_bits", 65), ("dim", 0), ("dim", -1), ("dim", 1 << 40),
    ("context", b""), ("context", b"c" * 31), ("context", b"c" * 33),
    ("authority", b""), ("authority", b"a" * 31), ("authority", b"a" * 33),
    ("roster", b""), ("roster", b"r" * 31), ("roster", b"r" * 33),
]  # fmt: skip
GOOD = [
    ("clients", 21), ("clients", MOST_CLIENTS), ("neighbours", 10), ("neighbours", 6),
    ("threshold", 5), ("threshold", 8), ("minimum_survivors", 2), ("minimum_survivors", 20),
    ("ring_bits", 1), ("ring_bits", 64), ("dim", 1), ("dim", (1 << 40) - 1), ("context", b"d" * 32),
    ("authority", b"a" * 32), ("roster", b"r" * 32),
]  # fmt: skip


NAMES = [(bytes(32), bytes(32)), (b"a" * 32, bytes(32)), (b"a" * 32, b"r" * 32)]
"""An authority and a roster."""


@st.composite
def plans(draw):
    clients = draw(st.integers(2, MOST_CLIENTS))
    even = st.integers(1, (clients - 1) // 2).map(lambda half: 2 * half)
    neighbours = draw(even if clients > 2 else st.just(1))
    neighbours = draw(st.sampled_from([neighbours, clients - 1]))
    return Plan(
        clients,
        neighbours,
        draw(st.integers(neighbours // 2 + 1, neighbours)),
        draw(st.integers(2, clients)),
        draw(st.integers(1, 64)),
        draw(st.integers(1, (1 << 40) - 1)),
        draw(st.binary(min_size=32, max_size=32)),
        *draw(
            st.sampled_from(
                [(bytes(32), bytes(32)), (b"a" * 32, bytes(32)), (b"a" * 32, b"r" * 32)]
            )
        ),
    )


@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_bad_value_is_refused_with_the_rule_and_the_value(field, value):
    with refusal(ConfigurationError, r"(secagg|ring)\.\w+ must be .*got"):
        replace(PLAN, **{field: value})


def test_a_sum_of_one_client_is_no_plan():
    with refusal(ConfigurationError, "clients must be in 2"):
        Plan(1, 0, 0, 2, 16, 100)


@pytest.mark.parametrize("clients", range(3, 12))
def test_a_threshold_that_two_disjoint_halves_could_reach_is_refused(clients):
    for threshold in range(-1, clients + 2):
        if (clients - 1) / 2 < threshold <= clients - 1:
            assert complete_plan(clients, threshold=threshold).threshold == threshold
        else:
            with refusal(ConfigurationError, "more than half"):
                complete_plan(clients, threshold=threshold)


@pytest.mark.parametrize(("field", "value"), GOOD)
def test_a_good_value_is_taken_and_changes_the_digest(field, value):
    plan = replace(PLAN, authority=b"b" * 32) if field == "roster" else PLAN
    changed = replace(plan, **{field: value})
    assert changed.digest() != plan.digest()
    assert Plan.from_bytes(changed.to_bytes()) == changed


def test_every_field_has_a_good_and_a_bad_value_above():
    names = {field.name for field in fields(Plan)}
    assert names == {name for name, _ in GOOD} == {name for name, _ in BAD}


@settings(deadline=None)
@given(plans())
def test_a_plan_survives_its_bytes(plan):
    assert Plan.from_bytes(plan.to_bytes()) == plan


@settings(deadline=None)
@given(plans(), plans())
def test_different_plans_have_different_digests(one, other):
    assert (one.digest() == other.digest()) == (astuple(one) == astuple(other))


def test_known_answer():
    assert PLAN.to_bytes().hex() == (
        "63" * 32 + "00" * 64 + "020001001400000008000000060000000a000000106400000000000000"
    )
    assert PLAN.digest().hex() == (
        "413c019da576dc94b26b75863ad830703f8f60241d7106db94dc79070f2d511b"
    )


@pytest.mark.parametrize("version", [0, 1, 3])
def test_another_version_is_refused_with_what_to_do(version):
    data = PLAN.to_bytes()
    other = data[:96] + struct.pack("<H", version) + data[98:]
    with refusal(ConfigurationError, f"version 2, found {version}: update the older side"):
        Plan.from_bytes(other)


@pytest.mark.parametrize("suite", [0, 2])
def test_another_suite_is_refused(suite):
    data = PLAN.to_bytes()
    with refusal(ConfigurationError, f"suite 1, found {suite}: there is no other"):
        Plan.from_bytes(data[:98] + struct.pack("<H", suite) + data[100:])


def test_a_roster_without_an_authority_is_refused():
    with refusal(ConfigurationError, "name their secagg.authority too"):
        replace(PLAN, roster=b"r" * 32)


@pytest.mark.parametrize("size", [0, 1, 59, 91, 124, 126, 1000])
def test_a_plan_of_another_size_is_refused(size):
    with refusal(ConfigurationError, f"125 bytes, found {size}"):
        Plan.from_bytes(bytes(size))


@pytest.mark.parametrize("clients", [2, 3, 20, 128, 200])
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.3])
def test_a_made_plan_withstands_the_drop_outs_it_was_made_for(clients, dropout):
    plan = make_plan(clients, 10, 16, threat=Threat(0.05, dropout))
    assert plan.minimum_survivors == max(2, clients - int(dropout * clients))
    assert plan.threshold <= plan.neighbours
    if clients <= 128:
        assert plan.neighbours - int(dropout * clients) >= plan.threshold


def test_a_made_plan_keeps_what_it_was_given():
    names = {"authority": b"a" * 32, "roster": b"r" * 32}
    plan = make_plan(30, 7, 12, minimum_survivors=25, context=b"x" * 32, **names)
    assert (plan.clients, plan.dim, plan.ring_bits) == (30, 7, 12)
    assert (plan.minimum_survivors, plan.context) == (25, b"x" * 32)
    assert (plan.authority, plan.roster) == (b"a" * 32, b"r" * 32)


def test_a_plan_is_authenticated_if_it_names_an_authority():
    assert not PLAN.authenticated
    assert not make_plan(30, 7, 12).authenticated
    assert replace(PLAN, authority=b"a" * 32).authenticated
    assert replace(PLAN, authority=bytes(31) + b"\1").authenticated
