"""Federations of enrolled devices on a grid: the same sum, and nobody but the enrolled."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from clients import DevicePolicy
from clients.simulated import FAR_FUTURE, simulated_root
from fedcore.crypto import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.engine import Fault, FaultyGrid
from fedcore.errors import ConfigurationError
from fedcore.pipeline import RECORD, Bonawitz, RunPlan
from fedcore.pipeline.envelope import IDENTIFY, STAGES
from fedcore.secagg import Certificate, Identity
from strategies.wire_bytes import content_bytes
from tests.strategies.federation import (
    AUTHORITY,
    ENROLLED,
    ROOMY,
    SIGNED,
    assert_close,
    client_app,
    losing,
    node_of,
    play,
    stage_of,
    tampering,
    weighted_mean,
)

PINNED = DevicePolicy(authority=AUTHORITY)


def identities(**others):
    """The federation's identities, with those of some clients replaced."""

    def source(context):
        client = f"client{context.node_config['partition-id']}"
        return others[client] if client in others else ENROLLED(context)

    return source


def identity(name="device-4", expires_at=FAR_FUTURE, root=1):
    key = SigningKey.generate(ReplayedEntropy(name.encode()))
    certificate = Certificate.issue(
        simulated_root(root), name=name, key=key.public.raw, expires_at=expires_at
    )
    return Identity(certificate, key)


def ranked(context):
    """Identities of ten clients whose keys are in the order of the partitions."""
    devices = [identity(f"device-{number}") for number in range(10)]
    devices.sort(key=lambda device: device.certificate.key)
    return devices[context.node_config["partition-id"]]


def assert_lost_alone(played, client, stage):
    (report,) = played.reports
    survivors = [other for other in range(10) if other != client]
    assert (report.survivors, report.attempts, report.lost) == (9, 1, {stage: 1})
    assert_close(played.arrays, weighted_mean(survivors), atol=1e-5)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_signed_run_gives_the_arrays_of_an_unsigned_one_bit_for_bit(rounds):
    signed = play(client_app(seed=1, policy=PINNED), SIGNED, rounds=rounds)
    unsigned = play(client_app(seed=1), ROOMY, rounds=rounds)
    for name, array in signed.arrays.items():
        assert array.tobytes() == unsigned.arrays[name].tobytes(), name
    assert [report.metrics for report in signed.reports] == [
        report.metrics for report in unsigned.reports
    ]
    assert signed.grid.ledger == unsigned.grid.ledger


def test_a_signed_round_has_two_more_stages_and_takes_more_bytes():
    signed, unsigned = (play(client_app(seed=1), plan) for plan in (SIGNED, ROOMY))
    assert [*dict.fromkeys(map(stage_of, signed.wire.sent))] == [IDENTIFY, *STAGES]
    assert [*dict.fromkeys(map(stage_of, unsigned.wire.sent))] == [
        stage for stage in STAGES if stage != "endorse"
    ]
    one, other = signed.reports[0].traffic, unsigned.reports[0].traffic
    assert one.up_payload == other.up_payload
    assert one.up_total > other.up_total + 10 * (32 + 64 + 64)
    assert one.uploads == other.uploads == 10


@pytest.mark.parametrize("pinned", [AUTHORITY, "ab" * 32])
def test_devices_that_pin_an_authority_take_part_under_no_other(pinned):
    run = ROOMY if pinned == AUTHORITY else SIGNED
    played = play(client_app(seed=1, policy=DevicePolicy(authority=pinned)), run)
    assert played.reports[0].lost == {"advertise": 10}
    assert played.reports[0].survivors == 0
    assert dict(played.result.arrays) == {}
    assert not any(message.content.array_records for message in played.wire.sent)


@pytest.mark.parametrize(
    "other",
    [None, identity(expires_at=1), identity(root=2)],
    ids=["not enrolled", "expired", "enrolled by another root"],
)
def test_a_device_that_cannot_prove_who_it_is_is_lost_alone(other):
    played = play(client_app(seed=1, identity=identities(client4=other)), SIGNED)
    assert_lost_alone(played, 4, "identify")


def test_the_coordinator_looks_at_the_date_too():
    """Else a device with a slow clock would make all of its peers leave the round."""
    slow = identities(client4=identity(expires_at=10**9))
    honest = client_app(seed=1)
    played = play(client_app(seed=1, identity=slow, unix_time=lambda: 0.0), SIGNED)
    assert_lost_alone(played, 4, "identify")
    assert play(honest, SIGNED).reports[0].lost == {}


