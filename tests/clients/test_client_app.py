from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.client_app import app, build_client_app, replayed_entropy, system_entropy
from fedcore.crypto import SystemEntropy
from fedcore.data import Digits, Iid, load, partition
from fedcore.engine import to_arrays, to_record
from fedcore.errors import ConfigurationError
from fedcore.job import Job, NoClip, NoQuantize
from fedcore.models import Logistic, build
from fedcore.pipeline import NoSecAgg, Uniform
from fedcore.training import ExampleLevelPrivacy, LocalTraining, evaluate, get_arrays, set_arrays

JOB = Job(
    model=Logistic(),
    partition=Iid(),
    clients=4,
    clients_per_round=4,
    training=LocalTraining(epochs=2, learning_rate=0.3),
)
PLAIN = {"clip": NoClip(), "quantize": NoQuantize(), "secagg": NoSecAgg()}


def node(job=JOB, **config):
    return Context(1, 1000, config or {"partition-id": 1}, RecordDict(), {"job": job.to_json()})


def fresh_model():
    return build(Logistic(), (1, 8, 8), 10, 0)


def request(kind="train", **config):
    arrays = to_record(get_arrays(fresh_model()))
    return Message(RecordDict({"arrays": arrays, "config": ConfigRecord(config)}), 1000, kind)


def ask(message, context, seed=1):
    return build_client_app(entropy=replayed_entropy(seed))(message, context)


def test_training_improves_the_model_on_the_nodes_own_examples():
    reply = ask(request(**{"server-round": 1}), node())
    data = load(Digits())
    rows = partition(data, Iid(), 4, 0)[1]
    model = fresh_model()
    before = evaluate(model, data.x_train[rows], data.y_train[rows])
    set_arrays(model, to_arrays(reply.content["arrays"]))
    after = evaluate(model, data.x_train[rows], data.y_train[rows])
    assert after.accuracy > 0.85 > before.accuracy
    metrics = reply.content["metrics"]
    assert metrics["num-examples"] == len(rows)
    assert set(metrics) == {"train-loss", "train-accuracy", "num-examples"}


def test_evaluation_tests_on_the_nodes_own_examples():
    metrics = ask(request("evaluate"), node()).content["metrics"]
    data = load(Digits())
    rows = partition(data, Iid(), 4, 0)[1]
    expected = evaluate(fresh_model(), data.x_train[rows], data.y_train[rows])
    assert metrics["eval-loss"] == pytest.approx(expected.loss)
    assert metrics["eval-accuracy"] == expected.accuracy
    assert metrics["num-examples"] == len(rows)


def test_replies_do_not_share_memory_with_the_process_model():
    first = ask(request(), node())
    kept = {name: array.copy() for name, array in to_arrays(first.content["arrays"]).items()}
    ask(request(), node(**{"partition-id": 2}))
    for name, array in to_arrays(first.content["arrays"]).items():
        np.testing.assert_array_equal(array, kept[name])


def test_the_same_round_and_node_train_alike_and_others_differently():
    def trained(seed=1, round_number=1, partition_id=1):
        message = request(**{"server-round": round_number})
        reply = ask(message, node(**{"partition-id": partition_id}), seed)
        return to_arrays(reply.content["arrays"])["output.weight"].tobytes()

    results = [trained(), trained(seed=2), trained(round_number=2), trained(partition_id=0)]
    assert len(set(results)) == 4
    assert trained() == results[0]


def test_a_proximal_term_keeps_the_model_closer():
    start = get_arrays(fresh_model())["output.weight"]

    def distance(mu):
        reply = ask(request(**{"proximal-mu": mu}), node())
        return np.linalg.norm(to_arrays(reply.content["arrays"])["output.weight"] - start)

    assert distance(2.0) < 0.8 * distance(0.0)


@pytest.mark.parametrize(
    ("label", "config"),
    [("3", {"partition-id": 3}), ("1000", {"data-path": "x"}), ("roof", {"partition-id": "roof"})],
)
def test_a_node_tells_its_name(label, config):
    reply = ask(Message(RecordDict(), 1000, "query.profile"), node(**config))
    assert reply.content["profile"]["label"] == label


def test_a_node_may_read_its_own_file(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 1, 8, 8)).astype(np.float32), np.arange(40) % 10
    path = tmp_path / "own.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    reply = build_client_app()(request(), node(**{"data-path": str(path)}))
    assert reply.content["metrics"]["num-examples"] == 40


@pytest.mark.parametrize(
    "config", [{"partition-id": 4}, {"partition-id": -1}, {"partition-id": "a"}]
)
def test_a_node_without_data_is_refused_by_name(config):
    with pytest.raises(ConfigurationError, match=r"data-path, or partition-id in 0\.\.3"):
        ask(request(), node(**config))


def test_a_proximal_term_that_is_no_number_is_refused():
    with pytest.raises(ConfigurationError, match="proximal-mu and server-round must be numbers"):
        ask(request(**{"proximal-mu": "strong"}), node())


def test_under_example_level_privacy_no_metric_of_raw_examples_leaves_the_device():
    job = replace(JOB, weighting=Uniform(), privacy=ExampleLevelPrivacy())
    assert set(ask(request(), node(job)).content["metrics"]) == {"num-examples"}


@pytest.mark.parametrize("privacy", [JOB.privacy, ExampleLevelPrivacy()])
def test_where_examples_do_not_count_their_number_stays_on_the_device(privacy):
    # Without the codec nothing else would keep it there, and Flower would weigh by it.
    job = replace(JOB, **PLAIN, weighting=Uniform(), privacy=privacy)
    counts = {
        ask(request(), node(job, **{"partition-id": index})).content["metrics"]["num-examples"]
        for index in (0, 1, 2, 3)
    }
    assert counts == {1}
    assert len({len(rows) for rows in partition(load(Digits()), Iid(), 4, 0)}) == 2


def test_devices_use_the_operating_systems_entropy():
    assert isinstance(system_entropy(node()), SystemEntropy)
    one, two = (app(request(), node()).content["arrays"]["output.weight"].data for _ in range(2))
    assert one != two


def test_without_a_job_in_the_run_configuration_the_default_job_is_meant():
    context = Context(1, 1000, {"partition-id": 0}, RecordDict(), {"job": ""})
    with pytest.raises(ConfigurationError, match="client and server must use the same model"):
        ask(request(), context)  # the default is an Mlp, the message has a logistic model
