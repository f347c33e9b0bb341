import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.ring import packed_size
from fedcore.secagg import decode, encode
from fedcore.secagg.identity import Certificate, Credential
from fedcore.secagg.messages import (
    Advertisement,
    Delivery,
    EncryptedShares,
    Endorsement,
    Endorsements,
    Invitation,
    MaskedInput,
    Reveal,
    Roster,
    Survivors,
)
from fedcore.secagg.plan import MOST_CLIENTS
from fedcore.secagg.wire import BOX_BYTES
from tests.fedcore.secagg.rehearsal import (
    complete_plan,
    keys_of,
    mutations,
    numbers,
    refusal,
    signed_plan,
)

PLAN = complete_plan(5, ring_bits=12, dim=3)
SIGNED = signed_plan(5, ring_bits=12, dim=3)
KEYS = Advertisement(b"m" * 32, b"s" * 32)
CREDENTIAL = Credential(Certificate("ab", b"k" * 32, 0x0102, b"r" * 64), b"d" * 64)
SIGNED_KEYS = Advertisement(b"m" * 32, b"s" * 32, CREDENTIAL)
SIGNED_HEX = "6d" * 32 + "73" * 32 + "02 6162" + "6b" * 32 + "0201000000000000" \
    + "72" * 64 + "64" * 64  # fmt: skip
EXAMPLES = {
    Invitation: Invitation(4, PLAN),
    Advertisement: KEYS,
    Roster: Roster({1: KEYS, 3: Advertisement(b"M" * 32, b"S" * 32)}),
    EncryptedShares: EncryptedShares({0: b"a" * 88, 2: b"b" * 88}, b"C" * 32),
    Delivery: Delivery({1: b"c" * 88}),
    MaskedInput: MaskedInput(np.array([0x123, 0x456, 0x789], np.uint16)),
    Survivors: Survivors(frozenset({4, 1, 3})),
    Endorsement: Endorsement(b"e" * 64),
    Endorsements: Endorsements({0: b"f" * 64, 3: b"g" * 64}),
    Reveal: Reveal({1: b"x" * 36, 3: b"y" * 36}, {2: b"z" * 36}),
}
ENCODED = {
    Invitation: "6643 02 01 04000000"
    + "00" * 96
    + "0200 0100 05000000 04000000 03000000 02000000 0c 0300000000000000",
    Advertisement: "6643 02 02" + "6d" * 32 + "73" * 32,
    Roster: "6643 02 03 02000000 01000000"
    + ("6d" * 32 + "73" * 32)
    + "03000000"
    + ("4d" * 32 + "53" * 32),
    EncryptedShares: "6643 02 04" + "43" * 32 + "02000000 00000000" + "61" * 88
    + "02000000" + "62" * 88,
    Delivery: "6643 02 05 01000000 01000000" + "63" * 88,
    MaskedInput: "6643 02 06 2361458907",
    Survivors: "6643 02 07 03000000 01000000 03000000 04000000",
    Endorsement: "6643 02 08" + "65" * 64,
    Endorsements: "6643 02 09 02000000 00000000" + "66" * 64 + "03000000" + "67" * 64,
    Reveal: "6643 02 0a 02000000 01000000" + "78" * 36 + "03000000" + "79" * 36
    + "01000000 02000000" + "7a" * 36,
}  # fmt: skip
KINDS = list(EXAMPLES)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)

