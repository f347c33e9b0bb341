"""One test for each known attack on secure aggregation that has a countermeasure here."""

from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import KeyPair, ReplayedEntropy, add_masks, agree, expand
from fedcore.crypto.shamir import PRIME
from fedcore.errors import (
    ConfigurationError,
    PeerProtocolError,
    RoundAbortedError,
    StateReusedError,
)
from fedcore.ring import Ring, packed_size
from fedcore.secagg import Finished, OneShot, Plan, dump_state, load_state, run_round, step
from fedcore.secagg.masks import pairwise_masks, seed_commitment
from fedcore.secagg.messages import Advertisement, Delivery, Invitation, Roster, Survivors
from tests.fedcore.secagg.rehearsal import Rehearsal, at_stage, complete_plan, refusal, whole_round

PLAN = complete_plan(6, minimum_survivors=3)
EVERYBODY = frozenset(range(6))
STRANGE = KeyPair.generate(ReplayedEntropy(b"the server's own"), "key")
# The server's own context stands for another model, round, codec or cohort.
OTHER = replace(PLAN, context=b"another model".ljust(32))


def subsets(items):
    return chain.from_iterable(combinations(items, size) for size in range(len(items) + 1))


def survivors(*clients):
    return Survivors(frozenset(clients))


# The survivor list: what the server may claim about who dropped out.


def test_a_survivor_list_that_leaves_its_reader_out_is_refused():
    rehearsal = at_stage("reveal", PLAN)
    with refusal(PeerProtocolError, "client 1 sent its input but is not among the survivors"):
        rehearsal.answer(1, survivors(0, 2, 3, 4, 5))


@pytest.mark.parametrize("stranger", [5, 6, 65_519])
def test_survivors_that_never_shared_a_secret_are_refused(stranger):
    rehearsal = at_stage("reveal", PLAN, c5="share")
    with refusal(PeerProtocolError, rf"got also \[{stranger}\]"):
        rehearsal.answer(1, survivors(0, 1, 2, 3, 4, stranger))


@pytest.mark.parametrize("others", [(), (0,), (0, 2), (0, 2, 3)])
def test_the_sum_over_fewer_than_the_minimum_is_never_unmasked(others):
    rehearsal = at_stage("reveal", replace(PLAN, minimum_survivors=5))
    with refusal(RoundAbortedError, f"at unmasking: needed 5 clients, found {1 + len(others)}"):
        rehearsal.answer(1, survivors(1, *others))


def test_the_sum_over_one_client_cannot_even_be_planned():
    with refusal(ConfigurationError, "minimum_survivors must be in 2"):
        replace(PLAN, minimum_survivors=1)


def test_survivors_elsewhere_do_not_make_up_for_too_few_neighbours():
    plan = Plan(12, 4, 3, 3, 16, 6)
    rehearsal = Rehearsal(plan).advance("reveal")
    peers = plan.neighbours_of(1)
    elsewhere = set(range(12)) - peers - {1}
    with refusal(RoundAbortedError, "at unmasking: needed 3 clients, found 2"):
        rehearsal.answer(1, survivors(1, *elsewhere, *sorted(peers)[:2]))
    rehearsal.answer(1, survivors(1, *elsewhere, *sorted(peers)[:3]))


def test_every_peer_loses_exactly_one_secret_whatever_the_server_claims():
    rehearsal = at_stage("reveal", PLAN)
    answered = 0
    for claim in subsets(EVERYBODY):
        try:
            _, reveal = rehearsal.answer(1, survivors(*claim))
        except (PeerProtocolError, RoundAbortedError):
            continue
        answered += 1
        assert not reveal.self_mask_shares.keys() & reveal.mask_key_shares.keys()
        assert reveal.self_mask_shares.keys() == set(claim) - {1}
        assert reveal.mask_key_shares.keys() == EVERYBODY - set(claim)
    assert answered == 16  # with the reader and at least PLAN.threshold of its five peers


def test_contradictory_survivor_lists_never_open_both_secrets_of_a_client():
    rehearsal = at_stage("reveal", PLAN)
    for believers in subsets(range(1, 6)):
        seeds, keys = 0, 0
        for peer in range(1, 6):
            claim = EVERYBODY if peer in believers else EVERYBODY - {0}
            _, reveal = rehearsal.answer(peer, Survivors(claim))
            seeds += 0 in reveal.self_mask_shares
            keys += 0 in reveal.mask_key_shares
        assert seeds + keys == 5
        assert min(seeds, keys) < PLAN.threshold


