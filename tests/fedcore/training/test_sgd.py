"""Local training is torch's SGD, repeatable, on both of its paths."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from fedcore.data import Digits, load
from fedcore.errors import ConfigurationError
from fedcore.models import Cnn, LeNet, Logistic, Mlp, TwoNN, build
from fedcore.training import (
    Evaluation,
    LocalTraining,
    evaluate,
    get_arrays,
    one_thread,
    set_arrays,
    train,
)
from fedcore.training.dense import dense_layers

MODELS = [
    (Logistic(), (1, 8, 8)),
    (Mlp(hidden=(16,)), (1, 8, 8)),
    (TwoNN(), (5,)),
    (LeNet(), (1, 28, 28)),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    one_thread()
    yield
    torch.set_num_threads(before)


def examples(shape, count=23, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((count, *shape), dtype=np.float32), rng.integers(10, size=count)


def by_torch(model, x, y, config, rng, mu):
    """Train with torch.optim and return the losses of the last epoch, weighted by batch."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    start = [weight.detach().clone() for weight in model.parameters()]
    for _ in range(config.epochs):
        total = 0.0
        whole = not 0 < config.batch_size < len(y)
        order = np.arange(len(y)) if whole else rng.permutation(len(y))
        for rows in np.split(order, range(config.batch_size, len(y), config.batch_size or len(y))):
            if not len(rows):
                continue
            loss = cross_entropy(model(torch.from_numpy(x[rows])), torch.from_numpy(y[rows]))
            total += loss.item() * len(rows)
            pull = sum(((w - s) ** 2).sum() for w, s in zip(model.parameters(), start, strict=True))
            optimizer.zero_grad()
            (loss + mu / 2 * pull).backward()
            optimizer.step()
    return total / len(y)


@pytest.mark.parametrize(("model", "shape"), MODELS, ids=lambda value: getattr(value, "kind", None))
@pytest.mark.parametrize("batch_size", [1, 5, 0])
@pytest.mark.parametrize(
    ("momentum", "decay", "mu"),
    [(0.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.0, 0.01, 0.0), (0.9, 0.01, 0.0), (0.0, 0.01, 0.3),
     (0.9, 0.01, 0.3)],
)  # fmt: skip
def test_a_step_is_the_step_of_torch_optim(model, shape, batch_size, momentum, decay, mu):
    x, y = examples(shape, count=9)
    config = LocalTraining(
        epochs=2, batch_size=batch_size, learning_rate=0.05, momentum=momentum, weight_decay=decay
    )
    ours, theirs = (build(model, shape, 10, seed=1) for _ in range(2))
    report = train(ours, x, y, config, np.random.default_rng(3), proximal_mu=mu)
    loss = by_torch(theirs, x, y, config, np.random.default_rng(3), mu)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-6)
    assert report.loss == pytest.approx(loss, rel=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    hidden=st.lists(st.integers(1, 20), max_size=3),
    batch_size=st.integers(0, 12),
    momentum=st.sampled_from([0.0, 0.5]),
    decay=st.sampled_from([0.0, 0.1]),
    mu=st.sampled_from([0.0, 0.5]),
)
def test_the_dense_step_is_the_autograd_step(hidden, batch_size, momentum, decay, mu):
    x, y = examples((6,), count=11)
    model = Mlp(hidden=tuple(hidden)) if hidden else Logistic()
    dense, other = (build(model, (6,), 10, seed=2) for _ in range(2))
    watched = nn.Sequential(*other)
    watched[-1].register_forward_hook(lambda *_: None)  # a hook must be called: no short cut
    assert dense_layers(dense) is not None
    assert dense_layers(watched) is None
    config = LocalTraining(
        epochs=2, batch_size=batch_size, learning_rate=0.1, momentum=momentum, weight_decay=decay
    )
    one = train(dense, x, y, config, np.random.default_rng(0), proximal_mu=mu)
    two = train(watched, x, y, config, np.random.default_rng(0), proximal_mu=mu)
    for mine, theirs in zip(dense.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert one.loss == pytest.approx(two.loss, rel=1e-4)
    assert one.accuracy == two.accuracy


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 2),
        nn.Sequential(),
        nn.Sequential(nn.Flatten()),
        nn.Sequential(nn.Flatten(0), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(4, 2), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(4, 2, bias=False)),
        nn.Sequential(nn.Linear(4, 2).double()),
        nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)),
    ],
    ids=repr,
)
def test_only_chains_of_trainable_linear_layers_take_the_dense_step(module):
    assert dense_layers(module) is None