peers = st.integers(0, MOST_CLIENTS - 1)
exactly = lambda size: st.binary(min_size=size, max_size=size)  # noqa: E731
maps = lambda values: st.dictionaries(peers, values, max_size=6)  # noqa: E731
advertisements = st.builds(Advertisement, exactly(32), exactly(32))
certificates = st.builds(
    Certificate,
    st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"),
    exactly(32),
    st.integers(0, 2**64 - 1),
    exactly(64),
)
credentials = st.builds(Credential, certificates, exactly(64))
signed_advertisements = st.builds(Advertisement, exactly(32), exactly(32), credentials)
shares = maps(exactly(36))
MESSAGES = {
    Advertisement: advertisements,
    Roster: st.builds(Roster, maps(advertisements)),
    EncryptedShares: st.builds(EncryptedShares, maps(exactly(BOX_BYTES)), exactly(32)),
    Delivery: st.builds(Delivery, maps(exactly(BOX_BYTES))),
    Survivors: st.builds(Survivors, st.frozensets(peers, max_size=20)),
    Endorsement: st.builds(Endorsement, exactly(64)),
    Endorsements: st.builds(Endorsements, maps(exactly(64))),
    Reveal: st.tuples(shares, shares).map(
        lambda both: Reveal(both[0], {p: s for p, s in both[1].items() if p not in both[0]})
    ),
}


def read(data, kind):
    """As the two ends do: an invitation brings the plan, all else needs it."""
    return decode(data, kind, None if kind is Invitation else PLAN)


def same(one, other):
    if isinstance(one, MaskedInput):
        return np.array_equal(one.vector, other.vector) and one.vector.dtype == other.vector.dtype
    return one == other


@by_kind
def test_known_answer(kind):
    assert encode(EXAMPLES[kind], PLAN) == bytes.fromhex(ENCODED[kind])
    assert same(read(bytes.fromhex(ENCODED[kind]), kind), EXAMPLES[kind])


@settings(deadline=None)
@given(st.one_of(*MESSAGES.values()))
def test_a_message_survives_its_bytes(message):
    assert decode(encode(message, PLAN), type(message), PLAN) == message


@settings(deadline=None)
@given(st.one_of(signed_advertisements, st.builds(Roster, maps(signed_advertisements))))
def test_a_signed_message_survives_its_bytes(message):
    assert decode(encode(message, SIGNED), type(message), SIGNED) == message


def test_known_answer_of_signed_keys():
    roster = Roster({1: SIGNED_KEYS, 3: SIGNED_KEYS})
    for message, body in (
        (SIGNED_KEYS, "6643 02 02" + SIGNED_HEX),
        (roster, "6643 02 03 02000000 01000000" + SIGNED_HEX + "03000000" + SIGNED_HEX),
    ):
        assert encode(message, SIGNED).hex() == body.replace(" ", "")
        assert decode(bytes.fromhex(body), type(message), SIGNED) == message


def test_known_answer_of_an_invitation_of_an_enrolled_device():
    invitation = Invitation(2, SIGNED, keys_of(SIGNED))
    body = "6643 02 01 02000000" + SIGNED.to_bytes().hex() + b"".join(keys_of(SIGNED)).hex()
    assert encode(invitation, SIGNED) == bytes.fromhex(body)
    assert decode(bytes.fromhex(body), Invitation) == invitation


@pytest.mark.parametrize("surplus", [-32, -1, 1, 32])
def test_a_list_of_the_invited_that_is_too_short_or_too_long_is_refused(surplus):
    data = encode(Invitation(2, SIGNED, keys_of(SIGNED)), SIGNED)
    data = data + bytes(surplus) if surplus > 0 else data[:surplus]
    with refusal(PeerProtocolError, "expected 32 more bytes|Invitation ends after"):
        decode(data, Invitation)


def test_an_invitation_to_an_unsigned_round_carries_no_keys():
    data = encode(Invitation(2, PLAN, keys_of(SIGNED)), PLAN)
    with refusal(PeerProtocolError, "Invitation ends after"):
        decode(data, Invitation)


@pytest.mark.parametrize(("plan", "message"), [(PLAN, SIGNED_KEYS), (SIGNED, KEYS)])
def test_keys_are_signed_if_and_only_if_the_plan_says_so(plan, message):
    for both in (message, Roster({1: message})):
        with refusal(PeerProtocolError, "expected|ends after"):
            decode(encode(both, plan), type(both), plan)