def test_one_client_answers_one_survivor_list():
    cell = OneShot(at_stage("reveal", PLAN).states[1])
    step(cell.take(), Survivors(EVERYBODY), entropy=ReplayedEntropy(b""))
    with refusal(StateReusedError):
        cell.take()


def test_a_client_that_answered_stays_silent_after_a_restart():
    finished = load_state(dump_state(whole_round(PLAN).states[1]))
    assert finished == Finished()
    with refusal(PeerProtocolError, "which allows nothing"):
        step(finished, Survivors(EVERYBODY - {0}), entropy=ReplayedEntropy(b""))


def test_a_threshold_of_one_is_refused():
    with refusal(ConfigurationError, "more than half of 5 neighbours .* got 1"):
        replace(PLAN, threshold=1)


# The roster: whose keys the server may hand out.


def keys_of(rehearsal, client):
    return dict(rehearsal.requests[client].keys)


@pytest.mark.parametrize("twice", ["mask and share key", "mask keys", "share keys", "both"])
def test_a_roster_with_a_key_twice_is_refused(twice):
    rehearsal = at_stage("share", PLAN)
    keys = keys_of(rehearsal, 1)
    one, two = keys[0], keys[2]
    keys[2] = {
        "mask and share key": Advertisement(two.mask_key, two.mask_key),
        "mask keys": Advertisement(one.mask_key, two.share_key),
        "share keys": Advertisement(two.mask_key, one.share_key),
        "both": one,
    }[twice]
    with refusal(PeerProtocolError, "found one twice"):
        rehearsal.answer(1, Roster(keys))


@pytest.mark.parametrize("stranger", [1, 6])
def test_a_roster_with_somebody_else_than_the_neighbours_is_refused(stranger):
    rehearsal = at_stage("share", PLAN)
    keys = keys_of(rehearsal, 1) | {stranger: Advertisement(STRANGE.public, b"k" * 32)}
    with refusal(PeerProtocolError, rf"must consist of our neighbours, got also \[{stranger}\]"):
        rehearsal.answer(1, Roster(keys))


def test_the_server_cannot_choose_the_neighbours():
    plan = Plan(12, 4, 3, 3, 16, 6)
    rehearsal = Rehearsal(plan).advance("share")
    outsider = min(set(range(12)) - plan.neighbours_of(1) - {1})
    keys = keys_of(rehearsal, 1) | {outsider: Advertisement(STRANGE.public, b"k" * 32)}
    with refusal(PeerProtocolError, rf"got also \[{outsider}\]"):
        rehearsal.answer(1, Roster(keys))


def test_a_roster_below_the_threshold_is_refused():
    rehearsal = at_stage("share", PLAN)
    keys = {peer: key for peer, key in keys_of(rehearsal, 1).items() if peer in (0, 2)}
    with refusal(RoundAbortedError, "at sharing: needed 3 clients, found 2"):
        rehearsal.answer(1, Roster(keys))


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)], ids=["zero", "order four"])
def test_a_key_whose_shared_secret_everybody_knows_is_refused(point):
    rehearsal = at_stage("share", PLAN)
    keys = keys_of(rehearsal, 1)
    keys[2] = replace(keys[2], share_key=point)
    with refusal(PeerProtocolError, "point of large order"):
        rehearsal.answer(1, Roster(keys))


def test_a_mask_key_whose_shared_secret_everybody_knows_is_refused_before_the_upload():
    rehearsal = at_stage("share", PLAN)
    keys = keys_of(rehearsal, 1)
    keys[2] = replace(keys[2], mask_key=bytes(32))
    rehearsal.requests[1] = Roster(keys)
    rehearsal.listen().hear()
    with refusal(PeerProtocolError, "point of large order"):
        rehearsal.answer(1, rehearsal.requests[1])


def test_the_boxes_of_a_client_with_a_substituted_key_do_not_open():
    rehearsal = at_stage("share", PLAN)
    keys = keys_of(rehearsal, 1)
    keys[0] = Advertisement(keys[0].mask_key, STRANGE.public)
    rehearsal.requests[1] = Roster(keys)
    rehearsal.listen().hear()
    for reader in (0, 1):
        with refusal(PeerProtocolError, "failed authentication"):
            rehearsal.answer(reader, rehearsal.requests[reader])
    rehearsal.answer(2, rehearsal.requests[2])


# The boxes: who can read what, and when.


def deliveries(plan=PLAN, seed=b"rehearsal"):
    rehearsal = Rehearsal(plan, ReplayedEntropy(seed)).advance("upload")
    return rehearsal, {client: dict(d.boxes) for client, d in rehearsal.requests.items()}


