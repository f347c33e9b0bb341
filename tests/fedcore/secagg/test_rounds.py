import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import ReplayedEntropy
from fedcore.errors import ConfigurationError, PeerProtocolError, RoundAbortedError
from fedcore.secagg import Plan, Threat, make_plan, run_round
from tests.fedcore.secagg.rehearsal import (
    AUTHORITY,
    NOW,
    STAGES,
    complete_plan,
    identity_of,
    refusal,
    signed_plan,
    whole_round,
)

ENTROPY = ReplayedEntropy(b"rounds")


def inputs_of(plan, seed=0):
    words = np.random.default_rng(seed).integers(
        0, plan.ring.mask, (plan.clients, plan.dim), np.uint64, endpoint=True
    )
    return {client: row.astype(plan.ring.dtype) for client, row in enumerate(words)}


def exact_sum(plan, inputs, survivors):
    """In integers of any size, without numpy's own wrap-around."""
    columns = zip(*(inputs[client].tolist() for client in survivors), strict=True)
    return [sum(column) % 2**plan.ring_bits for column in columns]


def before(drops, stage):
    """Who sends the message of `stage`."""
    return {c for c, since in drops.items() if STAGES.index(since) <= STAGES.index(stage)}


@st.composite
def complete_rounds(draw):
    clients = draw(st.integers(2, 8))
    plan = Plan(
        clients,
        clients - 1,
        draw(st.integers((clients - 1) // 2 + 1, clients - 1)),
        draw(st.integers(2, clients)),
        draw(st.integers(1, 64)),
        draw(st.integers(1, 30)),
        draw(st.binary(min_size=32, max_size=32)),
    )
    drops = draw(st.dictionaries(st.integers(0, clients - 1), st.sampled_from(STAGES)))
    return plan, drops


@settings(deadline=None, max_examples=150)
@given(complete_rounds(), st.integers(0, 2**32))
def test_a_round_gives_the_exact_sum_if_and_only_if_enough_clients_remain(case, seed):
    plan, drops = case
    inputs = inputs_of(plan, seed)
    uploaded = inputs.keys() - before(drops, "upload")
    revealed = inputs.keys() - before(drops, "reveal")
    enough = len(uploaded) >= plan.minimum_survivors and len(revealed) > plan.threshold
    if enough:
        result = run_round(inputs, plan, drops)
        assert result.survivors == uploaded
        assert result.total.dtype == plan.ring.dtype
        assert result.total.tolist() == exact_sum(plan, inputs, uploaded)
    else:
        with refusal(RoundAbortedError, r"needed \d+ clients, found \d+") as caught:
            run_round(inputs, plan, drops)
        assert caught.value.found < caught.value.needed


@settings(deadline=None, max_examples=100)
@given(complete_rounds(), st.integers(0, 2**32))
def test_a_signed_round_gives_the_exact_sum_if_and_only_if_enough_clients_remain(case, seed):
    plan, drops = replace(case[0], authority=AUTHORITY), case[1]
    inputs = inputs_of(plan, seed)
    identities = {client: identity_of(client) for client in inputs}
    uploaded, endorsed, revealed = (
        inputs.keys() - before(drops, stage) for stage in ("upload", "endorse", "reveal")
    )
    assert revealed <= endorsed <= uploaded
    if len(uploaded) >= plan.minimum_survivors and len(revealed) > plan.threshold:
        result = run_round(inputs, plan, drops, identities=identities, now=NOW)
        assert result.survivors == uploaded
        assert result.total.tolist() == exact_sum(plan, inputs, uploaded)
    else:
        with refusal(RoundAbortedError, r"needed \d+ clients, found \d+") as caught:
            run_round(inputs, plan, drops, identities=identities, now=NOW)
        assert caught.value.found < caught.value.needed


@settings(deadline=None, max_examples=40)
@given(data=st.data(), clients=st.integers(6, 10), half=st.integers(1, 2))
def test_a_signed_sparse_round_gives_the_exact_sum_or_says_how_many_were_missing(
    data, clients, half
):
    context = data.draw(st.binary(min_size=32, max_size=32))
    plan = Plan(clients, 2 * half, half + 1, 2, 16, 5, context, AUTHORITY)
    stages = st.sampled_from(STAGES)
    drops = data.draw(st.dictionaries(st.integers(0, clients - 1), stages, max_size=3))
    inputs = inputs_of(plan)
    identities = {client: identity_of(client) for client in inputs}
    result = attempt(inputs, plan, drops, identities=identities, now=NOW)
    if isinstance(result, RoundAbortedError):
        assert result.found < result.needed
        assert drops
    else:
        assert result.survivors == inputs.keys() - before(drops, "upload")
        assert result.total.tolist() == exact_sum(plan, inputs, result.survivors)


@pytest.mark.parametrize(
    ("silent", "found"), [(0, None), (3, None), (4, 3), (5, 3), (6, 2), (8, 0)]
)
def test_a_sum_needs_the_endorsements_of_the_threshold_and_one_more(silent, found):
    plan = signed_plan(8, threshold=4)
    inputs = inputs_of(plan)
    identities = {client: identity_of(client) for client in inputs}
    result = attempt(
        inputs, plan, dict.fromkeys(range(silent), "endorse"), identities=identities, now=NOW
    )
    if found is None:
        assert result.survivors == inputs.keys()
    else:
        assert (result.stage, result.needed, result.found) == ("endorsing", 4, found)


def test_a_signed_round_takes_more_bytes_and_gives_the_same_sum():
    unsigned, signed = complete_plan(5), signed_plan(5)
    inputs = inputs_of(unsigned)
    identities = {client: identity_of(client) for client in inputs}
    plain = run_round(inputs, unsigned, entropy=ENTROPY)
    round_ = run_round(inputs, signed, entropy=ENTROPY, identities=identities, now=NOW)
    assert plain.total.tolist() == round_.total.tolist()
    credential = 1 + len("device-0") + 32 + 8 + 64 + 64
    for client in inputs:
        assert round_.sent_bytes[client] - plain.sent_bytes[client] == credential + 4 + 64
        received = 5 * 32 + 4 * credential + 4 + 4 + 4 * (4 + 64)
        assert round_.received_bytes[client] - plain.received_bytes[client] == received


@pytest.mark.parametrize("stage", range(5))
def test_a_client_that_drops_out_has_sent_everything_before_and_nothing_after(stage):
    plan = signed_plan(5, dim=8)
    identities = {client: identity_of(client) for client in range(5)}
    sent = run_round(
        inputs_of(plan), plan, {3: STAGES[stage]}, identities=identities, now=NOW
    ).sent_bytes
    keys = 4 + 64 + 1 + len("device-3") + 32 + 8 + 64 + 64
    boxes, upload, endorsement = 4 + 32 + 4 + 4 * (4 + 88), 4 + 16, 4 + 64
    assert sent[3] == sum((keys, boxes, upload, endorsement)[:stage])
    shares = 12 + (3 if stage < 2 else 4) * (4 + 36)
    if stage > 1:
        assert sent[0] == keys + boxes + upload + endorsement + shares


@pytest.mark.parametrize("missing", [{}, {0: None}], ids=["all", "one"])
def test_a_signed_round_without_an_identity_does_not_start(missing):
    plan = signed_plan(5)
    identities = {c: identity_of(c) for c in range(5) if c not in missing} if missing else None
    with refusal(PeerProtocolError, r"signed keys, but clients \[0.* are not enrolled"):
        run_round(inputs_of(plan), plan, identities=identities, now=NOW)


def test_indices_follow_from_the_keys_and_not_from_the_names():
    """Client 0 has the largest key here: still each input is counted under its own name."""
    plan = replace(signed_plan(5), roster=bytes(32))
    inputs = {name: plan.ring.reduce(np.full(plan.dim, 1 << name)) for name in range(5)}
    identities = {name: identity_of(4 - name) for name in range(5)}
    result = run_round(inputs, plan, {0: "upload"}, identities=identities, now=NOW)
    assert result.survivors == {1, 2, 3, 4}
    assert result.total.tolist() == [0b11110] * plan.dim


def test_a_round_is_played_by_those_whom_its_plan_names_or_not_at_all():
    plan = signed_plan(5)
    others = {client: identity_of(client + 1) for client in range(5)}
    with refusal(ConfigurationError, "expected the 5 identity keys that the plan names, found 5"):
        run_round(inputs_of(plan), plan, identities=others, now=NOW)


def test_one_device_cannot_be_two_clients():
    plan = replace(signed_plan(5), roster=bytes(32))
    twins = {client: identity_of(min(client, 3)) for client in range(5)}
    with refusal(PeerProtocolError, "must increase strictly"):
        run_round(inputs_of(plan), plan, identities=twins, now=NOW)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), clients=st.integers(6, 12), half=st.integers(1, 2))
