"""Updates that each client compresses in its own way, through the real grid."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.serverapp.strategy import FedProx

from fedcore.codec import Clip, Delta, PublicTopK, Qsgd, RandomK, Sketch, SparseTernary, TopK
from fedcore.errors import ConfigurationError
from fedcore.pipeline import (
    RECORD,
    VECTOR,
    Bonawitz,
    Modular,
    NoSecAgg,
    RoundPlan,
    RunPlan,
    SeedHelper,
    bind_round,
)  # fmt: skip
from fedcore.ring import packed_size
from tests.strategies.federation import (
    OPEN,
    ROOMY,
    assert_close,
    client_app,
    play,
    weighted_mean,
)

CLEAR = RunPlan(secagg=NoSecAgg(), dropout=0.3)
COMPRESSORS = [TopK(1.0, 16), TopK(0.2, 8), SparseTernary(0.2), Qsgd(4, 16), Qsgd(1000, 0)]
each = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


def compressed(compressor, **changes):
    return replace(CLEAR, quantize=compressor, **changes)


def vectors(played):
    name = f"{RECORD}.{VECTOR}"
    return [m.content[name][VECTOR].data for m in played.wire.received if name in m.content]


def test_a_fine_compressor_gives_the_weighted_mean():
    played = play(client_app(seed=1, policy=OPEN), compressed(TopK(1.0, 16)))
    assert_close(played.arrays, weighted_mean(range(10)), atol=1e-3)
    assert played.reports[0].metrics["loss"] > 2


@each
def test_with_error_feedback_the_model_gets_where_the_clients_pull_it(compressor):
    plan = compressed(compressor, error_feedback=True)
    played = play(client_app(seed=1, policy=OPEN), plan, rounds=40)
    exact = play(client_app(seed=1, policy=OPEN), CLEAR, rounds=40)
    gap = max(np.abs(a - exact.arrays[name]).max() for name, a in played.arrays.items())
    assert gap < 0.5


@each
def test_the_bytes_that_are_counted_are_those_that_travelled(compressor):
    played = play(client_app(seed=1, policy=OPEN), compressed(compressor))
    sent = vectors(played)
    assert len(sent) == 10
    head = packed_size(_tally_dim(), 32)
    assert played.reports[0].traffic.up_payload == sum(len(data) - head for data in sent)
    assert played.reports[0].traffic.uploads == 10


def _tally_dim():
    plan = RoundPlan(
        run=compressed(TopK()), run_id="", round_number=1, attempt=1, clients=10, dim=43,
        model_digest="",
    )  # fmt: skip
    return bind_round(plan).dim


@each
def test_the_mean_does_not_depend_on_the_order_of_arrival(compressor):
    class Backwards:
        def __init__(self, grid):
            self._grid = grid

        def __getattr__(self, name):
            return getattr(self._grid, name)

        def pull_messages(self, message_ids):
            return reversed(list(self._grid.pull_messages(message_ids)))

    one = play(client_app(seed=1, policy=OPEN), compressed(compressor), rounds=2)
    other = play(client_app(seed=1, policy=OPEN), compressed(compressor), rounds=2, wrap=Backwards)
    for name, array in one.arrays.items():
        assert array.tobytes() == other.arrays[name].tobytes()


@pytest.mark.parametrize("damage", [b"", b"\0", b"\xff" * 400])
def test_a_damaged_update_loses_one_client_only(damage):
    def harm(message, context, call_next):
        reply = call_next(message, context)
        name = f"{RECORD}.{VECTOR}"
        if context.node_config["partition-id"] == 3 and name in reply.content:
            array = reply.content[name][VECTOR]
            array.data = array.data[: packed_size(_tally_dim(), 32)] + damage
        return reply

    played = play(client_app(harm, seed=1, policy=OPEN), compressed(TopK(0.2)))
    assert played.reports[0].survivors == 9


def test_too_few_updates_abort_the_round():
    def silent(message, context, call_next):
        if context.node_config["partition-id"] < 5:
            raise RuntimeError
        return call_next(message, context)

    played = play(client_app(silent, seed=1, policy=OPEN), compressed(TopK(0.2)))
    assert played.reports[0].survivors == 0


@pytest.mark.parametrize("secagg", [Bonawitz(), SeedHelper()])
@pytest.mark.parametrize("compressor", COMPRESSORS[:4], ids=repr)
def test_masks_refuse_a_compressor_that_chooses_by_itself(secagg, compressor):
    with pytest.raises(ConfigurationError, match="masks cancel position by position"):
        RunPlan(secagg=secagg, quantize=compressor)


def test_two_choices_of_coordinates_are_refused():
    with pytest.raises(ConfigurationError, match="sparsify=dense"):
        RunPlan(secagg=NoSecAgg(), quantize=TopK(), sparsify=RandomK())


@pytest.mark.parametrize(
    "sparsify",
    [
        Sketch(0.3, unbiased=True),
        PublicTopK(0.3, 0.5),
        PublicTopK(0.3, 0.5, dense_below=9),
        RandomK(0.3, unbiased=True, dense_below=9),
    ],
)
def test_supports_under_masks_give_what_they_give_in_the_clear(sparsify):
    plan = replace(ROOMY, sparsify=sparsify, quantize=Modular(16), clip=Clip(10.0))
    masked = play(client_app(seed=1), plan, rounds=3)
    clear = play(client_app(seed=1, policy=OPEN), replace(plan, secagg=NoSecAgg()), rounds=3)
    for name, array in masked.arrays.items():
        assert array.tobytes() == clear.arrays[name].tobytes()


@pytest.mark.parametrize("sparsify", [Sketch(0.3), PublicTopK(0.3, 0.5), RandomK(0.3)])
def test_supports_with_error_feedback_get_where_the_clients_pull(sparsify):
    plan = replace(
        ROOMY, sparsify=sparsify, error_feedback=True, quantize=Modular(16), clip=Clip(100.0)
    )
    gentle = {"strategy": FedProx(proximal_mu=4.0, fraction_evaluate=0.0), "rounds": 60}
    played = play(client_app(seed=1), plan, **gentle)
    exact = play(client_app(seed=1), ROOMY, **gentle)
    gap = max(np.abs(a - exact.arrays[name]).max() for name, a in played.arrays.items())
    assert gap < 0.5


def test_both_directions_together():
    plan = compressed(SparseTernary(0.3), error_feedback=True, downlink=Delta(4))
    played = play(client_app(seed=1, policy=OPEN), plan, rounds=40)
    exact = play(client_app(seed=1, policy=OPEN), CLEAR, rounds=40)
    gap = max(np.abs(a - exact.arrays[name]).max() for name, a in played.arrays.items())
    assert gap < 0.6
