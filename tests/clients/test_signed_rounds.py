"""Devices that are enrolled: what they demand of a round, and whom they answer."""

from copy import deepcopy
from dataclasses import replace

import pytest

from clients import DevicePolicy
from clients.journal import Answer, AnsweredJournal, journal_of
from clients.simulated import FAR_FUTURE, simulated_identities, simulated_root
from fedcore.codec import Clip
from fedcore.crypto import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import (
    ConfigurationError,
    FedcoreError,
    PeerProtocolError,
    RoundAbortedError,
)
from fedcore.keyfiles import load_identity
from fedcore.pipeline import RECORD, Bonawitz, NoSecAgg, RunPlan, SeedHelper
from fedcore.pipeline.envelope import STAGES
from fedcore.secagg import Certificate, encode
from fedcore.secagg.identity import Credential
from fedcore.secagg.messages import Endorsements, Survivors
from tests.clients.coordinator import (
    AUTHORITY,
    CLIENTS,
    SEED,
    SIGNED,
    UNSIGNED,
    Coordinator,
    enrolled,
    new_context,
    payload,
    stages_of,
    training_app,
)
from tests.clients.test_secagg_mod import BOTH, noting, refused

PINNED = DevicePolicy(authority=AUTHORITY)
OTHER = simulated_root(SEED + 1).public.raw.hex()
KEY = "5e" * 32


def with_bits(bits):
    """Signed rounds whose plan spells out how much they withstand."""
    return replace(SIGNED, secagg=replace(SIGNED.secagg, security_bits=bits))


def first_message(coordinator):
    masked = coordinator.bound.secagg is not None
    return coordinator.message("advertise" if masked else "upload")


def certificate(name="device", seed=b"device", root=SEED, expires_at=FAR_FUTURE):
    """A certificate, and the key to it."""
    key = SigningKey.generate(ReplayedEntropy(seed))
    issued = Certificate.issue(
        simulated_root(root), name=name, key=key.public.raw, expires_at=expires_at
    )
    return issued, key


def keys_with(issued):
    """A list of the invited in which a device with this certificate comes first."""
    keys = [certificate(seed=b"%d" % number)[0].key for number in range(100)]
    return (issued.key, *sorted(key for key in keys if key > issued.key)[: CLIENTS - 1])


def written(folder, issued, key):
    """What an owner puts into the configuration of a node."""
    paths = {"identity": folder / "identity", "identity-key": folder / "identity.key"}
    paths["identity"].write_bytes(issued.to_bytes())
    paths["identity-key"].write_bytes(key.to_pem())
    paths["identity-key"].chmod(0o600)
    return {name: str(path) for name, path in paths.items()}


# What a device demands


@pytest.mark.parametrize(
    ("policy", "run", "changes", "rule"),
    [
        (PINNED, UNSIGNED, {}, "keys certified by the pinned authority, found None"),
        (PINNED, with_bits(79), {"clients": 129}, "80 bits for a sparse graph .*, found 79"),
        (DevicePolicy(), with_bits(79), {"clients": 129}, "80 bits for a sparse graph"),
        (
            replace(PINNED, sparse_security_bits=81),
            SIGNED,
            {"clients": 129},
            "81 bits for a sparse graph that the coordinator may draw again, found 80",
        ),
        (
            DevicePolicy(require_masks=False),
            RunPlan(secagg=NoSecAgg(), dropout=0.51),
            {},
            "at most a fraction of 0.5 to disappear, found 0.51",
        ),
        (
            replace(PINNED, most_dropout=0.2),
            replace(SIGNED, dropout=0.21),
            {"clients": 10},
            "at most a fraction of 0.2 to disappear, found 0.21",
        ),
        (replace(PINNED, most_clients=128), SIGNED, {"clients": 129}, "at most 128 invited"),
        (replace(PINNED, most_clients=9), SIGNED, {"clients": 10}, "at most 9 invited"),
        (DevicePolicy(most_clients=9), UNSIGNED, {"clients": 10}, "at most 9 invited"),
        (PINNED, RunPlan(secagg=NoSecAgg()), {}, "masked uploads, found secagg=none"),
        (
            replace(PINNED, require_masks=False),
            RunPlan(secagg=NoSecAgg()),
            {},
            "keys certified by the pinned authority, found None",
        ),
        (
            replace(PINNED, helper_key=KEY),
            RunPlan(secagg=SeedHelper(KEY)),
            {},
            "keys certified by the pinned authority, found None",
        ),
        (
            DevicePolicy(minimum_corrupt=0.2),
            UNSIGNED,
            {},
            "a colluding fraction of at least 0.2 to be withstood, found 0.1",
        ),
    ],
)
def test_a_round_with_less_protection_than_demanded_is_refused_by_rule(policy, run, changes, rule):
    calls = []
    coordinator = Coordinator(training_app(policy, train=noting(calls)), run, changes)
    refused(coordinator, first_message(coordinator), f"policy demands {rule}")
    assert calls == []
    assert list(coordinator.contexts[0].state) == []


