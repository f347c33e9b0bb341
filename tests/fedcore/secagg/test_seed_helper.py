import hashlib
import hmac
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.crypto import KeyPair, Mask, ReplayedEntropy, SystemEntropy, add_masks, transcript_hash
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import (
    ConfigurationError,
    LocalProtocolError,
    PeerProtocolError,
    RoundAbortedError,
)
from fedcore.ring import packed_size
from fedcore.secagg import run_round
from fedcore.secagg.identity import Certificate, Identity
from fedcore.secagg.seed_helper import (
    CloseRequest,
    HelperPlan,
    MaskSum,
    SeedBox,
    Voucher,
    collect,
    mask_and_seal,
    open_round,
    run_helper_round,
    unmask,
)
from tests.fedcore.secagg.rehearsal import complete_plan, mutations, numbers, refusal

ENTROPY = ReplayedEntropy(b"seed helper")
HELPER = KeyPair.generate(ENTROPY, "helper-key")
STRANGER = KeyPair.generate(ENTROPY, "strange-key")
ROOT = SigningKey.generate(ENTROPY.child("root"))
NOW, LATER = 1_700_000_000, 1_800_000_000


def plan_of(clients=5, **changes):
    values = {
        "clients": clients,
        "minimum_survivors": 2,
        "ring_bits": 16,
        "dim": 6,
        "context": b"context".ljust(32),
        "helper_key": HELPER.public,
    }
    return HelperPlan(**(values | changes))


PLAN = plan_of()


def inputs_of(plan, seed=0):
    words = np.random.default_rng(seed).integers(
        0, plan.ring.mask, (plan.clients, plan.dim), np.uint64, endpoint=True
    )
    return {client: row.astype(plan.ring.dtype) for client, row in enumerate(words)}


def upload_of(client, plan=PLAN, vector=None, **changes):
    vector = plan.ring.zeros(plan.dim) if vector is None else vector
    options = {"pinned_key": plan.helper_key, "entropy": ENTROPY.child(f"client={client}")}
    return mask_and_seal(vector, plan, client, **(options | changes))


def state_with(clients, plan=PLAN):
    state = open_round(plan, HELPER)
    for client in clients:
        state = state.on_box(upload_of(client, plan).box, NOW)
    return state


def enrolled(name, root=ROOT, expires_at=LATER):
    key = SigningKey.generate(ENTROPY.child(name))
    return Identity(
        Certificate.issue(root, name=name, key=key.public.raw, expires_at=expires_at), key
    )


@st.composite
def rounds(draw):
    clients = draw(st.integers(2, 8))
    plan = plan_of(
        clients,
        minimum_survivors=draw(st.integers(2, clients)),
        ring_bits=draw(st.integers(1, 64)),
        dim=draw(st.integers(1, 30)),
        context=draw(st.binary(min_size=32, max_size=32)),
    )
    return plan, draw(st.sets(st.integers(0, clients - 1)))


@settings(max_examples=150)
@given(rounds(), st.integers(0, 2**32))
def test_a_round_gives_the_exact_sum_if_and_only_if_enough_clients_remain(case, seed):
    plan, drops = case
    inputs = inputs_of(plan, seed)
    survivors = inputs.keys() - drops
    if len(survivors) >= plan.minimum_survivors:
        result = run_helper_round(inputs, plan, drops, helper=HELPER)
        columns = zip(*(inputs[client].tolist() for client in survivors), strict=True)
        assert result.survivors == survivors
        assert result.total.dtype == plan.ring.dtype
        assert result.total.tolist() == [sum(column) % 2**plan.ring_bits for column in columns]
    else:
        with refusal(RoundAbortedError, r"needed \d+ clients, found \d+") as caught:
            run_helper_round(inputs, plan, drops, helper=HELPER)
        assert caught.value.found < caught.value.needed == plan.minimum_survivors


