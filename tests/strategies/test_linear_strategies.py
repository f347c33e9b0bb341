import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi

from fedcore.codec import Clip, NoRotation, Quantize
from fedcore.engine import to_arrays, to_record
from fedcore.pipeline import RunPlan, Uniform
from tests.strategies.federation import (
    ROOMY,
    assert_close,
    client_app,
    examples_of,
    initial,
    loss_of,
    plain_app,
    play,
    weighted_mean,
)

ONLY_TRAIN = {"fraction_evaluate": 0.0}
LINEAR = [
    lambda: FedAvg(**ONLY_TRAIN),
    lambda: FedAvgM(**ONLY_TRAIN, server_learning_rate=0.7, server_momentum=0.9),
    lambda: FedProx(**ONLY_TRAIN, proximal_mu=0.5),
    lambda: FedAdam(**ONLY_TRAIN, eta=0.05, tau=0.1),
    lambda: FedYogi(**ONLY_TRAIN, eta=0.05, tau=0.1),
    lambda: FedAdagrad(**ONLY_TRAIN, eta=0.05, tau=0.1),
]


@pytest.mark.parametrize("strategy", LINEAR, ids=lambda make: type(make()).__name__)
def test_an_unmodified_strategy_gives_the_same_model_as_on_the_plain_grid(strategy):
    secure = play(strategy=strategy(), rounds=3)
    plain = play(plain_app(), strategy=strategy(), rounds=3, secure=False)
    assert_close(secure.arrays, plain.arrays, atol=2e-4)
    start = to_arrays(initial())
    assert any(np.abs(plain.arrays[name] - start[name]).max() > 0.05 for name in start)


def test_the_mean_is_weighted_by_examples():
    assert_close(play().arrays, weighted_mean(range(10)), atol=1e-5)


def test_metrics_and_lists_of_metrics_are_those_of_the_plain_grid():
    secure = play(rounds=2).result.train_metrics_clientapp
    plain = play(plain_app(), rounds=2, secure=False).result.train_metrics_clientapp
    assert secure.keys() == plain.keys() == {1, 2}
    assert set(secure[1]) == set(plain[1]) == {"loss", "per-class"}
    assert secure[2]["loss"] == pytest.approx(plain[2]["loss"], abs=2**-16)
    assert secure[2]["per-class"] == pytest.approx(plain[2]["per-class"], abs=2**-16)
    weights = [examples_of(client) for client in range(10)]
    losses = [loss_of(client) for client in range(10)]
    assert secure[1]["loss"] == pytest.approx(np.average(losses, weights=weights), abs=2**-16)


def test_a_uniform_plan_weighs_all_clients_alike():
    played = play(plan=RunPlan(weighting=Uniform()))
    losses = [loss_of(client) for client in range(10)]
    assert played.reports[0].metrics["loss"] == pytest.approx(np.mean(losses), abs=2**-16)


def test_the_metric_that_weighs_may_have_another_name():
    def train(message, client):
        content = RecordDict({"arrays": message.content["arrays"]})
        content["metrics"] = MetricRecord({"samples": 10 * client + 1, "client": client})
        return content

    app = client_app(train=train)
    strategy = FedAvg(**ONLY_TRAIN, weighted_by_key="samples")
    played = play(app, strategy=strategy, clients=3, weight_key="samples")
    mean = (0 * 1 + 1 * 11 + 2 * 21) / 33
    assert played.result.train_metrics_clientapp[1]["client"] == pytest.approx(mean, abs=1e-4)


def test_counters_of_normalisation_layers_and_scalars_come_through():
    start = to_record(
        {
            "layer.weight": np.zeros((2, 2), np.float32),
            "norm.num_batches_tracked": np.array(5, np.int64),
            "temperature": np.array(1.5, np.float64),
        }
    )

    def train(message, client):
        (record,) = message.content.array_records.values()
        changed = {
            "layer.weight": record["layer.weight"].numpy() + client,
            "norm.num_batches_tracked": record["norm.num_batches_tracked"].numpy() + 10,
            "temperature": record["temperature"].numpy() * 2,
        }
        metrics = MetricRecord({"num-examples": 100})
        return RecordDict({"arrays": to_record(changed), "metrics": metrics})

    played = play(client_app(train=train), clients=3, model=start)
    assert list(played.arrays) == list(start)
    assert played.arrays["norm.num_batches_tracked"] == 15
    assert played.arrays["temperature"] == pytest.approx(3.0, abs=1e-4)
    np.testing.assert_allclose(played.arrays["layer.weight"], np.ones((2, 2)), atol=1e-4)


@pytest.mark.parametrize(
    ("plan", "atol"),
    [
        (RunPlan(clip=Clip(8), quantize=Quantize(16)), 2e-2),
        (RunPlan(clip=Clip(8), quantize=Quantize(24), rotate=NoRotation()), 1e-4),
        (ROOMY, 1e-5),
    ],
)
def test_every_quantizer_gives_the_mean_within_its_step(plan, atol):
    assert_close(play(plan=plan).arrays, weighted_mean(range(10)), atol=atol)


def test_names_of_records_and_the_order_of_arrays_stay_the_strategys():
    class Renamed(FedAvg):
        def __init__(self):
            super().__init__(**ONLY_TRAIN, arrayrecord_key="weights", configrecord_key="settings")

    played = play(strategy=Renamed(), rounds=2)
    assert list(played.arrays) == ["w", "b"]
    assert played.arrays["w"].dtype == np.float32


def test_rounds_build_on_each_other():
    once = weighted_mean(range(10))
    start = to_record({name: array.astype(np.float32) for name, array in once.items()})
    assert_close(play(rounds=2).arrays, weighted_mean(range(10), start), atol=2e-5)