@settings(deadline=None)
@given(data=st.data(), bits=st.integers(1, 64), dim=st.integers(1, 40))
def test_a_masked_vector_survives_its_bytes(data, bits, dim):
    plan = complete_plan(5, ring_bits=bits, dim=dim)
    words = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=dim, max_size=dim))
    message = MaskedInput(np.array(words, plan.ring.dtype))
    encoded = encode(message, plan)
    assert len(encoded) == 4 + packed_size(dim, bits)
    assert same(decode(encoded, MaskedInput, plan), message)


@settings(deadline=None)
@given(client=st.integers(0, 4), context=exactly(32))
def test_an_invitation_survives_its_bytes(client, context):
    message = Invitation(client, complete_plan(5, context=context))
    assert decode(encode(message, message.plan), Invitation) == message


def test_the_order_in_which_a_map_was_filled_does_not_show():
    forwards, backwards = {1: b"a" * 88, 2: b"b" * 88}, {2: b"b" * 88, 1: b"a" * 88}
    assert encode(Delivery(forwards), PLAN) == encode(Delivery(backwards), PLAN)


@by_kind
@pytest.mark.parametrize("position", range(4))
def test_a_header_with_any_byte_changed_is_refused(kind, position):
    data = bytearray(encode(EXAMPLES[kind], PLAN))
    for change in range(1, 256):
        damaged = bytes(data[:position]) + bytes([data[position] ^ change]) + data[position + 1 :]
        with refusal(PeerProtocolError, f"expected a {kind.__name__}"):
            read(damaged, kind)


@by_kind
def test_a_message_is_read_as_no_other_kind(kind):
    data = encode(EXAMPLES[kind], PLAN)
    for other in set(KINDS) - {kind}:
        with refusal(PeerProtocolError, f"expected a {other.__name__}"):
            read(data, other)


@by_kind
def test_every_prefix_and_every_extension_is_refused(kind):
    data = encode(EXAMPLES[kind], PLAN)
    for size in range(len(data)):
        with refusal(PeerProtocolError):
            read(data[:size], kind)
    for extra in (b"\0", b"\xff", data):
        with refusal(PeerProtocolError):
            read(data + extra, kind)


def header(kind):
    return encode(EXAMPLES[kind], PLAN)[:4]


REFUSED = {
    "a peer twice": (Survivors, numbers(3, 1, 2, 2), "increase strictly"),
    "peers out of order": (Survivors, numbers(2, 3, 1), "increase strictly"),
    "seven four times, as a threshold": (Survivors, numbers(4, 7, 7, 7, 7), "increase strictly"),
    "a peer beyond the largest cohort": (Survivors, numbers(1, MOST_CLIENTS), "below 65520"),
    "the largest peer number": (Survivors, numbers(1, 2**32 - 1), "below 65520"),
    "a count beyond the data": (Survivors, numbers(2**32 - 1, 1, 2), "expected 4 more bytes"),
    "a count below the data": (Survivors, numbers(1, 1, 2), "ends after 12 bytes, found 16"),
    "both secrets of one peer": (
        Reveal,
        numbers(1, 2) + b"x" * 36 + numbers(1, 2) + b"y" * 36,
        "one secret per peer, found both for",
    ),
    "a share too short": (Reveal, numbers(1, 2) + b"x" * 35, "expected 36 more bytes"),
    "a box too long": (Delivery, numbers(1, 2) + b"x" * 89, "ends after 100 bytes, found 101"),
    "a peer twice on the roster": (
        Roster,
        numbers(2) + 2 * (numbers(1) + bytes(64)),
        "increase strictly",
    ),
    "a signature too short": (Endorsement, b"e" * 63, "expected 64 more bytes"),
    "a signature too long": (Endorsement, b"e" * 65, "ends after 68 bytes, found 69"),
    "an endorsement twice": (
        Endorsements,
        numbers(2) + 2 * (numbers(1) + bytes(64)),
        "increase strictly",
    ),
    "boxes without a commitment": (EncryptedShares, numbers(0), "expected 32 more bytes"),
    "a commitment without boxes": (EncryptedShares, bytes(32), "expected 4 more bytes"),
    "an empty body": (Roster, b"", "expected 4 more bytes"),
    "a vector one byte short": (MaskedInput, bytes(4), "take 5 bytes, found 4"),
    "a vector with padding bits": (MaskedInput, bytes(4) + b"\x10", "padding bits"),
    "an index outside the cohort": (Invitation, numbers(5) + PLAN.to_bytes(), "below 5, found 5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bytes_that_no_encoder_writes_are_refused(what):
    kind, body, reason = REFUSED[what]
    with refusal(PeerProtocolError, reason):
        read(header(kind) + body, kind)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(96, 1), (98, 2), (100, 1), (104, 3), (108, 1), (112, 1), (116, 65), (117, 0)],
    ids=["version", "suite", "clients", "neighbours", "threshold", "minimum", "bits", "dim"],
)
def test_an_invitation_to_a_plan_that_breaks_a_rule_is_refused(offset, value):
    plan = bytearray(PLAN.to_bytes())
    plan[offset] = value
    with refusal(PeerProtocolError, "the server's plan is refused: ") as caught:
        read(header(Invitation) + numbers(0) + bytes(plan), Invitation)
    assert isinstance(caught.value.__cause__, ConfigurationError)