def test_both_backends_give_the_same_sum():
    plan = complete_plan(5)
    inputs = inputs_of(PLAN)
    drops = {3: "upload"}
    pairwise = run_round(inputs, plan, drops)
    assisted = run_helper_round(inputs, PLAN, drops)
    assert pairwise.survivors == assisted.survivors
    assert pairwise.total.tolist() == assisted.total.tolist()


def test_a_dropout_costs_the_others_not_a_byte():
    inputs = inputs_of(PLAN)
    calm, stormy = (run_helper_round(inputs, PLAN, drops) for drops in ((), {0, 1, 4}))
    assert {calm.sent_bytes[c] for c in calm.survivors} == {packed_size(6, 16) + 89}
    assert all(stormy.sent_bytes[c] == calm.sent_bytes[c] for c in stormy.survivors)
    assert stormy.received_bytes == calm.received_bytes


def test_a_round_refuses_inputs_that_do_not_fit_the_plan():
    with refusal(ConfigurationError, "expected inputs of 5 clients.*found 4 inputs"):
        run_helper_round(dict.fromkeys(range(4), PLAN.ring.zeros(6)), PLAN)
    with refusal(ConfigurationError, r"drops of \[9\]"):
        run_helper_round(inputs_of(PLAN), PLAN, {9})
    with refusal(PeerProtocolError, "correct the coordinator's helper key"):
        run_helper_round(inputs_of(PLAN), PLAN, helper=STRANGER)


# Secrecy


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
    plan = plan_of(ring_bits=bits, dim=1 << 15)
    for client in range(3):
        assert_uniform(upload_of(client, plan).vector, bits)


def test_the_coordinator_alone_sees_unrelated_uniform_vectors_and_so_does_their_total():
    plan = plan_of(ring_bits=8, dim=1 << 15)
    inputs = {client: np.full(plan.dim, client, np.uint8) for client in range(4)}
    uploads = [upload_of(client, plan, vector).vector for client, vector in inputs.items()]
    for one, other in combinations(uploads, 2):
        assert_uniform(one + other, 8)
        assert_uniform(one - other, 8)
    assert_uniform(sum(uploads, plan.ring.zeros(plan.dim)), 8)


def test_the_helpers_view_does_not_depend_on_the_inputs():
    views = []
    for vector in (PLAN.ring.zeros(6), inputs_of(PLAN)[3]):
        uploads = [upload_of(client, vector=vector) for client in range(3)]
        state = open_round(PLAN, HELPER)
        for upload in uploads:
            state = state.on_box(upload.box, NOW)
        views.append(state.seeds)
    assert views[0] == views[1]
    assert len(set(views[0].values())) == 3


def test_no_box_and_no_printed_state_shows_a_seed_or_the_helpers_secret():
    boxes = [upload_of(client).box for client in range(3)]
    state = state_with(range(3))
    closed = state.close(frozenset({0, 1, 2}))
    seeds = [*state.seeds.values(), HELPER.secret]
    assert len(set(seeds)) == 4
    assert not [s for s in seeds if s in b"".join(box.to_bytes() for box in boxes)]
    for shown in (repr(state), repr(closed), repr(closed.mask_sum()), repr(upload_of(0))):
        assert not [s for s in seeds if s.hex() in shown or repr(s)[2:-1] in shown]


def test_every_upload_of_a_device_has_a_mask_of_its_own():
    plan = plan_of(dim=64)
    uploads = [upload_of(0, plan, entropy=SystemEntropy()).vector.tobytes() for _ in range(20)]
    assert len(set(uploads)) == 20


def test_a_replayed_round_masks_alike():
    assert upload_of(2).vector.tolist() == upload_of(2).vector.tolist()
    assert upload_of(2).box.sealed != upload_of(2).box.sealed  # the sealing is never replayed


# The box