def test_a_node_is_asked_who_it_is_in_its_first_round_only():
    played = play(client_app(seed=1), SIGNED, rounds=3)
    asked = [m.metadata.dst_node_id for m in played.wire.sent if stage_of(m) == IDENTIFY]
    assert sorted(asked) == [node_of(client) for client in range(10)]
    assert [report.survivors for report in played.reports] == [10, 10, 10]


def test_what_asking_takes_is_counted():
    played = play(client_app(seed=1), SIGNED, rounds=2)
    first, second = (report.traffic for report in played.reports)
    credential = 1 + len("device-0") + 32 + 8 + 64 + 64
    record = len("message") + credential
    assert first.up_total - second.up_total == 10 * record
    asked = [m.content for m in played.wire.sent if stage_of(m) == IDENTIFY]
    assert first.down_total - second.down_total == sum(map(content_bytes, asked)) > 0


def test_nobody_is_asked_who_it_is_if_nobody_signs():
    played = play(client_app(seed=1, identity=lambda context: None), ROOMY)
    assert IDENTIFY not in map(stage_of, played.wire.sent)
    assert played.reports[0].survivors == 10


@pytest.mark.parametrize("fault", [Fault.DROPPED, Fault.LOST_REPLY])
def test_a_node_that_did_not_say_who_it_is_is_asked_again_in_the_next_round(fault):
    script = losing([4], IDENTIFY, fault)
    first = lambda m: script(m) if m.metadata.group_id == "1" else None  # noqa: E731
    played = play(client_app(seed=1), SIGNED, rounds=2, wrap=lambda grid: FaultyGrid(grid, first))
    assert [report.lost for report in played.reports] == [{IDENTIFY: 1}, {}]
    assert [report.survivors for report in played.reports] == [9, 10]


def test_a_device_that_was_enrolled_anew_is_back_after_one_round():
    renewed = identity("renewed")

    def source(context):
        visits = context.state.get("visits")
        later = visits is not None and context.node_config["partition-id"] == 4
        return renewed if later else ENROLLED(context)

    def note(message, context, call_next):
        reply = call_next(message, context)
        if stage_of(message) == "reveal":
            context.state["visits"] = ConfigRecord({"seen": 1})
        return reply

    played = play(client_app(note, seed=1, identity=source), SIGNED, rounds=3)
    assert [report.lost for report in played.reports] == [{}, {"advertise": 1}, {}]


@pytest.mark.parametrize("missing", [3, 4])
def test_a_round_is_given_up_if_too_few_say_who_they_are(missing):
    script = losing(range(missing), IDENTIFY)
    played = play(client_app(seed=1), SIGNED, wrap=lambda grid: FaultyGrid(grid, script))
    (report,) = played.reports
    assert report.lost == {IDENTIFY: missing}
    assert report.survivors == (7 if missing == 3 else 0)
    if missing == 4:
        assert report.attempts == 2
        assert "aborted at identifying: needed 7 clients, found 6" in report.aborted[0]
        assert not any(message.content.array_records for message in played.wire.sent)


def test_a_cohort_that_shrank_below_what_its_parameters_withstand_is_given_up():
    plan = RunPlan(dropout=0.34, secagg=Bonawitz(corrupt=0.0, authority=AUTHORITY))
    script = losing([0], IDENTIFY)
    played = play(client_app(seed=1), plan, clients=4, wrap=lambda grid: FaultyGrid(grid, script))
    assert "aborted at identifying: needed 4 clients, found 3" in played.reports[0].aborted[0]


def test_a_certificate_that_somebody_else_answers_with_costs_its_owner_nothing():
    """Neighbours see certificates; the signature over the node's number is not theirs to give."""
    kept = {}

    def keep(content):
        kept["answer"] = content[RECORD]["message"]
        return content

    def steal(content):
        content[RECORD]["message"] = kept["answer"]
        return content

    app = client_app(tampering([1], IDENTIFY, keep), tampering([4], IDENTIFY, steal), seed=1)
    assert_lost_alone(play(app, SIGNED), 4, IDENTIFY)