@pytest.mark.parametrize(("model", "shape"), MODELS, ids=lambda value: getattr(value, "kind", None))
def test_the_same_seed_gives_the_same_bytes(model, shape):
    x, y = examples(shape)
    config = LocalTraining(epochs=2, batch_size=4)

    def run(seed):
        trained = build(model, shape, 10, seed=1)
        torch.rand(3)  # the global generator must not matter
        report = train(trained, x, y, config, np.random.default_rng(seed))
        return report, b"".join(array.tobytes() for array in get_arrays(trained).values())

    assert run(4) == run(4)
    assert run(4)[1] != run(5)[1]


@pytest.mark.parametrize("config", [Mlp(hidden=(16,)), LeNet()])
def test_the_proximal_term_pulls_towards_the_start(config):
    x, y = examples((1, 28, 28))

    def distance(mu):
        model = build(config, (1, 28, 28), 10, seed=1)
        start = [weight.detach().clone() for weight in model.parameters()]
        training = LocalTraining(epochs=5, batch_size=5, learning_rate=0.05)
        train(model, x, y, training, np.random.default_rng(0), proximal_mu=mu)
        moved = zip(model.parameters(), start, strict=True)
        return sum(((weight - origin) ** 2).sum().item() for weight, origin in moved)

    free, pulled, held = distance(0.0), distance(1.0), distance(10.0)
    assert held < pulled < free
    assert held < 0.2 * free


def test_the_report_describes_the_last_epoch_before_its_updates():
    x, y = examples((6,))
    model = build(Mlp(hidden=(8,)), (6,), 10, seed=0)
    before = evaluate(model, x, y)
    report = train(model, x, y, LocalTraining(batch_size=0), np.random.default_rng(0))
    assert (report.examples, report.accuracy) == (len(y), before.accuracy)
    assert report.loss == pytest.approx(before.loss, rel=1e-5)


def test_the_digits_are_learnt():
    digits = load(Digits())
    model = build(Mlp(), digits.input_shape, digits.classes, seed=0)
    config = LocalTraining(epochs=8, batch_size=10, learning_rate=0.1)
    report = train(model, digits.x_train, digits.y_train, config, np.random.default_rng(0))
    assert report.accuracy > 0.95
    assert evaluate(model, digits.x_test, digits.y_test).accuracy > 0.92


@pytest.mark.parametrize("config", [Mlp(hidden=(8,)), Cnn()])
def test_inputs_may_be_read_only_and_strided_and_stay_as_they_were(config):
    x, y = examples((1, 28, 28), count=12)
    whole = x.copy()
    x.flags.writeable = y.flags.writeable = False
    model = build(config, (1, 28, 28), 10, seed=0)
    train(model, x[::2], y[::2], LocalTraining(batch_size=2), np.random.default_rng(0))
    evaluate(model, x[::-2], y[::-2])
    np.testing.assert_array_equal(x, whole)


def test_a_client_without_examples_or_labels_is_refused():
    x, y = examples((6,))
    model = build(Logistic(), (6,), 10, seed=0)
    rng = np.random.default_rng(0)
    for inputs, labels in ((x[:0], y[:0]), (x, y[:-1])):
        with pytest.raises(ConfigurationError, match="one label for each"):
            train(model, inputs, labels, LocalTraining(), rng)
        with pytest.raises(ConfigurationError, match="one label for each"):
            evaluate(model, inputs, labels)


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_a_proximal_term_out_of_range_is_refused(mu):
    x, y = examples((6,))
    model = build(Logistic(), (6,), 10, seed=0)
    with pytest.raises(ConfigurationError, match="proximal_mu"):
        train(model, x, y, LocalTraining(), np.random.default_rng(0), proximal_mu=mu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "training.epochs"),
        ({"batch_size": -1}, "training.batch_size"),
        ({"learning_rate": 0.0}, "training.learning_rate"),
        ({"learning_rate": float("nan")}, "training.learning_rate"),
        ({"learning_rate": float("inf")}, "training.learning_rate"),
        ({"momentum": 1.0}, "training.momentum"),
        ({"momentum": float("nan")}, "training.momentum"),
        ({"weight_decay": -1e-9}, "training.weight_decay"),
        ({"weight_decay": float("nan")}, "training.weight_decay"),
    ],
)
def test_a_setting_out_of_range_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        LocalTraining(**change)