@pytest.mark.parametrize("secagg", [Bonawitz(authority=OTHER), SeedHelper(KEY, OTHER)])
def test_a_round_of_another_authority_is_refused(secagg):
    policy = replace(PINNED, helper_key=KEY)
    coordinator = Coordinator(training_app(policy), RunPlan(secagg=secagg))
    with pytest.raises(PeerProtocolError, match="certified by the pinned authority, found ") as no:
        coordinator.ask(0, first_message(coordinator))
    assert OTHER[:8] in str(no.value)
    assert list(coordinator.contexts[0].state) == []


@pytest.mark.parametrize(
    ("policy", "run", "changes"),
    [
        (PINNED, SIGNED, {"clients": 128}),
        (PINNED, SIGNED, {"clients": 129}),
        (PINNED, with_bits(80), {"clients": 129}),
        (PINNED, with_bits(40), {"clients": 128}),
        (replace(PINNED, sparse_security_bits=40), with_bits(40), {"clients": 129}),
        (replace(PINNED, most_dropout=0.2), replace(SIGNED, dropout=0.2), {"clients": 10}),
        (DevicePolicy(), replace(UNSIGNED, secagg=Bonawitz(security_bits=40)), {"clients": 129}),
        (DevicePolicy(), UNSIGNED, {"clients": 129}),
        (DevicePolicy(), SIGNED, {"clients": 129}),
        (DevicePolicy(minimum_corrupt=0.1), UNSIGNED, {}),
    ],
)
def test_a_round_at_the_limit_of_the_policy_is_answered(policy, run, changes):
    coordinator = Coordinator(training_app(policy), run, changes)
    assert payload(coordinator.ask(0, first_message(coordinator)))


def test_signatures_change_not_a_single_bit_of_the_mean():
    signed, unsigned = (Coordinator(training_app(), run).finish() for run in (SIGNED, UNSIGNED))
    assert signed.delta.tobytes() == unsigned.delta.tobytes()
    assert signed.metrics == unsigned.metrics


# Whom it answers


def test_a_device_without_an_identity_does_not_join_a_signed_round():
    app = training_app(PINNED, identity=lambda context: None)
    coordinator = Coordinator(app, SIGNED)
    refused(coordinator, first_message(coordinator), "not enrolled: enroll it first")
    assert "fedcore.protocol" not in coordinator.contexts[0].state


@pytest.mark.parametrize("stage", ["share", "endorse"])
def test_a_device_that_loses_its_identity_in_the_middle_answers_nothing_more(stage):
    lost = []
    app = training_app(PINNED, identity=lambda context: None if lost else enrolled(context))
    coordinator = Coordinator(app, SIGNED).advance(stage)
    lost.append(True)
    refused(coordinator, coordinator.message(stage), "identity|enroll", FedcoreError)
    assert "fedcore.protocol" not in coordinator.contexts[0].state


def test_an_unsigned_round_needs_no_identity():
    def never(context):
        raise AssertionError

    Coordinator(training_app(identity=never)).finish()


# Who it is: asked outside of rounds


def question(coordinator, client=0):
    return coordinator.message("identify", client, plan=b"", message=b"")