def test_a_sparse_round_gives_the_exact_sum_or_says_how_many_were_missing(data, clients, half):
    plan = Plan(
        clients, 2 * half, half + 1, 2, 16, 5, data.draw(st.binary(min_size=32, max_size=32))
    )
    drops = data.draw(
        st.dictionaries(st.integers(0, clients - 1), st.sampled_from(STAGES), max_size=3)
    )
    inputs = inputs_of(plan)
    result = attempt(inputs, plan, drops)
    if isinstance(result, RoundAbortedError):
        assert result.found < result.needed
        assert drops
    else:
        assert result.survivors == inputs.keys() - before(drops, "upload")
        assert result.total.tolist() == exact_sum(plan, inputs, result.survivors)


def attempt(inputs, plan, drops, **terms):
    try:
        return run_round(inputs, plan, drops, **terms)
    except RoundAbortedError as error:
        return error


@pytest.mark.parametrize("stage", STAGES)
def test_a_third_of_the_clients_may_drop_out_before_any_message(stage):
    plan = make_plan(20, 40, 24, threat=Threat(dropout=0.35))
    inputs = inputs_of(plan)
    drops = dict.fromkeys((0, 3, 4, 11, 17, 19), stage)
    result = run_round(inputs, plan, drops)
    assert result.survivors == inputs.keys() - before(drops, "upload")
    assert result.total.tolist() == exact_sum(plan, inputs, result.survivors)