@pytest.mark.parametrize(
    ("plan", "seed"),
    [(OTHER, b"rehearsal"), (PLAN, b"another attempt")],
    ids=["same keys in another context", "fresh keys in the same context"],
)
def test_boxes_replayed_from_another_round_do_not_open(plan, seed):
    rehearsal, boxes = deliveries()
    _, others = deliveries(plan, seed)
    with refusal(PeerProtocolError, "failed authentication"):
        rehearsal.answer(1, Delivery(boxes[1] | {0: others[1][0]}))


def test_boxes_swapped_between_senders_do_not_open():
    rehearsal, boxes = deliveries()
    swapped = boxes[1] | {0: boxes[1][2], 2: boxes[1][0]}
    with refusal(PeerProtocolError, "failed authentication"):
        rehearsal.answer(1, Delivery(swapped))


def test_boxes_swapped_between_recipients_do_not_open():
    rehearsal, boxes = deliveries()
    with refusal(PeerProtocolError, "failed authentication"):
        rehearsal.answer(1, Delivery(boxes[1] | {0: boxes[2][0]}))


def test_a_box_returned_to_its_sender_does_not_open():
    rehearsal, boxes = deliveries()
    with refusal(PeerProtocolError, "failed authentication"):
        rehearsal.answer(1, Delivery(boxes[1] | {0: boxes[0][1]}))


@pytest.mark.parametrize("byte", [0, 35, 36, 71, 72, 87])
def test_a_box_with_any_byte_changed_does_not_open(byte):
    rehearsal, boxes = deliveries()
    box = bytearray(boxes[1][0])
    box[byte] ^= 1
    with refusal(PeerProtocolError, "failed authentication"):
        rehearsal.answer(1, Delivery(boxes[1] | {0: bytes(box)}))


def test_a_box_from_a_stranger_is_refused():
    rehearsal, boxes = deliveries()
    for stranger in (1, 6):
        with refusal(PeerProtocolError, rf"got also \[{stranger}\]"):
            rehearsal.answer(1, Delivery(boxes[1] | {stranger: boxes[1][0]}))


def test_a_client_isolated_from_its_peers_uploads_nothing():
    rehearsal, boxes = deliveries()
    few = {peer: boxes[1][peer] for peer in (0, 2)}
    with refusal(RoundAbortedError, "at sharing: needed 3 clients, found 2"):
        rehearsal.answer(1, Delivery(few))


# The masks: model inconsistency, reuse, and seeds that can be searched.


def test_clients_with_different_models_stop_before_they_upload():
    rehearsal = Rehearsal(PLAN)
    rehearsal.requests[0] = Invitation(0, OTHER)
    rehearsal.advance("upload")
    for reader in range(6):
        with refusal(PeerProtocolError, "failed authentication"):
            rehearsal.answer(reader, rehearsal.requests[reader])


def test_the_masks_of_clients_with_different_models_do_not_cancel():
    ring, pairs = PLAN.ring, [KeyPair.from_secret(bytes([i]) * 32) for i in range(3)]
    publics = {i: pair.public for i, pair in enumerate(pairs)}

    def total(*plans):
        """The sum of what three clients upload for all-zero inputs."""
        masks = [
            mask
            for i, plan in enumerate(plans)
            for mask in pairwise_masks(
                pairs[i].secret,
                i,
                {peer: key for peer, key in publics.items() if peer != i},
                plan.digest(),
            )
        ]
        return add_masks(ring.zeros(1000), masks, ring)

    assert not total(PLAN, PLAN, PLAN).any()
    assert not total(OTHER, OTHER, OTHER).any()
    noise = total(PLAN, PLAN, OTHER)
    assert len(np.unique(noise)) > 900  # 1000 uniform words of 16 bits have about 992 values


@pytest.mark.parametrize("field", ["context", "dim", "threshold", "minimum_survivors"])
def test_a_lie_about_any_part_of_the_plan_gives_unrelated_masks(field):
    told = replace(PLAN, **{field: b"x" * 32 if field == "context" else getattr(PLAN, field) + 1})
    streams = [
        expand(
            pairwise_masks(b"u" * 32, 0, {1: STRANGE.public}, plan.digest())[0].seed,
            1000,
            PLAN.ring,
        )
        for plan in (PLAN, told)
    ]
    assert np.count_nonzero(streams[0] == streams[1]) < 5