def test_a_device_says_who_it_is_and_signs_the_number_of_its_node():
    coordinator = Coordinator(training_app(PINNED), SIGNED)
    answer = Credential.from_bytes(payload(coordinator.ask(2, question(coordinator, 2))))
    assert answer.certificate == enrolled(new_context(2)).certificate
    answer.check_node(1002, bytes.fromhex(AUTHORITY), now=0)
    with pytest.raises(PeerProtocolError, match="answer of 1003 is not signed by the key"):
        answer.check_node(1003, bytes.fromhex(AUTHORITY), now=0)
    with pytest.raises(PeerProtocolError, match="is not signed by the key"):
        answer.check_node(1002, bytes.fromhex(OTHER), now=0)
    with pytest.raises(PeerProtocolError, match="expired"):
        answer.check_node(1002, bytes.fromhex(AUTHORITY), now=FAR_FUTURE)


def test_a_device_that_is_not_enrolled_cannot_say_who_it_is():
    coordinator = Coordinator(training_app(identity=lambda context: None), UNSIGNED)
    refused(coordinator, question(coordinator), "but it is not enrolled: enroll it first")


@pytest.mark.parametrize("stage", STAGES)
def test_being_asked_who_it_is_changes_nothing_on_a_device(stage, tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    app = training_app(journal=lambda context: journal if context.node_id == 1000 else None)
    coordinator = Coordinator(app, SIGNED).advance(stage)
    before = deepcopy(coordinator.contexts[0]).state, journal.last("1")
    one = payload(coordinator.ask(0, question(coordinator)))
    assert (coordinator.contexts[0].state, journal.last("1")) == before
    assert payload(coordinator.ask(0, question(coordinator))) == one
    assert payload(coordinator.ask(0, coordinator.message(stage)))


def test_a_device_whose_certificate_expired_does_not_join():
    coordinator = Coordinator(training_app(PINNED, unix_time=lambda: FAR_FUTURE), SIGNED)
    refused(coordinator, first_message(coordinator), f"expired at {FAR_FUTURE}")


def test_peers_whose_certificates_expired_get_no_shares():
    clock = [float(FAR_FUTURE - 1)]
    app = training_app(PINNED, unix_time=lambda: clock[0])
    coordinator = Coordinator(app, SIGNED).advance("share")
    clock[0] += 1
    refused(coordinator, coordinator.message("share"), f"expired at {FAR_FUTURE}")


def test_a_device_enrolled_by_another_root_does_not_join():
    app = training_app(PINNED, identity=simulated_identities(SEED + 1))
    coordinator = Coordinator(app, SIGNED)
    refused(coordinator, first_message(coordinator), "is not signed by the key")


def test_without_enough_endorsements_nothing_is_revealed():
    coordinator = Coordinator(training_app(PINNED), SIGNED).advance("reveal")
    signatures = dict(coordinator.requests[0].signatures)
    forged = dict.fromkeys(signatures, bytes(64))
    message = encode(Endorsements(forged), coordinator.bound.secagg)
    refused(
        coordinator, coordinator.message("reveal", message=message), "found 0", RoundAbortedError
    )
    refused(coordinator, coordinator.message("reveal"), "in no round")


def test_after_it_endorsed_one_set_of_survivors_a_device_endorses_no_other():
    run = replace(SIGNED, dropout=0.2)
    coordinator = Coordinator(training_app(PINNED), run, {"clients": 6})
    coordinator.contexts = [new_context(client) for client in range(6)]
    coordinator.advance("endorse")
    coordinator.ask(0, coordinator.message("endorse"))
    fewer = encode(Survivors(frozenset(range(5))), coordinator.bound.secagg)
    again = coordinator.message("endorse", message=fewer)
    refused(coordinator, again, "endorse request arrived where reveal is due")
    refused(coordinator, coordinator.message("reveal"), "in no round")


@pytest.mark.parametrize(
    ("run", "due", "label"),
    [
        (UNSIGNED, "reveal", "endorse"),
        (UNSIGNED, "reveal", "upload"),
        (SIGNED, "endorse", "reveal"),
        (SIGNED, "endorse", "upload"),
    ],
)
def test_survivors_under_another_label_are_refused_and_noted_under_none(run, due, label, tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    app = training_app(journal=lambda context: journal if context.node_id == 1000 else None)
    coordinator = Coordinator(app, run).advance(due)
    before = journal.last("1")
    assert before == Answer(1, 1, STAGES.index("upload"))
    refused(coordinator, coordinator.message(due, stage=label), f"{label} request .* {due} is due")
    assert journal.last("1") == before
    refused(coordinator, coordinator.message(due), "in no round")


# The journal


@BOTH
def test_every_stage_is_in_the_journal_before_it_is_answered(run, tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    app = training_app(journal=lambda context: journal if context.node_id == 1000 else None)
    coordinator = Coordinator(app, run)
    for stage in coordinator.stages:
        coordinator.play(stage)
        assert journal.last("1") == Answer(1, 1, STAGES.index(stage))


@pytest.mark.parametrize(
    ("run", "stage"), [(run, stage) for run in (UNSIGNED, SIGNED) for stage in stages_of(run)]
)
def test_a_device_that_is_restored_from_a_copy_answers_no_stage_twice(run, stage, tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    calls = []
    app = training_app(
        journal=lambda context: journal if context.node_id == 1000 else None, train=noting(calls)
    )
    coordinator = Coordinator(app, run).advance(stage)
    copy = deepcopy(coordinator.contexts[0])
    coordinator.ask(0, coordinator.message(stage))
    trained = len(calls)
    coordinator.contexts[0] = copy
    refused(coordinator, coordinator.message(stage), "answers later ones only")
    assert len(calls) == trained


def test_without_a_journal_a_copy_would_answer_again():
    """What the journal is for."""
    coordinator = Coordinator(training_app(), UNSIGNED).advance("reveal")
    copy = deepcopy(coordinator.contexts[0])
    one = payload(coordinator.ask(0, coordinator.message("reveal")))
    coordinator.contexts[0] = copy
    assert payload(coordinator.ask(0, coordinator.message("reveal"))) == one


def test_a_refused_plan_is_not_in_the_journal(tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    coordinator = Coordinator(training_app(PINNED, journal=lambda context: journal), UNSIGNED)
    refused(coordinator, first_message(coordinator), "policy demands")
    assert journal.last("1") is None


def test_a_later_attempt_and_a_later_round_are_answered(tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    app = training_app(journal=lambda context: journal)
    contexts = [new_context(client) for client in range(CLIENTS)]
    for number, attempt in ((1, 1), (1, 2), (2, 1)):
        changes = {"round_number": number, "attempt": attempt}
        coordinator = Coordinator(app, SIGNED, changes, contexts)
        coordinator.ask(0, first_message(coordinator))
    contexts[0] = new_context(0)
    again = Coordinator(app, SIGNED, {"attempt": 3}, contexts)
    refused(again, first_message(again), "answers later ones only")


def test_a_damaged_journal_answers_nothing(tmp_path):
    (tmp_path / "answers").write_text("answers")
    coordinator = Coordinator(training_app(journal=lambda c: AnsweredJournal(tmp_path / "answers")))
    refused(coordinator, first_message(coordinator), "damaged", ConfigurationError)


def test_in_the_clear_the_upload_is_claimed_too(tmp_path):
    journal = AnsweredJournal(tmp_path / "answers")
    run = RunPlan(secagg=NoSecAgg(), clip=Clip(1.0))
    app = training_app(DevicePolicy(require_masks=False), journal=lambda context: journal)
    coordinator = Coordinator(app, run)
    coordinator.ask(0, first_message(coordinator))
    assert journal.last("1") == Answer(1, 1, STAGES.index("upload"))
    coordinator.contexts[0] = new_context(0)
    refused(coordinator, first_message(coordinator), "answers later ones only")


# The configuration of a node


def test_a_node_finds_its_identity_and_its_journal_by_its_configuration(tmp_path):
    issued, key = certificate()
    config = {**written(tmp_path, issued, key), "journal": str(tmp_path / "answers")}
    app = training_app(PINNED, identity=None)
    coordinator = Coordinator(app, SIGNED, {}, [new_context(0, **config)], keys_with(issued))
    assert issued.to_bytes() in payload(coordinator.ask(0, first_message(coordinator)))
    assert AnsweredJournal(tmp_path / "answers").last("1") == Answer(1, 1)
    coordinator.contexts[0] = new_context(0, **config)
    refused(coordinator, first_message(coordinator), "answers later ones only")


def test_a_whole_round_is_played_with_identities_from_files(tmp_path):
    contexts = []
    devices = sorted(
        (certificate(f"device-{name}", bytes([name])) for name in range(CLIENTS)),
        key=lambda device: device[0].key,
    )
    for client, device in enumerate(devices):
        folder = tmp_path / str(client)
        folder.mkdir()
        files = written(folder, *device)
        contexts.append(new_context(client, **files, journal=str(folder / "answers")))
    keys = tuple(device[0].key for device in devices)
    app = training_app(PINNED, identity=None)
    mean = Coordinator(app, SIGNED, {}, contexts, keys).finish()
    plain = Coordinator(training_app(), UNSIGNED).finish()
    assert mean.delta.tobytes() == plain.delta.tobytes()
    last = AnsweredJournal(tmp_path / "2" / "answers").last("1")
    assert last == Answer(1, 1, STAGES.index("reveal"))


def test_a_node_that_names_no_files_has_no_identity_and_no_journal():
    coordinator = Coordinator(training_app(PINNED, identity=None), SIGNED)
    refused(coordinator, first_message(coordinator), "not enrolled")
    assert journal_of(new_context(0)) is None


@pytest.mark.parametrize("kept", ["identity", "identity-key"])
def test_half_an_identity_is_a_mistake_of_the_configuration(kept, tmp_path):
    config = {kept: written(tmp_path, *certificate())[kept]}
    app = training_app(PINNED, identity=None)
    coordinator = Coordinator(app, SIGNED, {}, [new_context(0, **config)])
    message = "both identity and identity-key"
    refused(coordinator, first_message(coordinator), message, ConfigurationError)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700 | 0o004])
def test_a_key_that_others_may_read_is_refused(mode, tmp_path):
    paths = written(tmp_path, *certificate())
    (tmp_path / "identity.key").chmod(mode)
    coordinator = Coordinator(
        training_app(PINNED, identity=None), SIGNED, {}, [new_context(0, **paths)]
    )
    refused(coordinator, first_message(coordinator), "chmod 600", ConfigurationError)


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("identity", None, "No such file"),
        ("identity.key", None, "No such file"),
        ("identity", b"no certificate", "holds no certificate"),
        ("identity", b"", "holds no certificate"),
        ("identity.key", b"no key", "key"),
    ],
)
def test_a_file_that_is_missing_or_something_else_is_a_mistake_of_the_configuration(
    name, data, named, tmp_path
):
    written(tmp_path, *certificate())
    path = tmp_path / name
    path.unlink()
    if data is not None:
        path.write_bytes(data)
        path.chmod(0o600)
    with pytest.raises(ConfigurationError, match=named) as caught:
        load_identity(tmp_path / "identity", tmp_path / "identity.key")
    assert "\n" not in str(caught.value)


def test_a_key_that_belongs_to_another_certificate_is_refused(tmp_path):
    written(tmp_path, certificate()[0], certificate(seed=b"other")[1])
    with pytest.raises(ConfigurationError, match="must belong to the certificate's key"):
        load_identity(tmp_path / "identity", tmp_path / "identity.key")


def test_simulated_devices_have_identities_of_their_own_that_follow_from_the_seed():
    one, two = (simulated_identities(SEED)(new_context(client)) for client in (0, 1))
    assert one.certificate.key != two.certificate.key
    assert simulated_identities(SEED)(new_context(0)).certificate == one.certificate
    other = simulated_identities(SEED + 1)(new_context(0)).certificate
    assert other.key != one.certificate.key
    one.certificate.check(bytes.fromhex(AUTHORITY), now=0)
    with pytest.raises(PeerProtocolError, match="is not signed"):
        other.check(bytes.fromhex(AUTHORITY), now=0)


def test_the_coordinator_sees_neither_paths_nor_secrets(tmp_path):
    issued, key = certificate()
    config = written(tmp_path, issued, key)
    coordinator = Coordinator(
        training_app(PINNED, identity=None),
        SIGNED,
        {},
        [new_context(0, **config)],
        keys_with(issued),
    )
    reply = coordinator.ask(0, first_message(coordinator))
    assert list(reply.content) == [RECORD]
    assert str(tmp_path).encode() not in payload(reply)