def test_clients_may_drop_out_at_every_stage_of_one_round():
    plan = make_plan(20, 40, 24, threat=Threat(dropout=0.35))
    inputs = inputs_of(plan)
    drops = {0: "advertise", 5: "share", 9: "upload", 10: "upload", 14: "reveal", 19: "reveal"}
    result = run_round(inputs, plan, drops)
    assert result.survivors == inputs.keys() - {0, 5, 9, 10}
    assert result.total.tolist() == exact_sum(plan, inputs, result.survivors)


def test_a_round_on_a_sparse_graph_gives_the_exact_sum():
    plan = make_plan(150, 30, 20, threat=Threat(0.05, 0.1, correctness_bits=20))
    assert plan.neighbours < 149
    inputs = inputs_of(plan)
    drops = {client: STAGES[client % 4] for client in range(0, 150, 15)}
    result = run_round(inputs, plan, drops, entropy=ENTROPY)
    assert result.survivors == inputs.keys() - before(drops, "upload")
    assert result.total.tolist() == exact_sum(plan, inputs, result.survivors)


def test_the_attempt_after_an_abort_succeeds():
    plan = complete_plan(5, context=b"attempt 0".ljust(32))
    inputs = inputs_of(plan)
    with refusal(RoundAbortedError, "start a new attempt"):
        run_round(inputs, plan, {0: "share", 1: "upload", 2: "reveal"})
    again = replace(plan, context=b"attempt 1".ljust(32))
    assert run_round(inputs, again, {0: "share"}).survivors == {1, 2, 3, 4}


def test_an_abort_survives_pickling():
    plan = complete_plan(5)
    with pytest.raises(RoundAbortedError) as caught:
        run_round(inputs_of(plan), plan, dict.fromkeys(range(4), "share"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert (copy.stage, copy.needed, copy.found) == ("sharing", 2, 1)


@pytest.mark.parametrize("absent", [{}, {3: "upload"}, {0: "advertise", 4: "reveal"}])
@pytest.mark.parametrize("authority", [bytes(32), AUTHORITY], ids=["unsigned", "signed"])
def test_the_order_of_the_replies_does_not_matter(absent, authority):
    plan = complete_plan(6, threshold=3)
    plan = replace(plan, authority=authority)
    forwards, backwards = (whole_round(plan, absent, backwards=order) for order in (False, True))
    assert forwards.transcript() == backwards.transcript()
    assert forwards.outcome.survivors == backwards.outcome.survivors
    assert forwards.outcome.total.tolist() == backwards.outcome.total.tolist()


def test_the_sum_is_the_same_for_any_randomness():
    plan = complete_plan(5)
    inputs = inputs_of(plan)
    totals = [
        run_round(inputs, plan, {2: "upload"}, entropy=entropy).total.tolist()
        for entropy in (None, ENTROPY, ENTROPY.child("other"))
    ]
    assert totals == [exact_sum(plan, inputs, {0, 1, 3, 4})] * 3


@pytest.mark.parametrize("bits", [7, 8, 16, 64])
def test_a_round_leaves_the_inputs_as_they_were(bits):
    plan = complete_plan(3, ring_bits=bits, threshold=2)
    inputs = inputs_of(plan)
    before = {client: vector.copy() for client, vector in inputs.items()}
    run_round(inputs, plan)
    assert all((inputs[client] == before[client]).all() for client in inputs)


def test_clients_may_have_any_names_and_inputs_any_integers():
    plan = complete_plan(3, ring_bits=8, dim=2, threshold=2)
    inputs = {-7: np.array([-1, 300]), 10**12: np.array([2, 2]), 5: np.array([0, -300])}
    result = run_round(inputs, plan)
    assert result.survivors == {-7, 5, 10**12}
    assert result.total.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("names", "drops", "found"),
    [
        (range(4), {}, "found 4 inputs"),
        (range(6), {}, "found 6 inputs"),
        (range(5), {9: "share"}, "drops of [9]"),
    ],
)
def test_inputs_that_do_not_fit_the_plan_are_refused(names, drops, found):
    plan = complete_plan(5)
    with refusal(ConfigurationError, f"expected inputs of 5 clients.*{re.escape(found)}"):
        run_round({name: plan.ring.zeros(6) for name in names}, plan, drops)
