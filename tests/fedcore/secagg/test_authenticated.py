"""Attacks that only identities stop: invented clients, borrowed keys, split views.

The server speaks for everybody here. It knows every public key and certificate, has
devices of its own that the root enrolled, and may tell each client something else. In
`test_attacks` are the attacks that fail without identities too.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import KeyPair, ReplayedEntropy, expand
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import LocalProtocolError, PeerProtocolError, RoundAbortedError
from fedcore.secagg import AwaitingEndorsements, Finished, Plan, join, step
from fedcore.secagg.identity import Credential, survivors_statement
from fedcore.secagg.masks import pairwise_masks
from fedcore.secagg.messages import (
    Advertisement,
    Endorsement,
    Endorsements,
    Invitation,
    Reveal,
    Roster,
    Survivors,
)
from tests.fedcore.secagg.rehearsal import (
    AUTHORITY,
    EXPIRY,
    NOW,
    ROOT,
    Rehearsal,
    at_stage,
    enroll,
    identity_of,
    keys_of,
    refusal,
    seated,
    signed_plan,
)

PLAN = signed_plan(6, minimum_survivors=3)
UNSIGNED = replace(PLAN, authority=bytes(32), roster=bytes(32))
INVITATION = Invitation(1, PLAN, keys_of(PLAN))
EVERYBODY = frozenset(range(6))
FOREIGN = SigningKey.generate(ReplayedEntropy(b"a root that nobody pinned"))
TWO = identity_of(2).key
SPY = SigningKey.generate(ReplayedEntropy(b"a device of the server"))
OTHER_PLANS = {
    "another context": replace(PLAN, context=b"another round".ljust(32)),
    "another authority": replace(PLAN, authority=FOREIGN.public.raw),
    "another threshold": replace(PLAN, threshold=4),
    "another length": replace(PLAN, dim=7),
}


def sign_keys(identity, *, plan=PLAN, client=2, seed=b"the server's own keys"):
    """Two keys whose secrets the server knows, signed by `identity`."""
    mask, share = (KeyPair.generate(ReplayedEntropy(seed), name).public for name in "ms")
    credential = Credential.sign(
        identity, digest=plan.digest(), client=client, mask_key=mask, share_key=share
    )
    return Advertisement(mask, share, credential)


def changed(**changes):
    """The roster of client 1 from an honest server, but for the keys of client 2."""
    rehearsal = at_stage("share", PLAN)
    keys = dict(rehearsal.requests[1].keys)
    return rehearsal, Roster(keys | {2: replace(keys[2], **changes)})


def substituted(advertisement):
    """The same, but `advertisement` is said to be of client 2."""
    rehearsal = at_stage("share", PLAN)
    return rehearsal, Roster(dict(rehearsal.requests[1].keys) | {2: advertisement})


# Keys: who may be on a roster. The victim is client 1; the server lies about client 2.


def test_the_roster_of_an_honest_server_is_accepted():
    rehearsal, roster = changed()
    state, _ = rehearsal.answer(1, roster)
    assert state.identity_keys == {c: identity_of(c).certificate.key for c in (0, 2, 3, 4, 5)}
    rehearsal, roster = substituted(sign_keys(enroll(TWO, "renewed", expires_at=EXPIRY + 1)))
    assert rehearsal.answer(1, roster)[0].identity_keys == state.identity_keys


def test_an_unsigned_key_is_refused():
    rehearsal, roster = changed(credential=None)
    with refusal(PeerProtocolError, "keys of client 2 must be signed, found no credential"):
        rehearsal.answer(1, roster)


@pytest.mark.parametrize("field", ["mask_key", "share_key"])
def test_a_key_that_the_server_put_in_the_place_of_a_signed_one_is_refused(field):
    rehearsal, roster = changed(**{field: KeyPair.from_secret(b"s" * 32).public})
    with refusal(PeerProtocolError, "advertisement of client 2 is not signed by the key"):
        rehearsal.answer(1, roster)


def test_a_mask_key_and_a_share_key_that_changed_places_are_refused():
    keys = at_stage("share", PLAN).requests[1].keys[2]
    rehearsal, roster = changed(mask_key=keys.share_key, share_key=keys.mask_key)
    with refusal(PeerProtocolError, "advertisement of client 2 is not signed by the key"):
        rehearsal.answer(1, roster)


@pytest.mark.parametrize("plan", OTHER_PLANS.values(), ids=OTHER_PLANS)
def test_a_key_signed_for_another_round_is_refused(plan):
    rehearsal, roster = substituted(sign_keys(identity_of(2), plan=plan))
    with refusal(PeerProtocolError, "advertisement of client 2 is not signed by the key"):
        rehearsal.answer(1, roster)


@pytest.mark.parametrize("client", [0, 1, 3, 6])
def test_a_key_signed_for_another_index_is_refused(client):
    rehearsal, roster = substituted(sign_keys(identity_of(2), client=client))
    with refusal(PeerProtocolError, "advertisement of client 2 is not signed by the key"):
        rehearsal.answer(1, roster)


def test_a_device_enrolled_by_a_foreign_root_is_refused():
    rehearsal, roster = substituted(sign_keys(enroll(TWO, root=FOREIGN)))
    with refusal(PeerProtocolError, "certificate of device is not signed by"):
        rehearsal.answer(1, roster)


def test_a_device_that_enrolled_itself_is_refused():
    rehearsal, roster = substituted(sign_keys(enroll(TWO, root=TWO)))
    with refusal(PeerProtocolError, "certificate of device is not signed by"):
        rehearsal.answer(1, roster)


@pytest.mark.parametrize("late", [0, 1, 10**9])
def test_an_expired_certificate_is_refused(late):
    rehearsal, roster = substituted(sign_keys(enroll(TWO, expires_at=NOW - late)))
    with refusal(PeerProtocolError, "certificate of device expired at .* enroll the device again"):
        rehearsal.answer(1, roster)


def test_a_certificate_in_its_last_second_is_accepted():
    rehearsal, roster = substituted(sign_keys(enroll(TWO, expires_at=NOW + 1)))
    rehearsal.answer(1, roster)


def test_a_certificate_whose_life_was_prolonged_is_refused():
    signed = sign_keys(enroll(TWO, expires_at=NOW))
    certificate = replace(signed.credential.certificate, expires_at=EXPIRY)
    prolonged = replace(signed.credential, certificate=certificate)
    rehearsal, roster = substituted(replace(signed, credential=prolonged))
    with refusal(PeerProtocolError, "certificate of device is not signed by"):
        rehearsal.answer(1, roster)


def test_the_certificate_of_another_device_is_refused():
    signed = sign_keys(identity_of(3))
    borrowed = replace(signed.credential, certificate=identity_of(2).certificate)
    rehearsal, roster = substituted(replace(signed, credential=borrowed))
    with refusal(PeerProtocolError, "advertisement of client 2 is not signed by the key"):
        rehearsal.answer(1, roster)


@pytest.mark.parametrize(
    "other",
    [
        enroll(SPY),
        identity_of(3),
        enroll(identity_of(3).key, name="renamed", expires_at=EXPIRY + 1),
        identity_of(1),
    ],
    ids=["a stranger", "a neighbour", "a neighbour under another name", "the victim itself"],
)
def test_only_the_device_whose_key_has_the_index_may_be_there(other):
    rehearsal, roster = substituted(sign_keys(other))
    with refusal(PeerProtocolError, "client 2 must be the device whose key has that index"):
        rehearsal.answer(1, roster)


def test_a_roster_is_not_read_without_an_identity():
    rehearsal, roster = changed()
    with refusal(PeerProtocolError, "this device is not enrolled: enroll it first"):
        step(rehearsal.states[1], roster, entropy=ReplayedEntropy(b""), now=NOW)


# Joining: what a device signs at all.


def test_a_device_without_an_identity_does_not_join():
    with refusal(PeerProtocolError, "this device is not enrolled: enroll it first"):
        join(INVITATION, ReplayedEntropy(b""), now=NOW)


@pytest.mark.parametrize("now", [EXPIRY, EXPIRY + 1])
def test_a_device_whose_own_certificate_expired_does_not_join(now):
    with refusal(PeerProtocolError, "expired .* enroll the device again"):
        join(INVITATION, ReplayedEntropy(b""), identity=identity_of(1), now=now)


def test_a_device_does_not_sign_for_an_authority_that_did_not_enroll_it():
    foreign = replace(PLAN, authority=FOREIGN.public.raw)
    with refusal(PeerProtocolError, "certificate of device-1 is not signed by"):
        join(
            replace(INVITATION, plan=foreign),
            ReplayedEntropy(b""),
            identity=identity_of(1),
            now=NOW,
        )


def test_a_device_signs_nothing_in_a_round_without_authority():
    _, keys = join(
        Invitation(1, UNSIGNED), ReplayedEntropy(b""), identity=identity_of(1), now=EXPIRY
    )
    assert keys.credential is None


def test_clients_that_were_told_different_authorities_share_no_masks():
    plans = [PLAN, UNSIGNED, OTHER_PLANS["another authority"]]
    assert len({plan.digest() for plan in plans}) == 3
    peer = KeyPair.from_secret(b"v" * 32).public
    streams = [
        expand(pairwise_masks(b"u" * 32, 0, {1: peer}, p.digest())[0].seed, 1000, p.ring)
        for p in plans
    ]
    for one, other in combinations(streams, 2):
        assert np.count_nonzero(one == other) < 5


def test_a_client_that_was_told_of_no_authority_cannot_be_passed_off_as_a_device():
    """Who was told so signs nothing; a device of the server has the place of client 0."""
    rehearsal = Rehearsal(PLAN)
    rehearsal.requests[0] = Invitation(0, UNSIGNED)
    unsigned = rehearsal.listen().replies[0]
    with refusal(PeerProtocolError, "keys of client 0 must be signed, found no credential"):
        rehearsal.receive(0, unsigned)
    terms = {"mask_key": unsigned.mask_key, "share_key": unsigned.share_key}
    credential = Credential.sign(identity_of(0), digest=PLAN.digest(), client=0, **terms)
    rehearsal.replies[0] = replace(unsigned, credential=credential)
    rehearsal.hear().advance("upload")
    for reader in range(6):
        with refusal(PeerProtocolError, "failed authentication"):
            rehearsal.answer(reader, rehearsal.requests[reader])


# The server's own checks: a client with bad keys loses its place, nobody else does.


def _bad_advertisements():
    good = sign_keys(identity_of(2))
    return {
        "unsigned": replace(good, credential=None),
        "for another round": sign_keys(identity_of(2), plan=OTHER_PLANS["another context"]),
        "for another index": sign_keys(identity_of(2), client=3),
        "by a foreign root": sign_keys(enroll(TWO, root=FOREIGN)),
        "expired": sign_keys(enroll(TWO, expires_at=NOW)),
        "with the certificate of another": replace(
            good,
            credential=replace(good.credential, certificate=identity_of(5).certificate),
        ),
        "with the identity of another client": sign_keys(identity_of(0)),
        "with another mask key": replace(good, mask_key=b"m" * 32),
        "with a key of low order": replace(good, share_key=bytes(32)),
    }


@pytest.mark.parametrize("what", _bad_advertisements())
def test_a_client_with_bad_keys_loses_only_its_own_place(what):
    rehearsal = Rehearsal(PLAN).listen()
    rehearsal.server = rehearsal.receive(0, rehearsal.replies.pop(0))
    with refusal(PeerProtocolError):
        rehearsal.receive(2, _bad_advertisements()[what])
    del rehearsal.replies[2]
    rehearsal.hear().advance()
    assert rehearsal.outcome.survivors == EVERYBODY - {2}


@pytest.mark.parametrize("field", ["mask_key", "share_key"])
def test_nobody_keeps_a_device_out_by_advertising_its_identity_key(field):
    """Identity keys are public and the same in every round; round keys are neither."""
    rehearsal = Rehearsal(PLAN).listen()
    spy, taken = identity_of(2), identity_of(4).certificate.key
    keys = replace(sign_keys(spy), **{field: taken})
    credential = Credential.sign(
        spy,
        digest=PLAN.digest(),
        client=2,
        mask_key=keys.mask_key,
        share_key=keys.share_key,
    )
    del rehearsal.replies[2]
    rehearsal.server = rehearsal.receive(2, replace(keys, credential=credential))
    rehearsal.server = rehearsal.receive(4, rehearsal.replies[4])
    assert rehearsal.server.advertisements.keys() == {2, 4}


# Survivors: all act on one set, or nobody acts.


@lru_cache
def endorsing(plan):
    """A round whose clients wait for the survivors; only ever asked, never advanced."""
    return at_stage("endorse", plan)


def endorsed(claims):
    """Each client's state and signature after it was told the survivors in `claims`."""
    rehearsal = endorsing(PLAN)
    answers = {c: rehearsal.answer(c, Survivors(claim)) for c, claim in claims.items()}
    states = {client: state for client, (state, _) in answers.items()}
    return states, {client: reply.signature for client, (_, reply) in answers.items()}