def hpke_seal(plaintext, info, public, ephemeral):
    """RFC 9180, sections 4.1 and 5.1, written out: X25519, HKDF-SHA256, AES-256-GCM."""

    def extract(suite, salt, label, secret):
        return hmac.digest(salt, b"HPKE-v1" + suite + label + secret, hashlib.sha256)

    def expand(suite, prk, label, context, size):
        labelled = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context
        return hmac.digest(prk, labelled + b"\x01", hashlib.sha256)[:size]

    kem, suite = b"KEM\x00\x20", b"HPKE\x00\x20\x00\x01\x00\x02"
    encapsulated = ephemeral.public_key().public_bytes_raw()
    point = ephemeral.exchange(X25519PublicKey.from_public_bytes(public))
    prk = extract(kem, b"", b"eae_prk", point)
    shared = expand(kem, prk, b"shared_secret", encapsulated + public, 32)
    context = (
        b"\x00" + extract(suite, b"", b"psk_id_hash", b"") + extract(suite, b"", b"info_hash", info)
    )
    secret = extract(suite, shared, b"secret", b"")
    key, nonce = (
        expand(suite, secret, name, context, size)
        for name, size in ((b"key", 32), (b"base_nonce", 12))
    )
    return encapsulated + AESGCM(key).encrypt(nonce, plaintext, b"")


def test_the_helper_opens_what_another_implementation_of_the_standard_seals():
    seed = b"seed of 32 bytes, not a key.....".ljust(32)[:32]
    info = b"fedcore/v1/helper-seed" + PLAN.digest() + (3).to_bytes(4, "little")
    sealed = hpke_seal(seed, info, HELPER.public, X25519PrivateKey.from_private_bytes(b"e" * 32))
    state = open_round(PLAN, HELPER).on_box(SeedBox(3, sealed), NOW)
    assert state.seeds == {3: seed}


WRONG_BOXES = {
    "another round": lambda: upload_of(1, replace(PLAN, context=bytes(32))).box,
    "another minimum": lambda: upload_of(1, replace(PLAN, minimum_survivors=3)).box,
    "another client": lambda: replace(upload_of(2).box, client=1),
    "another helper": lambda: upload_of(1, replace(PLAN, helper_key=STRANGER.public)).box,
    "no key": lambda: SeedBox(1, bytes(80)),
    "31 bytes": lambda: SeedBox(
        1,
        hpke_seal(
            bytes(31),
            b"fedcore/v1/helper-seed" + PLAN.digest() + (1).to_bytes(4, "little"),
            HELPER.public,
            X25519PrivateKey.from_private_bytes(b"e" * 32),
        ),
    ),
}


@pytest.mark.parametrize("what", WRONG_BOXES)
def test_a_box_made_for_something_else_is_refused(what):
    with refusal(PeerProtocolError, "does not open|must seal 32 bytes"):
        open_round(PLAN, HELPER).on_box(WRONG_BOXES[what](), NOW)


def test_a_box_with_any_byte_changed_is_refused():
    box, state = upload_of(0).box, open_round(PLAN, HELPER)
    for place in range(len(box.sealed)):
        # The curve ignores the top bit of a key, the box does not: flip a low one.
        altered = bytearray(box.sealed)
        altered[place] ^= 1
        with refusal(PeerProtocolError, "does not open"):
            state.on_box(replace(box, sealed=bytes(altered)), NOW)


def test_a_second_box_and_an_uninvited_one_are_refused():
    with refusal(PeerProtocolError, "client 0 has already sent a box"):
        state_with([0]).on_box(upload_of(0).box, NOW)
    with refusal(PeerProtocolError, "must be below 5, found 5"):
        state_with([0]).on_box(replace(upload_of(0).box, client=5), NOW)


# Who may take part


def signed(client, name=None, **changes):
    identity = enrolled(name or f"device-{client}", **changes)
    return upload_of(client, identity=identity).box


