"""Federations of enrolled devices on a grid: the same sum, and nobody but the enrolled."""

import numpy as np
import pytest

from clients import DevicePolicy
from clients.simulated import FAR_FUTURE, simulated_root
from fedcore.crypto import ReplayedEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.pipeline import RECORD, Bonawitz, RunPlan
from fedcore.pipeline.envelope import STAGES
from fedcore.secagg import Certificate, Identity
from tests.strategies.federation import (
    AUTHORITY,
    ENROLLED,
    ROOMY,
    SIGNED,
    assert_close,
    client_app,
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


def test_a_signed_round_has_one_more_stage_and_takes_more_bytes():
    signed, unsigned = (play(client_app(seed=1), plan) for plan in (SIGNED, ROOMY))
    assert [*dict.fromkeys(map(stage_of, signed.wire.sent))] == list(STAGES)
    assert [*dict.fromkeys(map(stage_of, unsigned.wire.sent))] == [
        stage for stage in STAGES if stage != "endorse"
    ]
    one, other = signed.reports[0].traffic, unsigned.reports[0].traffic
    assert one.up_payload == other.up_payload
    assert one.up_total > other.up_total + 10 * (32 + 64 + 64)
    assert one.uploads == other.uploads == 10


@pytest.mark.parametrize(
    "secagg", [Bonawitz(corrupt=0.0), Bonawitz(corrupt=0.0, authority="ab" * 32)]
)
def test_devices_that_pin_an_authority_take_part_under_no_other(secagg):
    played = play(client_app(seed=1, policy=PINNED), RunPlan(dropout=0.3, secagg=secagg))
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
    assert_lost_alone(played, 4, "advertise")


def test_the_coordinator_looks_at_the_date_too():
    """Else a device with a slow clock would make all of its peers leave the round."""
    slow = identities(client4=identity(expires_at=10**9))
    honest = client_app(seed=1)
    played = play(client_app(seed=1, identity=slow, unix_time=lambda: 0.0), SIGNED)
    assert_lost_alone(played, 4, "advertise")
    assert play(honest, SIGNED).reports[0].lost == {}


def test_of_two_nodes_with_one_identity_the_second_is_lost_alone():
    twin = identity()
    played = play(client_app(seed=1, identity=identities(client4=twin, client7=twin)), SIGNED)
    assert_lost_alone(played, 7, "advertise")


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

    played = play(client_app(lie, seed=1, policy=PINNED), plan)
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
    assert (report.survivors, report.lost) == (0, {"advertise": 10})
    assert play(client_app(seed=1), SIGNED, unix_time=lambda: 0.0).reports[0].survivors == 10
