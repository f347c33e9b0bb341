"""What an observer sees: uniform vectors, and no secret in anything that can be printed."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from fedcore.crypto import KeyPair, Mask, ReplayedEntropy, add_masks
from fedcore.ring import Ring
from fedcore.secagg import OneShot
from fedcore.secagg.running_sum import RunningSum
from tests.fedcore.secagg.rehearsal import (
    Rehearsal,
    at_stage,
    complete_plan,
    signed_plan,
    stages_of,
)

DIM = 1 << 15


def uploads_of_zeros(bits, seed=b"uniform"):
    """A round of three all-zero inputs, just before the server hears the masked ones."""
    plan = complete_plan(3, ring_bits=bits, dim=DIM, threshold=2)
    zeros = dict.fromkeys(range(3), plan.ring.zeros(DIM))
    return Rehearsal(plan, ReplayedEntropy(seed), zeros).advance("upload")


def assert_uniform(words, bits):
    """Chi-square of at most 2^10 equal cells, within five standard deviations."""
    cells = min(bits, 10)
    counts = np.bincount((words >> words.dtype.type(bits - cells)).astype(int), minlength=2**cells)
    expected = len(words) / 2**cells
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = 2**cells - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("bits", [1, 7, 8, 10, 16, 24, 32, 64])
def test_masked_zeros_are_uniform(bits):
    replies = uploads_of_zeros(bits).listen().replies
    for reply in replies.values():
        assert_uniform(reply.vector, bits)
    if bits <= 10:
        # An exclusive upper bound, as in Flower 1.41, would never give the largest element.
        assert all(reply.vector.max() == Ring(bits).mask for reply in replies.values())


@pytest.mark.parametrize("bits", [8, 16])
def test_an_upload_stays_uniform_for_one_who_knows_its_self_mask(bits):
    rehearsal = uploads_of_zeros(bits)
    seeds = {client: state.self_mask_seed for client, state in rehearsal.states.items()}
    ring = rehearsal.plan.ring
    for client, reply in rehearsal.listen().replies.items():
        assert_uniform(add_masks(reply.vector, [Mask(seeds[client], -1)], ring), bits)


def test_uploads_of_one_round_are_unrelated_until_all_are_added():
    vectors = [reply.vector for reply in uploads_of_zeros(8).listen().replies.values()]
    for one, other in combinations(vectors, 2):
        assert_uniform(one + other, 8)
        assert_uniform(one - other, 8)


def secrets_of(rehearsal):
    """All bytes in the states that somebody could use."""
    found = []
    for state in rehearsal.states.values():
        found += [getattr(state, name, b"") for name in ("mask_secret", "share_secret")]
        found += [getattr(state, "self_mask_seed", b"")]
        for name in ("pair_keys", "self_mask_shares", "mask_key_shares"):
            found += getattr(state, name, {}).values()
    return [secret for secret in found if secret]


def shows(text, secret):
    """Whether `text` holds `secret` in hexadecimal, as a bytes literal or as numbers."""
    forms = (secret.hex(), repr(secret)[2:-1], repr(list(secret))[1:-1])
    return any(form in text for form in forms)


@pytest.mark.parametrize("plan", [complete_plan(5), signed_plan(5)], ids=["unsigned", "signed"])
def test_no_printed_state_or_message_shows_a_secret(plan):
    rehearsal, secrets, printed = Rehearsal(plan), [], []
    for absent in ({}, {}, {4}, {}, {})[: len(stages_of(plan))]:
        rehearsal.listen(absent)
        secrets += secrets_of(rehearsal)
        printed += [repr(state) for state in rehearsal.states.values()]
        printed += [repr(OneShot(state)) for state in rehearsal.states.values()]
        rehearsal.hear()
        printed += [repr(rehearsal.server), str(rehearsal.outcome)]
    printed += [repr(message) for _, message in rehearsal.log]
    # Two keys and a seed of 5 clients, a box key of 10 pairs, two shares of 4 peers at 4 clients.
    assert len(set(secrets)) == 5 * 3 + 10 + 4 * 4 * 2
    printed += [repr(who) + str(who) for who in rehearsal.identities.values()]
    secrets += [who.key.seed for who in rehearsal.identities.values()]
    assert not [text for text in printed if any(shows(text, secret) for secret in secrets)]
    public = KeyPair.from_secret(rehearsal_secret(rehearsal)).public
    assert any(shows(text, public) for text in printed)  # the search does find what is there


def test_a_cell_and_a_sum_print_nothing_of_what_they_hold():
    assert repr(OneShot(at_stage("upload").states[1])) == "OneShot()"
    assert repr(RunningSum(np.array([271828]))) == "RunningSum(_count=0, _sealed=False)"


def rehearsal_secret(rehearsal):
    return rehearsal.entropy.child("client=0").draw("mask-key", 32)


def test_no_printed_state_or_message_shows_an_input_or_an_upload():
    plan = complete_plan(5, ring_bits=32)
    vectors = {client: np.full(6, 2_718_281_800 + client, np.uint32) for client in range(5)}
    rehearsal, printed = Rehearsal(plan, vectors=vectors), []
    for _ in range(4):
        rehearsal.listen().hear()
        printed += [repr(state) for state in rehearsal.states.values()]
        printed += [repr(rehearsal.server), repr(rehearsal.outcome)]
    printed += [repr(message) for _, message in rehearsal.log]
    numbers = [*(2_718_281_800 + client for client in range(5)), *rehearsal.outcome.total.tolist()]
    numbers += [
        word for _, message in rehearsal.log for word in getattr(message, "vector", np.array([]))
    ]
    assert len(numbers) == 5 + 6 + 5 * 6
    assert not [text for text in printed if "array" in text]
    assert not [text for text in printed if any(str(number) in text for number in numbers)]


@pytest.mark.parametrize("plan", [complete_plan(5), signed_plan(5)], ids=["unsigned", "signed"])
def test_no_secret_travels_in_the_clear(plan):
    rehearsal = Rehearsal(plan)
    secrets = [who.key.seed for who in rehearsal.identities.values()]
    for _ in range(len(stages_of(plan)) - 1):
        secrets += secrets_of(rehearsal.listen())
        rehearsal.hear()
    wire = b"".join(rehearsal.transcript())
    assert not [secret for secret in secrets if secret in wire]


def test_no_two_draws_of_a_round_share_a_purpose():
    drawn = Counter()

    class Recorder:
        def __init__(self, source, path=""):
            self.source, self.path = source, path

        def draw(self, purpose, size):
            drawn[self.path, purpose] += 1
            return self.source.draw(purpose, size)

        def child(self, name):
            return Recorder(self.source.child(name), f"{self.path}/{name}")

    Rehearsal(complete_plan(4), Recorder(ReplayedEntropy(b"recorded"))).advance()
    assert len(drawn) == 4 * 4
    assert set(drawn.values()) == {1}


def test_the_server_forgets_the_boxes_once_they_are_delivered():
    server = at_stage("upload").server
    kept = {"plan", "keys", "commitments", "total", "survivors"}
    assert kept == set(type(server).__slots__)