def test_a_helper_that_pins_an_authority_admits_enrolled_devices():
    state = open_round(PLAN, HELPER, ROOT.public.raw)
    for client in range(3):
        state = state.on_box(SeedBox.from_bytes(signed(client).to_bytes()), NOW)
    assert state.names == {"device-0", "device-1", "device-2"}
    assert state.close(frozenset({0, 2})).mask_sum().vector.shape == (6,)


NOT_ENROLLED = {
    "unsigned": (lambda: upload_of(1).box, "is unsigned"),
    "another root": (lambda: signed(1, root=SigningKey(b"other root".ljust(32))), "not signed"),
    "expired": (lambda: signed(1, expires_at=NOW), "expired"),
    "another's signature": (
        lambda: replace(upload_of(1).box, voucher=signed(1).voucher),
        "not signed",
    ),
    "a device under a second index": (lambda: signed(1, name="device-0"), "already takes part"),
}


@pytest.mark.parametrize("what", NOT_ENROLLED)
def test_a_coordinator_cannot_invent_clients(what):
    make, reason = NOT_ENROLLED[what]
    state = open_round(PLAN, HELPER, ROOT.public.raw).on_box(signed(0), NOW)
    with pytest.raises(PeerProtocolError, match=reason):
        state.on_box(make(), NOW)


# Closing


def test_the_mask_sum_is_that_of_the_survivors_alone():
    state = state_with(range(4))
    for survivors in (frozenset({0, 3}), frozenset({1, 2, 3})):
        masks = [Mask(state.seeds[client]) for client in survivors]
        expected = add_masks(PLAN.ring.zeros(6), masks, PLAN.ring)
        assert state.close(survivors).mask_sum().vector.tolist() == expected.tolist()


def test_a_closed_round_has_forgotten_the_seeds_of_the_others():
    assert state_with(range(4)).close(frozenset({0, 3})).seeds.keys() == {0, 3}


@pytest.mark.parametrize("survivors", [set(), {1}, {4}])
def test_a_sum_over_too_few_is_refused(survivors):
    with refusal(RoundAbortedError, "at closing: needed 2 clients, found") as caught:
        state_with(range(5)).close(frozenset(survivors))
    assert caught.value.found == len(survivors)


def test_survivors_whose_box_never_came_are_refused():
    with refusal(PeerProtocolError, r"among the 3 clients.*found also \[3, 4\]"):
        state_with(range(3)).close(frozenset({0, 1, 3, 4}))


# Device and coordinator


def test_a_device_takes_part_with_the_helper_it_pins_only():
    with refusal(PeerProtocolError, "this device does not take part"):
        upload_of(0, replace(PLAN, helper_key=STRANGER.public), pinned_key=HELPER.public)


def test_a_device_refuses_an_index_and_an_input_that_are_not_the_plans():
    for client in (-1, 5):
        with refusal(PeerProtocolError, "index must be in 0..4"):
            upload_of(client)
    with refusal(LocalProtocolError, r"shape \(6,\), found \(5,\)"):
        upload_of(0, vector=PLAN.ring.zeros(5))
    with refusal(LocalProtocolError, "dtype uint16"):
        upload_of(0, vector=np.zeros(6, np.uint32))


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)])
def test_a_key_of_low_order_cannot_be_pinned(key):
    with refusal(ConfigurationError, "a point of large order"):
        upload_of(0, replace(PLAN, helper_key=key))


def test_the_coordinator_counts_each_invited_client_once():
    state = collect(PLAN).on_input(0, upload_of(0).vector)
    with refusal(PeerProtocolError, "client 0 has already answered"):
        state.on_input(0, upload_of(0).vector)
    for client in (-1, 5):
        with refusal(PeerProtocolError, "was not invited"):
            state.on_input(client, upload_of(0).vector)
    for wrong in (np.zeros(5, np.uint16), np.zeros(6, np.uint32)):
        with refusal(PeerProtocolError, "must send 6 elements"):
            state.on_input(1, wrong)