@pytest.mark.parametrize("garbage", [b"", bytes(200), 7])
def test_an_answer_that_is_none_is_lost_alone(garbage):
    def spoil(content):
        content[RECORD]["message"] = garbage
        return content

    assert_lost_alone(
        play(client_app(tampering([4], IDENTIFY, spoil), seed=1), SIGNED), 4, IDENTIFY
    )


def test_too_few_bits_for_a_sparse_graph_are_a_mistake_of_the_configuration():
    plan = RunPlan(secagg=Bonawitz(security_bits=79, authority=AUTHORITY))
    with pytest.raises(
        ConfigurationError, match=r"at least 80 for more than 128 .* got 79 for 129"
    ):
        play(client_app(seed=1), plan, clients=129)


def test_of_two_nodes_with_one_identity_the_second_is_lost_alone():
    twin = identity()
    played = play(client_app(seed=1, identity=identities(client4=twin, client7=twin)), SIGNED)
    assert_lost_alone(played, 7, "identify")


def test_an_identity_is_no_obstacle_in_an_unsigned_round():
    twin = identity()
    app = client_app(seed=1, identity=identities(client4=None, client6=twin, client7=twin))
    assert play(app, ROOMY).reports[0].survivors == 10


def test_somebody_elses_credential_is_lost_alone():
    kept = {}

    def lend(content):
        kept["keys"] = content[RECORD]["message"]
        return content

    def borrow(content):
        content[RECORD]["message"] = kept["keys"]
        return content

    app = client_app(tampering([1], "advertise", lend), tampering([4], "advertise", borrow), seed=1)
    assert_lost_alone(play(app, SIGNED), 4, "advertise")


def test_a_worthless_endorsement_costs_nothing_while_enough_are_good():
    def forge(content):
        data = content[RECORD]["message"]
        content[RECORD]["message"] = data[:-64] + bytes(64)
        return content

    app = client_app(tampering([4], "endorse", forge), seed=1, policy=PINNED)
    played = play(app, SIGNED)
    assert played.reports[0].lost == {}
    assert_close(played.arrays, weighted_mean(range(10)), atol=1e-5)


def test_with_too_few_good_endorsements_nothing_is_revealed():
    def forge(content):
        data = content[RECORD]["message"]
        content[RECORD]["message"] = data[:-64] + bytes(64)
        return content

    app = client_app(tampering(range(6), "endorse", forge), seed=1, policy=PINNED)
    played = play(app, SIGNED)
    (report,) = played.reports
    assert (report.survivors, report.attempts, report.lost) == (0, 2, {"reveal": 10})
    assert dict(played.result.arrays) == {}
    assert played.grid.ledger.releases == ()


def test_a_coordinator_that_tells_two_halves_different_survivors_learns_nothing():
    """Each half endorses what it was told; neither finds enough that were told the same."""
    plan = RunPlan(dropout=0.2, secagg=Bonawitz(corrupt=0.0, authority=AUTHORITY))

    def lie(message, context, call_next):
        # Cuts the last survivor out of the request: u32 count, then u32 each, increasing.
        record = message.content.config_records.get(RECORD)
        if stage_of(message) == "endorse" and context.node_config["partition-id"] < 5:
            data = record["message"]
            count = int.from_bytes(data[-44:-40], "little")
            assert count == 10
            record["message"] = data[:-44] + (9).to_bytes(4, "little") + data[-40:-4]
        return call_next(message, context)

    played = play(client_app(lie, seed=1, policy=PINNED, identity=ranked), plan)
    (report,) = played.reports
    assert report.survivors == 0
    assert report.lost["reveal"] == 10
    assert played.grid.ledger.releases == ()


def test_a_new_identity_in_every_run_gives_the_same_arrays():
    """What a device signs with never touches what it uploads."""
    fresh = client_app(seed=1, identity=identities(client3=identity("renewed")))
    one, other = play(fresh, SIGNED), play(client_app(seed=1), SIGNED)
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


def test_the_coordinator_tells_the_time_by_the_clock_that_it_was_given():
    played = play(client_app(seed=1), SIGNED, unix_time=lambda: float(FAR_FUTURE))
    (report,) = played.reports
    assert (report.survivors, report.lost) == (0, {"identify": 10})
    assert play(client_app(seed=1), SIGNED, unix_time=lambda: 0.0).reports[0].survivors == 10