def test_masks_of_consecutive_rounds_differ():
    rounds = [replace(PLAN, dim=2000, context=bytes([number]) * 32) for number in range(4)]
    zeros = dict.fromkeys(range(6), PLAN.ring.zeros(2000))
    uploads = [
        Rehearsal(plan, ReplayedEntropy(plan.context), zeros).advance("upload").listen().replies
        for plan in rounds
    ]
    for one, other in combinations(uploads, 2):
        for client in range(6):
            assert np.count_nonzero(one[client].vector == other[client].vector) < 8


def test_a_second_attempt_with_the_same_keys_still_draws_other_pairwise_masks():
    uploads = [Rehearsal(plan).advance("upload").listen().replies for plan in (PLAN, OTHER)]
    difference = uploads[0][1].vector - uploads[1][1].vector
    assert np.count_nonzero(difference) == PLAN.dim


def test_no_small_seed_reproduces_a_mask():
    # Flower 1.41 seeds numpy with 4 bytes; others cut their seeds to 16 bits.
    seed = pairwise_masks(b"u" * 32, 0, {1: STRANGE.public}, PLAN.digest())[0].seed
    ring = Ring(32)
    start = expand(seed, 4, ring).tolist()
    folded = int.from_bytes(bytes(np.bitwise_xor.reduce(np.frombuffer(seed, "u1").reshape(-1, 4))))
    for number in range(1 << 16):
        assert expand(number.to_bytes(32, "little"), 4, ring).tolist() != start
    for number in (*range(1 << 12), folded, int.from_bytes(seed[:4]), int.from_bytes(seed[-4:])):
        legacy = np.random.RandomState(number)
        assert legacy.randint(0, 2**32 - 1, 4, np.uint64).tolist() != start


def test_every_bit_of_every_seed_varies():
    pairs = [KeyPair.from_secret(bytes([i]) * 32) for i in range(2)]
    seeds = {
        "pairwise": [
            agree(pairs[0].secret, pairs[1].public, salt=i.to_bytes(32), info=b"")
            for i in range(4096)
        ],
        "self": [ReplayedEntropy(i.to_bytes(4)).draw("self-mask", 32) for i in range(4096)],
    }
    for draws in seeds.values():
        assert len(set(draws)) == 4096
        bits = np.unpackbits(np.frombuffer(b"".join(draws), np.uint8).reshape(4096, 32), axis=1)
        share = bits.mean(axis=0)
        assert bits.shape[1] == 256
        assert np.abs(share - 0.5).max() < 5 * 0.5 / 64  # five standard deviations
        pairs_of_bits = np.corrcoef(bits.T) - np.eye(256)
        assert np.abs(pairs_of_bits).max() < 6 / 64


# What a peer could get wrong, on purpose or not.


def lagrange_weight(points, at):
    """The weight of the share at `at` in the secret, modulo the field's prime."""
    weight = 1
    for point in set(points) - {at}:
        weight = weight * point * pow(point - at, -1, PRIME) % PRIME
    return weight


def false_share(share, holder, points, *, crafted):
    """Another share; a crafted one moves the secret to a number that is still a secret."""
    words = np.frombuffer(share, "<u2").astype(np.int64)
    if crafted:  # the second limb of the secret grows by one, all others stay
        words[1] += pow(lagrange_weight(points, holder + 1), -1, PRIME)
    else:
        words += np.arange(1, 19) ** (holder + 2)
    return (words % PRIME).astype("<u2").tobytes()


def lie(rehearsal, liar, owner, *, crafted):
    """Let `liar` answer with a false share of a secret of `owner`."""
    reveal, points = rehearsal.replies[liar], [1, 2, 3]
    for name in ("self_mask_shares", "mask_key_shares"):
        shares = getattr(reveal, name)
        if owner in shares:
            wrong = false_share(shares[owner], liar, points, crafted=crafted)
            rehearsal.replies[liar] = replace(reveal, **{name: shares | {owner: wrong}})


def honest_sum(rehearsal):
    survivors = rehearsal.server.survivors
    return (sum(rehearsal.vectors[c].astype(int) for c in survivors) % 2**16).tolist()


by_crafting = pytest.mark.parametrize("crafted", [False, True], ids=["random", "crafted to fit"])
by_owner = pytest.mark.parametrize("owner", [4, 5], ids=["self mask", "masking key"])


# On the complete graph all survivors but one know a survivor's secret, and all know that of a
# client that dropped out: of a masking key there is always a share to spare.


@by_crafting
@pytest.mark.parametrize("liar", [0, 1, 2])
def test_a_false_share_is_noticed_if_there_is_none_to_spare(crafted, liar):
    rehearsal = at_stage("reveal", PLAN, c5="upload").listen({3})
    lie(rehearsal, liar, 4, crafted=crafted)
    with refusal(RoundAbortedError, "at unmasking: .*do not fit what its owner bound itself to"):
        rehearsal.hear()