@by_kind
def test_only_an_invitation_is_read_without_a_plan(kind):
    data = encode(EXAMPLES[kind], PLAN)
    if kind is Invitation:
        assert decode(data, kind) == EXAMPLES[kind]
    else:
        with refusal(PeerProtocolError, "before the plan is known"):
            decode(data, kind)


def test_the_longest_promise_costs_no_memory():
    plan = complete_plan(5, ring_bits=64, dim=2**40 - 1)
    with refusal(PeerProtocolError, "found 8"):
        decode(header(MaskedInput) + bytes(8), MaskedInput, plan)


@by_kind
def test_any_bytes_are_one_canonical_message_or_a_protocol_error(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    accepted = 0
    for data in mutations(encode(EXAMPLES[kind], PLAN), 2600, rng):
        try:
            message = read(data, kind)
        except PeerProtocolError:
            continue
        accepted += 1
        assert type(message) is kind
        assert encode(message, PLAN) == data
    assert accepted > 0  # the mutations are not so wild that nothing gets past the header


SIGNED_EXAMPLES = [SIGNED_KEYS, Roster({1: SIGNED_KEYS, 3: SIGNED_KEYS})]


@pytest.mark.parametrize("message", SIGNED_EXAMPLES, ids=lambda message: type(message).__name__)
def test_any_bytes_are_one_canonical_signed_message_or_a_protocol_error(message):
    rng, kind = np.random.default_rng(7), type(message)
    accepted = 0
    for data in mutations(encode(message, SIGNED), 2600, rng):
        try:
            read = decode(data, kind, SIGNED)
        except PeerProtocolError:
            continue
        accepted += 1
        assert encode(read, SIGNED) == data
    assert accepted > 0


@pytest.mark.parametrize("message", SIGNED_EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_prefix_and_every_extension_of_a_signed_message_is_refused(message):
    data = encode(message, SIGNED)
    for size in range(len(data)):
        with refusal(PeerProtocolError):
            decode(data[:size], type(message), SIGNED)
    for extra in (b"\0", b"\xff", data):
        with refusal(PeerProtocolError):
            decode(data + extra, type(message), SIGNED)


@pytest.mark.parametrize("name", [b"", b"\0", b"-a", b"a b", b"a\n", b"\xfc", b"x" * 65])
def test_a_credential_with_a_name_that_could_mislead_is_refused(name):
    body = b"m" * 32 + b"s" * 32 + bytes([len(name)]) + name + bytes(32 + 8 + 64 + 64)
    with refusal(PeerProtocolError, "a certificate's name must be 1 to 64 letters"):
        decode(header(Advertisement) + body, Advertisement, SIGNED)