def test_evaluation_does_not_depend_on_the_batch_size_nor_change_the_mode():
    x, y = examples((6,))
    model = build(Mlp(hidden=(8,)), (6,), 10, seed=0)
    one, two = evaluate(model, x, y, batch_size=1), evaluate(model, x, y)
    assert isinstance(one, Evaluation)
    assert one.accuracy == two.accuracy
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    assert model.training
    with pytest.raises(ConfigurationError, match="batch_size"):
        evaluate(model, x, y, batch_size=0)


def test_training_does_not_load_the_compiler_or_opacus():
    code = (
        "import sys, numpy as np\n"
        "from fedcore.models import LeNet, Mlp, build\n"
        "from fedcore.training import LocalTraining, evaluate, get_arrays, train\n"
        "x, y = np.zeros((4, 1, 28, 28), np.float32), np.arange(4)\n"
        "for config in (Mlp(), LeNet()):\n"
        "    model = build(config, (1, 28, 28), 10, 0)\n"
        "    train(model, x, y, LocalTraining(momentum=0.9), np.random.default_rng(0))\n"
        "    evaluate(model, x, y); get_arrays(model)\n"
        "print([n for n in ('torch._dynamo', 'opacus', 'sklearn') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_arrays_come_out_as_the_callers_own():
    model = build(Logistic(), (4,), 2, seed=0)
    own, shared = get_arrays(model), get_arrays(model, copy=False)
    with torch.no_grad():
        model.output.bias.fill_(7.0)
    assert not (own["output.bias"] == 7.0).any()
    assert (shared["output.bias"] == 7.0).all()


def test_arrays_go_in_by_value_into_the_tensors_that_are_there():
    source, target = (build(Mlp(hidden=(3,)), (4,), 2, seed=seed) for seed in (0, 1))
    arrays = get_arrays(source)
    places = [weight.data_ptr() for weight in target.parameters()]
    for array in arrays.values():
        array.flags.writeable = False
    set_arrays(target, {name: arrays[name].astype(np.float64) for name in reversed(arrays)})
    assert [weight.data_ptr() for weight in target.parameters()] == places
    for name, array in get_arrays(target).items():
        np.testing.assert_array_equal(array, arrays[name])
    train(target, *examples((4,), 3)[:1], np.array([0, 1, 1]), LocalTraining(),
          np.random.default_rng(0))  # fmt: skip
    np.testing.assert_array_equal(arrays["fc1.weight"], get_arrays(source)["fc1.weight"])


def test_arrays_of_another_model_are_refused_and_change_nothing():
    model = build(Mlp(hidden=(3,)), (4,), 2, seed=0)
    before = get_arrays(model)
    wrong = [
        ({name: before[name] for name in list(before)[1:]}, r"missing \['fc1.weight'\]"),
        (before | {"extra": np.zeros(1)}, r"unknown \['extra'\]"),
        (before | {"output.bias": np.zeros((2, 1), np.float32)}, r"'output.bias' as float32\[2\]"),
        (before | {"output.bias": np.zeros(2, complex)}, "found complex128"),
        (before | {"output.bias": np.array(["a", "b"])}, "found <U1"),
    ]
    for arrays, message in wrong:
        changed = {name: array + 1 if array.dtype == np.float32 else array
                   for name, array in arrays.items()}  # fmt: skip
        with pytest.raises(ConfigurationError, match=message):
            set_arrays(model, changed)
    for name, array in get_arrays(model).items():
        np.testing.assert_array_equal(array, before[name])