def others(signatures, client, *among):
    return {c: s for c, s in signatures.items() if c != client and (not among or c in among)}


def test_a_client_reveals_once_its_peers_signed_the_same_survivors():
    states, signatures = endorsed(dict.fromkeys(range(6), EVERYBODY))
    for client, state in states.items():
        successor, reveal = state.on_endorsements(Endorsements(others(signatures, client)))
        assert successor == Finished()
        assert reveal.self_mask_shares.keys() == EVERYBODY - {client}
        assert reveal.mask_key_shares == {}


def test_a_client_reveals_nothing_with_its_endorsement():
    rehearsal = endorsing(PLAN)
    state, reply = rehearsal.answer(1, Survivors(EVERYBODY))
    assert type(state) is AwaitingEndorsements
    assert type(reply) is Endorsement
    identity_of(1).key.public.verify(survivors_statement(PLAN.digest(), EVERYBODY), reply.signature)


def test_a_client_of_an_authenticated_round_cannot_be_made_to_skip_the_endorsements():
    rehearsal = endorsing(PLAN)
    with refusal(LocalProtocolError, "survivors are endorsed before anything is revealed"):
        rehearsal.states[1].on_survivors(Survivors(EVERYBODY))
    with refusal(PeerProtocolError, "Endorsements arrived in state AwaitingSurvivors"):
        rehearsal.answer(1, Endorsements({}))


