"""What the coordinator, and whoever listens, can read of a round.

Every message that crosses the grid is recorded and searched. The searches are shown to
find what they look for in a round without masks.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from fedcore.codec import Clip
from fedcore.engine import to_record
from fedcore.pipeline import (
    RECORD,
    VECTOR,
    Bonawitz,
    Modular,
    NoSecAgg,
    RunPlan,
    Uniform,
)
from fedcore.ring import Ring, unpack
from tests.fedcore.pipeline.rounds import private_plan
from tests.strategies.federation import (
    OPEN,
    client_app,
    examples_of,
    initial,
    loss_of,
    play,
    pull,
    stage_of,
)

CLIENTS = 4
BINS = 256
# 255 degrees of freedom: uniform bytes exceed this once in 10^10 rounds.
UNIFORM_UP_TO = 255 + 7 * (2 * 255) ** 0.5
CLEAR = NoSecAgg()


def values_of(message: Message) -> Iterator[object]:
    """Everything a message holds: names, numbers, texts, bytes."""
    for name, record in message.content.items():
        yield name
        for key, value in record.items():
            yield key
            if hasattr(value, "data") and hasattr(value, "stype"):
                yield value.data
            else:
                yield from value if isinstance(value, list) else [value]


def numbers_and_bytes(played, *, received_only=True):
    messages = played.wire.received if received_only else played.wire.crossed
    values = [value for message in messages for value in values_of(message)]
    numbers = {value for value in values if isinstance(value, int | float)}
    return numbers, [value for value in values if isinstance(value, bytes)]


def uploads_of(played) -> list[bytes]:
    return [
        reply.content[f"{RECORD}.{VECTOR}"][VECTOR].data
        for reply in played.wire.received
        if f"{RECORD}.{VECTOR}" in reply.content
    ]


def chi_square(data: bytes) -> float:
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=BINS)
    expected = len(data) / BINS
    return float(((counts - expected) ** 2 / expected).sum())


def encodings(value: float) -> list[bytes]:
    """How a secret number could stand in bytes."""
    kinds = ("<f4", "<f8", ">f4", ">f8")
    return [np.array(value, kind).tobytes() for kind in kinds] + [str(value).encode()]


@pytest.fixture(scope="module")
def masked():
    return play(client_app(seed=5), clients=CLIENTS)


@pytest.fixture(scope="module")
def clear():
    return play(client_app(seed=5, policy=OPEN), RunPlan(secagg=CLEAR), clients=CLIENTS)


def test_no_client_sends_a_number_outside_of_its_masked_vector(masked):
    numbers, _ = numbers_and_bytes(masked)
    assert numbers == set()


def test_weights_and_metrics_are_nowhere_in_the_bytes(masked):
    _, blobs = numbers_and_bytes(masked, received_only=False)
    for client in range(CLIENTS):
        secrets = [loss_of(client), float(examples_of(client))]
        for encoding in (text for secret in secrets for text in encodings(secret)):
            assert not any(encoding in blob for blob in blobs)


def test_metric_names_are_the_only_thing_a_client_says_of_its_training(masked):
    uploads = [reply for reply in masked.wire.received if f"{RECORD}.{VECTOR}" in reply.content]
    for reply in uploads:
        assert dict(reply.content[RECORD]) == {"metrics": ["loss", "per-class[0]", "per-class[1]"]}
    others = [reply for reply in masked.wire.received if reply not in uploads]
    assert all(list(reply.content[RECORD]) == ["message"] for reply in others)


def test_no_part_of_an_encoded_update_crosses_the_wire_unmasked(masked, clear):
    """The same entropy gives the same encoded updates; masks hide every stretch of them."""
    _, blobs = numbers_and_bytes(masked, received_only=False)
    plain = uploads_of(clear)
    assert len(plain) == len(uploads_of(masked)) == CLIENTS
    stretches = [vector[at : at + 12] for vector in plain for at in range(0, 160, 4)]
    assert not any(stretch in blob for stretch in stretches for blob in blobs)
    _, in_the_clear = numbers_and_bytes(clear)
    assert all(any(stretch in blob for blob in in_the_clear) for stretch in stretches)
    np.testing.assert_array_equal(clear.arrays["w"], masked.arrays["w"])


@pytest.mark.parametrize("shift", [0.0, 0.25])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_masked_uploads_of_constant_updates_look_uniform(shift, bits):
    model = to_record({"w": np.zeros(20_000, np.float32)})
    run = RunPlan(clip=Clip(100.0), quantize=Modular(bits), weighting=Uniform(), metric_slots=0)

    def train(message, client):
        (record,) = message.content.array_records.values()
        trained = {"w": record["w"].numpy() + np.float32(shift)}
        metrics = MetricRecord({"num-examples": 1})
        return RecordDict({"arrays": to_record(trained), "metrics": metrics})

    def upload(secagg):
        app = client_app(train=train, seed=9, policy=OPEN)
        played = play(app, replace(run, secagg=secagg), clients=3, model=model)
        return [data[: 20_000 * bits // 8] for data in uploads_of(played)]

    masked, clear = upload(Bonawitz()), upload(CLEAR)
    assert all(chi_square(data) < UNIFORM_UP_TO for data in masked)
    assert all(chi_square(data) > UNIFORM_UP_TO for data in clear)


def test_two_masked_uploads_of_the_same_update_are_unrelated():
    def train(message, client):
        return pull(message, 0)

    data = uploads_of(play(client_app(train=train), clients=3))
    vectors = [unpack(each, len(each) // 4, Ring(32)).astype(np.int64) for each in data]
    differences = [np.abs(vectors[0] - vectors[1]), np.abs(vectors[1] - vectors[2])]
    assert all(np.median(difference) > 2**27 for difference in differences)


def test_one_upload_in_the_clear_is_close_to_the_next():
    """The control: without masks two equal updates differ by their rounding only."""

    def train(message, client):
        return pull(message, 0)

    app = client_app(train=train, policy=OPEN)
    data = uploads_of(play(app, RunPlan(secagg=CLEAR), clients=2))
    one, two = (unpack(each, len(each) // 4, Ring(32)).astype(np.int64) for each in data)
    assert np.median(np.abs(one - two)[:43]) <= 1


def test_masks_are_fresh_in_every_round():
    played = play(clients=3, rounds=2)
    uploads = uploads_of(played)
    assert len(uploads) == len(set(uploads)) == 6


def test_real_devices_never_draw_the_same_masks_twice():
    def advertised():
        return [
            reply.content[RECORD]["message"]
            for reply in play(client_app(), clients=3).wire.received[:3]
        ]

    assert len({*advertised(), *advertised()}) == 6


def test_under_noise_uploads_do_not_depend_on_metrics_or_example_counts():
    def trained_with(examples, loss):
        def train(message, client):
            content = pull(message, client)
            content["metrics"] = MetricRecord({"num-examples": examples, "loss": loss})
            return content

        return play(client_app(train=train, seed=2), private_plan(), clients=3)

    few, many = trained_with(1, 0.1), trained_with(1000, 9.9)
    assert [dict(reply.content[RECORD]) for reply in few.wire.received] == [
        dict(reply.content[RECORD]) for reply in many.wire.received
    ]
    assert uploads_of(few) == uploads_of(many)
    assert few.result.train_metrics_clientapp[1] == {}
    (report,) = few.reports
    assert (report.metrics, report.clipped) == ({}, None)
    assert report.epsilon < float("inf")


def test_the_model_in_the_sum_is_the_only_thing_the_coordinator_sends_that_depends_on_it(masked):
    before_upload = [m for m in masked.wire.sent if stage_of(m) in {"advertise", "share"}]
    weights = [array.numpy().tobytes() for array in initial().values()]
    for message in before_upload:
        blobs = [value for value in values_of(message) if isinstance(value, bytes)]
        assert not any(weight in blob for weight in weights for blob in blobs)


def test_replies_and_reports_print_no_secret(masked):
    text = repr(masked.reports) + repr(masked.grid.ledger) + repr(masked.grid.plan)
    assert all(f"{loss_of(client):.4f}" not in text for client in range(CLIENTS))