@by_crafting
@by_owner
@pytest.mark.parametrize("liar", [0, 1, 2, 3])
@pytest.mark.parametrize("backwards", [False, True], ids=["", "heard backwards"])
def test_a_false_share_is_survived_if_there_is_one_to_spare(crafted, owner, liar, backwards):
    rehearsal = at_stage("reveal", PLAN, c5="upload").listen({4} if owner == 5 else set())
    lie(rehearsal, liar, owner, crafted=crafted)
    expected = honest_sum(rehearsal)
    assert rehearsal.hear(backwards=backwards).outcome.total.tolist() == expected


@by_crafting
def test_false_shares_of_different_secrets_by_different_liars_are_all_survived(crafted):
    rehearsal = at_stage("reveal", PLAN, c5="upload").listen()
    for liar, owner in ((0, 5), (1, 0), (2, 3), (3, 4)):
        lie(rehearsal, liar, owner, crafted=crafted)
    expected = honest_sum(rehearsal)
    assert rehearsal.hear().outcome.total.tolist() == expected


@by_crafting
@by_owner
def test_two_false_shares_of_one_secret_abort_the_round(crafted, owner):
    rehearsal = at_stage("reveal", PLAN, c5="upload").listen()
    for liar in (0, 1):
        lie(rehearsal, liar, owner, crafted=crafted)
    with refusal(RoundAbortedError, "at unmasking: needed 3 clients, found 5 .*bound itself to"):
        rehearsal.hear()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_sum_is_never_silently_wrong_whatever_is_revealed(data):
    rehearsal = at_stage("reveal", PLAN, c5="upload").listen()
    words = st.lists(st.integers(0, PRIME - 1), min_size=18, max_size=18)
    for liar in data.draw(st.frozensets(st.integers(0, 4), max_size=3)):
        reveal = rehearsal.replies[liar]
        owner = data.draw(st.sampled_from(sorted({0, 1, 2, 3, 4, 5} - {liar})))
        name = "mask_key_shares" if owner == 5 else "self_mask_shares"
        wrong = np.array(data.draw(words), "<u2").tobytes()
        shares = getattr(reveal, name) | {owner: wrong}
        rehearsal.replies[liar] = replace(reveal, **{name: shares})
    expected = honest_sum(rehearsal)
    try:
        rehearsal.hear()
    except RoundAbortedError:
        return
    assert rehearsal.outcome.total.tolist() == expected


def test_a_commitment_to_another_seed_spoils_the_round_and_not_the_sum():
    rehearsal = at_stage("share", PLAN).listen()
    rehearsal.replies[2] = replace(rehearsal.replies[2], commitment=b"c" * 32)
    rehearsal.hear().advance("reveal").listen()
    with refusal(RoundAbortedError, "bound itself to"):
        rehearsal.hear()


def test_a_commitment_binds_the_round_the_client_and_the_seed():
    digest, seed = PLAN.digest(), b"s" * 32
    commitments = {
        seed_commitment(digest, 1, seed),
        seed_commitment(OTHER.digest(), 1, seed),
        seed_commitment(digest, 2, seed),
        seed_commitment(digest, 1, b"t" * 32),
    }
    assert len(commitments) == 4
    assert {len(commitment) for commitment in commitments} == {32}


# What the sizes give away.


def test_message_lengths_do_not_depend_on_the_inputs():
    plan = complete_plan(5, ring_bits=12, dim=50)
    ring = plan.ring
    cohorts = [
        np.zeros((5, 50)),
        np.full((5, 50), ring.mask),
        np.arange(250).reshape(5, 50),
        np.eye(5, 50),
    ]
    sizes = [run_round(dict(enumerate(x.astype(ring.dtype))), plan).sent_bytes for x in cohorts]
    keys, boxes, shares = 4 + 64, 4 + 32 + 4 + 4 * (4 + 88), 12 + 4 * (4 + 36)
    expected = keys + boxes + 4 + packed_size(50, 12) + shares
    assert sizes == [dict.fromkeys(range(5), expected)] * 4


def test_what_a_client_receives_follows_from_the_plan_alone():
    plan = complete_plan(5, ring_bits=12, dim=50)
    result = run_round(dict.fromkeys(range(5), plan.ring.zeros(50)), plan)
    invitation, roster = 4 + 4 + 125, 8 + 4 * (4 + 64)
    boxes, survivors = 8 + 4 * (4 + 88), 8 + 5 * 4
    assert result.received_bytes == dict.fromkeys(range(5), invitation + roster + boxes + survivors)