@pytest.mark.parametrize(
    "claim", [EVERYBODY - {1}, EVERYBODY | {6}, frozenset({1, 2}), frozenset({1, 2, 9})]
)
def test_a_client_signs_no_survivors_that_it_would_not_reveal_for(claim):
    rehearsal = endorsing(PLAN)
    with refusal((PeerProtocolError, RoundAbortedError)):
        rehearsal.answer(1, Survivors(claim))


def test_with_a_split_view_of_the_survivors_nobody_reveals():
    """Half of the clients are told that client 0 is among them, the others that it is not."""
    views = {c: EVERYBODY if c < 3 else EVERYBODY - {0} for c in range(6)}
    states, signatures = endorsed(views)
    for client, state in states.items():
        asked = others(signatures, client, *(views[client] - {client}))
        fitting = {c: s for c, s in asked.items() if views[c] == views[client]}
        for forwarded in (asked, fitting):
            with refusal(RoundAbortedError, "at endorsing: needed 3 clients, found 2"):
                state.on_endorsements(Endorsements(forwarded))


def acted_on(plan, told, colluding):
    """The sets that honest clients reveal for if the server does its worst.

    Client `c` is told `told[c]`; the server forwards to it every signature that fits:
    those of the honest who were told the same, and those of colluding devices for any set.
    """
    rehearsal = endorsing(plan)
    answers = {c: rehearsal.answer(c, Survivors(view)) for c, view in told.items()}
    acted = set()
    for client, (state, _) in answers.items():
        view = told[client]
        statement = survivors_statement(plan.digest(), view)
        peers = view - {client}
        signatures = {p: answers[p][1].signature for p in peers & told.keys() if told[p] == view}
        signatures |= {p: identity_of(p).key.sign(statement) for p in peers & colluding}
        try:
            state.on_endorsements(Endorsements(signatures))
        except RoundAbortedError:
            continue
        acted.add(view)
    return acted