def test_the_coordinator_asks_for_no_sum_over_too_few_and_takes_no_other_rounds_masks():
    state = collect(PLAN).on_input(0, upload_of(0).vector)
    with refusal(RoundAbortedError, "at uploading: needed 2 clients, found 1"):
        state.close()
    waiting, request = state.on_input(1, upload_of(1).vector).close()
    assert request.survivors == {0, 1}
    with refusal(PeerProtocolError, "another round's"):
        waiting.on_mask_sum(MaskSum(bytes(32), PLAN.ring.zeros(6)))


@given(st.integers(1, 64), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_unmasking_is_subtraction_in_the_ring(bits, total, masks):
    ring = plan_of(ring_bits=bits).ring
    total, masks = total & ring.mask, masks & ring.mask
    left = unmask(np.array([total], ring.dtype), np.array([masks], ring.dtype), ring)
    assert left.tolist() == [(total - masks) % 2**bits]


# Bytes

FIXED = HelperPlan(5, 3, 12, 3, context=b"c" * 32, helper_key=b"k" * 32)


def fixed_identity():
    key = SigningKey(b"device".ljust(32))
    certificate = Certificate.issue(
        SigningKey(b"root".ljust(32)), name="press-7", key=key.public.raw, expires_at=LATER
    )
    return Identity(certificate, key)


def fixed_signed_box():
    return SeedBox(4, b"s" * 80, Voucher.make(fixed_identity(), FIXED.digest(), 4, b"s" * 80))


MESSAGES = {
    "box": (SeedBox(4, b"s" * 80), SeedBox.from_bytes),
    "signed box": (fixed_signed_box(), SeedBox.from_bytes),
    "close": (CloseRequest(b"d" * 32, frozenset({4, 1, 3})), CloseRequest.from_bytes),
}
SUM = MaskSum(FIXED.digest(), np.array([0x123, 0x456, 0x789], np.uint16))


def read_sum(data):
    return MaskSum.from_bytes(data, FIXED)


def test_known_answers():
    numbers_of_plan = "0100 05000000 03000000 0c 0300000000000000"
    assert FIXED.to_bytes() == b"c" * 32 + b"k" * 32 + bytes.fromhex(numbers_of_plan)
    assert FIXED.digest() == transcript_hash("fedcore/v1/helper-plan", FIXED.to_bytes())
    assert FIXED.digest().hex()[:16] == "9a5cb5c64ec1e970"
    assert MESSAGES["box"][0].to_bytes() == bytes.fromhex("66430121 04000000") + b"s" * 80 + b"\0"
    assert MESSAGES["close"][0].to_bytes() == bytes.fromhex("66430122") + b"d" * 32 + bytes.fromhex(
        "03000000 01000000 03000000 04000000"
    )
    packed = bytes.fromhex("2361458907")
    assert SUM.to_bytes(FIXED) == bytes.fromhex("66430123") + FIXED.digest() + packed
    assert len(SUM.to_bytes(FIXED)) == MaskSum.size(FIXED)


def test_a_signed_box_is_the_box_then_certificate_and_signature():
    box = fixed_signed_box()
    certificate = box.voucher.certificate.to_bytes()
    plain = SeedBox(4, b"s" * 80).to_bytes()[:-1]
    assert box.to_bytes() == plain + b"\x01" + certificate + box.voucher.signature


@given(rounds())
def test_a_plan_survives_its_bytes_and_its_digest_names_it(case):
    plan, _ = case
    assert HelperPlan.from_bytes(plan.to_bytes()) == plan
    assert replace(plan, helper_key=STRANGER.public).digest() != plan.digest()


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_survives_its_bytes_and_no_prefix_or_extension_is_read(name):
    message, read = MESSAGES[name]
    data = message.to_bytes()
    assert read(data) == message
    for wrong in (*(data[:size] for size in range(len(data))), data + b"\0", data + data):
        with refusal(PeerProtocolError):
            read(wrong)


@given(st.integers(1, 64), st.integers(1, 40), st.integers(0, 2**32))
def test_a_mask_sum_survives_its_bytes(bits, dim, seed):
    plan = plan_of(ring_bits=bits, dim=dim)
    vector = inputs_of(plan, seed)[0]
    data = MaskSum(plan.digest(), vector).to_bytes(plan)
    assert len(data) == MaskSum.size(plan)
    assert MaskSum.from_bytes(data, plan).vector.tolist() == vector.tolist()


REFUSED = {
    "a client twice": (CloseRequest, bytes(32) + numbers(3, 1, 2, 2), "increase strictly"),
    "clients out of order": (CloseRequest, bytes(32) + numbers(2, 3, 1), "increase strictly"),
    "a count beyond the data": (CloseRequest, bytes(32) + numbers(2**32 - 1, 1), "expected 4 more"),
    "a client beyond any cohort": (SeedBox, numbers(2**32 - 1) + bytes(81), "below 65520"),
    "half a voucher": (SeedBox, numbers(1) + bytes(80) + b"\x02", "found 2"),
    "no name": (SeedBox, numbers(1) + bytes(80) + b"\x01" + bytes(200), "name must be"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bytes_that_no_encoder_writes_are_refused(what):
    kind, body, reason = REFUSED[what]
    header = {SeedBox: b"fC\x01\x21", CloseRequest: b"fC\x01\x22"}[kind]
    with refusal(PeerProtocolError, reason):
        kind.from_bytes(header + body)


def test_a_mask_sum_of_another_round_or_length_is_refused():
    data = SUM.to_bytes(FIXED)
    with refusal(PeerProtocolError, "another round's"):
        MaskSum.from_bytes(data, replace(FIXED, context=bytes(32)))
    for wrong in (data[:-1], data + b"\0", data[:-1] + b"\x17"):
        with refusal(PeerProtocolError, "take 5 bytes|padding bits"):
            read_sum(wrong)


@pytest.mark.parametrize("name", [*MESSAGES, "sum"])
def test_any_bytes_are_one_canonical_message_or_a_protocol_error(name):
    if name == "sum":
        read, data, write = read_sum, SUM.to_bytes(FIXED), lambda m: m.to_bytes(FIXED)
    else:
        message, read = MESSAGES[name]
        data, write = message.to_bytes(), lambda m: m.to_bytes()
    accepted = 0
    for wild in mutations(data, 2000, np.random.default_rng(len(name))):
        try:
            found = read(wild)
        except PeerProtocolError:
            continue
        accepted += 1
        assert write(found) == wild
    assert accepted > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"clients": 1}, "clients must be in 2..65520"),
        ({"clients": 65_521}, "clients must be in 2..65520"),
        ({"minimum_survivors": 1}, "minimum_survivors must be in 2..5"),
        ({"minimum_survivors": 6}, "minimum_survivors must be in 2..5"),
        ({"ring_bits": 0}, "bits must be in 1..64"),
        ({"ring_bits": 65}, "bits must be in 1..64"),
        ({"dim": 0}, "dim must be positive"),
        ({"dim": 1 << 40}, "dim must be positive"),
        ({"context": b""}, "context must be 32 bytes"),
        ({"helper_key": bytes(31)}, "helper_key must be 32 bytes"),
    ],
)
def test_a_plan_out_of_range_is_refused(change, reason):
    with refusal(ConfigurationError, reason):
        plan_of(**change)


def test_any_bytes_are_one_canonical_plan_or_a_configuration_error():
    accepted = 0
    for wild in mutations(FIXED.to_bytes(), 2000, np.random.default_rng(7)):
        try:
            plan = HelperPlan.from_bytes(wild)
        except ConfigurationError:
            continue
        accepted += 1
        assert plan.to_bytes() == wild
    assert accepted > 0
    with refusal(ConfigurationError, "version 1, found 2: update the older side"):
        HelperPlan.from_bytes(FIXED.to_bytes()[:64] + b"\x02" + FIXED.to_bytes()[65:])
