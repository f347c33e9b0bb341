"""Cases at the very edge of a rule, which mutation testing found untested."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest

from fedcore.crypto import KeyPair, ReplayedEntropy, add_masks
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.secagg import (
    Certificate,
    Degree,
    Identity,
    Plan,
    Threat,
    decode,
    encode,
    join,
    sparse_degree,
)
from fedcore.secagg.identity import Credential, _statement
from fedcore.secagg.loopback import run_round
from fedcore.secagg.messages import Invitation, MaskedInput, Roster
from fedcore.secagg.parameters import _connected, _fewest_responding
from fedcore.secagg.plan import MOST_CLIENTS
from fedcore.secagg.seed_helper import HelperPlan
from fedcore.secagg.seed_helper.coordinator import AwaitingInputs, AwaitingMaskSum
from fedcore.secagg.seed_helper.loopback import run_helper_round
from fedcore.secagg.seed_helper.messages import MaskSum, SeedBox
from fedcore.secagg.server import invite
from tests.fedcore.secagg.rehearsal import (
    NOW,
    ROOT,
    at_stage,
    complete_plan,
    identity_of,
    keys_of,
    refusal,
    signed_plan,
)

ENTROPY = ReplayedEntropy(b"boundaries")
HELPER = KeyPair.generate(ENTROPY, "helper-key")
HELPER_PLAN = HelperPlan(3, 2, 16, 4, context=bytes(32), helper_key=HELPER.public)


@pytest.mark.parametrize("clients", [24, 60, 200])
@pytest.mark.parametrize(("corrupt", "dropout"), [(0.1, 0.1), (0.05, 0.3), (0.3, 0.05), (0.2, 0.2)])
def test_a_graph_is_connected_with_as_many_bits_as_the_union_bound_leaves_and_not_with_one_more(
    clients, corrupt, dropout
):
    bad, tight = int(corrupt * clients) + int(dropout * clients), 0
    for neighbours in range(2, bad + 1, 2):
        cuts = (
            clients * (clients - neighbours - 1) // 2 * comb(clients - neighbours, bad - neighbours)
        )
        bits = (comb(clients, bad) // cuts).bit_length() - 2  # cuts * 2^(bits + 1) <= all
        for offset, connected in ((0, True), (1, False)):
            if 1 <= bits + offset <= 128:
                threat = Threat(corrupt, dropout, security_bits=bits + offset)
                assert _connected(clients, neighbours, threat) is connected
                tight += 1
    assert tight


def certified_until(expires_at: int) -> Identity:
    """A device whose certificate names any time, as `issue` would refuse to."""
    key = identity_of(0).key
    signature = ROOT.sign(_statement("device-0", key.public.raw, expires_at))
    return Identity(Certificate("device-0", key.public.raw, expires_at, signature), key)


def test_where_no_time_is_named_it_is_second_zero():
    """A certificate that expires with the first second is still valid, one of before is not."""
    plan = signed_plan(3)
    server, invitations = invite(plan, keys_of(plan))
    state, advertisement = join(invitations[0], ENTROPY, identity=certified_until(1))
    server = server.on_advertisement(0, advertisement)
    peers = {}
    for client in (1, 2):
        entropy = ENTROPY.child(str(client))
        _, peers[client] = join(invitations[client], entropy, identity=identity_of(client))
    state.on_roster(Roster(peers), ENTROPY, identity=certified_until(1))
    inputs = dict.fromkeys(range(3), plan.ring.zeros(plan.dim))
    identities = {0: certified_until(1), 1: identity_of(1), 2: identity_of(2)}
    assert run_round(inputs, plan, identities=identities).survivors == {0, 1, 2}

    with pytest.raises(PeerProtocolError, match="expired at 0, it is 0"):
        join(invitations[0], ENTROPY, identity=certified_until(0))
    _, late = join(invitations[0], ENTROPY, identity=certified_until(0), now=-1)
    with pytest.raises(PeerProtocolError, match="expired at 0, it is 0"):
        invite(plan, keys_of(plan))[0].on_advertisement(0, late)
    state, _ = join(invitations[1], ENTROPY.child("1"), identity=identity_of(1))
    with pytest.raises(PeerProtocolError, match="expired at 0, it is 0"):
        state.on_roster(Roster({0: late, 2: peers[2]}), ENTROPY, identity=identity_of(1))
    with pytest.raises(PeerProtocolError, match="expired at 0, it is 0"):
        run_round(inputs, plan, identities=identities | {0: certified_until(0)})


def test_a_roster_in_another_order_is_the_same_roster():
    rehearsal = at_stage("share")
    roster = rehearsal.requests[0]
    backwards = Roster(dict(reversed(roster.keys.items())))
    assert list(backwards.keys) != list(roster.keys)
    assert rehearsal.answer(0, backwards) == rehearsal.answer(0, roster)


@pytest.mark.parametrize("bits", [8, 16, 64])
def test_an_upload_as_wide_as_its_elements_is_read_without_a_copy(bits):
    plan = complete_plan(ring_bits=bits)
    data = encode(MaskedInput(plan.ring.zeros(6)), plan)
    vector = decode(data, MaskedInput, plan).vector
    assert np.shares_memory(vector, np.frombuffer(data, np.uint8))
    assert not vector.flags.writeable


@pytest.mark.parametrize("gone", [{}, {"c1": "upload"}])
def test_what_is_taken_from_the_sum_are_masks_whose_sign_is_plus_or_minus_one(gone):
    seen = []

    def unmask(total, masks, ring):
        seen.extend(masks)
        return add_masks(total, masks, ring)

    rehearsal = at_stage("reveal", complete_plan(6), **gone).listen()
    for client, reply in rehearsal.replies.items():
        rehearsal.server = rehearsal.receive(client, reply)
    rehearsal.server.close(unmask)
    assert len(seen) == (10 if gone else 6)
    assert {mask.sign for mask in seen} == ({1, -1} if gone else {-1})


def test_a_box_names_a_client_that_a_plan_can_have():
    last = SeedBox(MOST_CLIENTS - 1, bytes(80))
    assert SeedBox.from_bytes(last.to_bytes()) == last
    with pytest.raises(PeerProtocolError, match=f"below {MOST_CLIENTS}, found {MOST_CLIENTS}"):
        SeedBox.from_bytes(SeedBox(MOST_CLIENTS, bytes(80)).to_bytes())


def test_who_is_gone_from_the_start_sends_nothing():
    inputs = {name: np.full(4, name, np.uint16) for name in (7, 8, 9)}
    helped = run_helper_round(inputs, HELPER_PLAN, drops={8}, helper=HELPER)
    assert helped.sent_bytes[8] == 0 < helped.sent_bytes[7] == helped.sent_bytes[9]
    inputs |= {name: np.full(4, name, np.uint16) for name in (10, 11)}
    alone = run_round(inputs, complete_plan(5, dim=4), drops={8: "advertise"})
    assert alone.sent_bytes[8] == alone.received_bytes[8] == 0 < alone.sent_bytes[7]


def test_the_order_of_the_inputs_says_nothing():
    """Who shares with whom follows from the names, not from how a mapping is filled."""
    plan = Plan(9, 4, 3, 2, 16, 2)
    inputs = {name: np.full(2, name, np.uint16) for name in range(9)}
    backwards = dict(reversed(inputs.items()))
    drops = {3: "share"}
    results = [run_round(x, plan, drops, entropy=ENTROPY) for x in (inputs, backwards)]
    assert results[0].sent_bytes == results[1].sent_bytes
    assert results[0].received_bytes == results[1].received_bytes


@pytest.mark.parametrize(
    "holder",
    [
        MaskSum(bytes(32), np.full(4, 271, np.uint16)),
        AwaitingMaskSum(HELPER_PLAN, frozenset({0, 1}), np.full(4, 271, np.uint16)),
    ],
)
def test_a_total_of_a_round_with_a_helper_is_not_printed(holder):
    assert "271" not in repr(holder)
    assert "array" not in repr(holder)


def test_a_running_total_of_a_round_with_a_helper_is_not_printed():
    printed = repr(AwaitingInputs(HELPER_PLAN, np.full(4, 271, np.uint16)))
    assert "271" not in printed
    assert "array" not in printed


def test_a_graph_that_silence_could_cut_is_refused_even_if_every_secret_keeps_its_shares():
    threat = Threat(corrupt=0.0, dropout=0.2, malicious=False)
    assert sparse_degree(60, threat) == Degree(14, 1)
    assert _fewest_responding(60, 12, threat) >= 1
    assert not _connected(60, 12, threat)


@pytest.mark.parametrize("clients", [4, 6])
def test_a_list_of_more_or_fewer_than_the_plan_invites_is_refused_although_it_names_that_list(
    clients,
):
    five = signed_plan(5)
    plan = signed_plan(clients)
    plan = replace(plan, roster=five.roster)
    with refusal(PeerProtocolError, f"must have {clients} identity keys, found 5"):
        join(Invitation(0, plan, keys_of(five)), ENTROPY, identity=identity_of(0), now=NOW)


def test_a_list_that_the_plan_does_not_name_is_refused():
    plan = signed_plan(5)
    others = tuple(sorted((*keys_of(plan)[:4], identity_of(9).certificate.key)))
    client = others.index(keys_of(plan)[0])
    with refusal(PeerProtocolError, "must be the one that the plan names"):
        join(Invitation(client, plan, others), ENTROPY, identity=identity_of(0), now=NOW)


def test_a_device_at_another_ones_place_refuses():
    plan = signed_plan(5)
    with refusal(PeerProtocolError, "index 1 must be the place of this device's key"):
        join(Invitation(1, plan, keys_of(plan)), ENTROPY, identity=identity_of(0), now=NOW)


def test_nobody_has_as_many_neighbours_as_there_are_clients():
    with refusal(ConfigurationError, "must be even and below 4, or 3 for the complete graph"):
        Plan(4, 4, 3, 2, 16, 2)


def test_a_round_with_a_helper_may_be_as_large_as_its_plan_can_say():
    plan = replace(HELPER_PLAN, clients=MOST_CLIENTS, dim=(1 << 40) - 1)
    assert HelperPlan.from_bytes(plan.to_bytes()) == plan


def test_a_node_may_have_any_number_of_eight_bytes():
    last = (1 << 64) - 1
    credential = Credential.of_node(identity_of(0), last)
    credential.check_node(last, ROOT.public.raw, NOW)
    with pytest.raises(PeerProtocolError, match="is not signed by the key"):
        credential.check_node(last - 1, ROOT.public.raw, NOW)