@settings(deadline=None, max_examples=150)
@given(data=st.data(), clients=st.integers(3, 7))
def test_two_sets_are_never_both_acted_on_by_honest_clients(data, clients):
    everybody = frozenset(range(clients))
    colluding = data.draw(st.frozensets(st.sampled_from(range(clients)), max_size=clients - 3))
    least = (clients - 1 + len(colluding)) // 2 + 1  # 2t > k + colluding
    threshold = data.draw(st.integers(least, clients - 1))
    lost = data.draw(st.sampled_from(range(clients)))
    views = [everybody] if threshold == clients - 1 else [everybody, everybody - {lost}]
    told = {
        c: everybody if c == lost else data.draw(st.sampled_from(views))
        for c in sorted(everybody - colluding)
    }
    plan = signed_plan(clients, threshold=threshold, minimum_survivors=2)
    assert len(acted_on(plan, told, colluding)) <= 1


@pytest.mark.parametrize(("colluding", "sets"), [(0, 0), (1, 0), (2, 2), (3, 2)])
def test_two_sets_can_win_only_against_more_colluding_devices_than_planned_for(colluding, sets):
    clients = 4 + colluding
    plan = signed_plan(clients, threshold=(clients - 1) // 2 + 1, minimum_survivors=2)
    everybody = frozenset(range(clients))
    told = {0: everybody, 1: everybody, 2: everybody - {0}, 3: everybody - {0}}
    assert len(acted_on(plan, told, everybody - told.keys())) == sets
    assert (2 * plan.threshold > plan.neighbours + colluding) == (sets == 0)


@pytest.mark.parametrize("stranger", [1, 6, 65_519])
def test_an_endorsement_of_a_stranger_is_refused(stranger):
    states, signatures = endorsed(dict.fromkeys(range(6), EVERYBODY))
    extra = others(signatures, 1) | {stranger: signatures[1]}
    with refusal(PeerProtocolError, rf"from surviving peers, got also \[{stranger}\]"):
        states[1].on_endorsements(Endorsements(extra))


def test_an_endorsement_of_one_that_did_not_survive_is_refused():
    states, signatures = endorsed(dict.fromkeys(range(5), EVERYBODY - {5}))
    spare = identity_of(5).key.sign(survivors_statement(PLAN.digest(), EVERYBODY - {5}))
    with refusal(PeerProtocolError, r"from surviving peers, got also \[5\]"):
        states[1].on_endorsements(Endorsements(others(signatures, 1) | {5: spare}))


def test_an_endorsement_of_one_that_is_no_neighbour_is_refused():
    plan = seated(Plan(12, 4, 3, 3, 16, 6, authority=AUTHORITY))
    rehearsal = Rehearsal(plan).advance("endorse")
    state, _ = rehearsal.answer(1, rehearsal.requests[1])
    outsider = min(set(range(12)) - plan.neighbours_of(1) - {1})
    signature = identity_of(outsider).key.sign(survivors_statement(plan.digest(), range(12)))
    with refusal(PeerProtocolError, rf"got also \[{outsider}\]"):
        state.on_endorsements(Endorsements({outsider: signature}))


def _worthless():
    statement = survivors_statement(PLAN.digest(), EVERYBODY)
    by = identity_of(0).key
    replayed = OTHER_PLANS["another context"].digest()
    return {
        "for another set": by.sign(survivors_statement(PLAN.digest(), EVERYBODY - {5})),
        "replayed from another round": by.sign(survivors_statement(replayed, EVERYBODY)),
        "of another client": identity_of(2).key.sign(statement),
        "of the reader itself": identity_of(1).key.sign(statement),
        "of a device of the server": SPY.sign(statement),
        "of the root": ROOT.sign(statement),
        "forged": bytes(64),
        "too short": by.sign(statement)[:63],
        "its advertisement's": sign_keys(identity_of(0), client=0).credential.signature,
        "the plain set": by.sign(b"".join(c.to_bytes(4, "little") for c in range(6))),
    }


@pytest.mark.parametrize("what", _worthless())
def test_a_worthless_endorsement_counts_as_missing(what):
    states, signatures = endorsed(dict.fromkeys(range(6), EVERYBODY))
    wrong = _worthless()[what]
    three = others(signatures, 1, 2, 3) | {0: wrong}
    with refusal(RoundAbortedError, "at endorsing: needed 3 clients, found 2"):
        states[1].on_endorsements(Endorsements(three))
    states[1].on_endorsements(Endorsements(three | {4: signatures[4]}))


def test_the_endorsements_of_two_clients_changed_for_each_other_count_for_neither():
    states, signatures = endorsed(dict.fromkeys(range(6), EVERYBODY))
    swapped = {0: signatures[2], 2: signatures[0], 3: signatures[3], 4: signatures[4]}
    with refusal(RoundAbortedError, "at endorsing: needed 3 clients, found 2"):
        states[1].on_endorsements(Endorsements(swapped))


@pytest.mark.parametrize("count", range(6))
def test_exactly_the_threshold_of_endorsements_is_needed(count):
    states, signatures = endorsed(dict.fromkeys(range(6), EVERYBODY))
    few = dict(list(others(signatures, 1).items())[:count])
    if count < PLAN.threshold:
        with refusal(RoundAbortedError, f"at endorsing: needed 3 clients, found {count}"):
            states[1].on_endorsements(Endorsements(few))
    else:
        assert type(states[1].on_endorsements(Endorsements(few))[1]) is Reveal


@settings(deadline=None, max_examples=100)
@given(survivors=st.frozensets(st.integers(0, 5)), signers=st.frozensets(st.integers(0, 5)))
def test_every_peer_loses_exactly_one_secret_whatever_is_claimed_and_signed(survivors, signers):
    rehearsal = endorsing(PLAN)
    statement = survivors_statement(PLAN.digest(), survivors)
    try:
        state, _ = rehearsal.answer(1, Survivors(survivors))
        signatures = {peer: identity_of(peer).key.sign(statement) for peer in signers}
        _, reveal = state.on_endorsements(Endorsements(signatures))
    except (PeerProtocolError, RoundAbortedError):
        assert len(signers) < 3 or not signers <= survivors - {1} or 1 not in survivors
        return
    assert reveal.self_mask_shares.keys() == survivors - {1}
    assert reveal.mask_key_shares.keys() == EVERYBODY - survivors
    assert len(signers) >= PLAN.threshold
    assert signers <= survivors - {1}


# What is said aloud when an identity is at hand.


def test_no_refusal_shows_the_secret_key_of_an_identity():
    seeds = [identity_of(client).key.seed for client in range(6)] + [ROOT.seed, SPY.seed]
    said = []
    for what, keys in _bad_advertisements().items():
        rehearsal, roster = substituted(keys)
        with pytest.raises(PeerProtocolError) as caught:
            rehearsal.answer(1, roster)
        link = caught.value
        while link is not None:
            said.append(f"{what}: {link!s} {link!r} {link.args!r}")
            link = link.__cause__ or link.__context__
    states, signatures = endorsed(dict.fromkeys(range(6), EVERYBODY))
    said += [repr(state) for state in states.values()] + [repr(Endorsements(signatures))]
    assert len(said) > 15
    for seed in seeds:
        assert not [t for t in said if seed.hex() in t or repr(seed)[2:-1] in t]
