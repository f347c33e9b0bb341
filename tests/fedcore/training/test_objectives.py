"""Distillation lowers the loss that it says, on both paths of local training."""

from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedcore.errors import ConfigurationError
from fedcore.models import Mlp, build
from fedcore.training import LocalTraining, SoftTargets, train
from fedcore.training.dense import dense_layers
from fedcore.training.objectives import Distillation, Labels, objective_of


def softmax(values):
    powers = [exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def batch(classes=4, size=3, seed=0):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(size, classes)).astype(np.float32))
    said = rng.dirichlet(np.ones(classes), size=size).astype(np.float32)
    return logits, torch.from_numpy(rng.integers(classes, size=size)), said


def test_the_loss_is_the_one_of_the_docstring_computed_by_hand():
    logits, y, said = batch()
    temperature, weight = 3.0, 0.4
    by_hand = 0.0
    for row, label, opinion in zip(logits.tolist(), y.tolist(), said.tolist(), strict=True):
        entropy = -log(softmax(row)[label])
        teacher = softmax([log(p) / temperature for p in opinion])
        student = softmax([z / temperature for z in row])
        divergence = sum(p * log(p / q) for p, q in zip(teacher, student, strict=True))
        by_hand += (1 - weight) * entropy + weight * temperature**2 * divergence
    soft = SoftTargets(said, temperature, weight).softened()
    loss = Distillation(temperature, weight).loss(logits, y, soft)
    assert float(loss) == pytest.approx(by_hand / 3, rel=1e-5)


@given(st.floats(0.5, 20), st.floats(0, 1), st.integers(2, 9), st.integers(1, 7))
def test_the_error_is_the_gradient_of_the_loss(temperature, weight, classes, size):
    logits, y, said = batch(classes, size)
    soft = SoftTargets(said, temperature, weight).softened()
    objective = Distillation(temperature, weight)
    variable = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.loss(variable, y, soft), variable)
    error = objective.error(logits, torch.eye(classes)[y], soft)
    torch.testing.assert_close(error / size, gradient, rtol=1e-3, atol=1e-5)


def test_a_teacher_without_weight_is_no_teacher():
    logits, y, said = batch()
    soft, onehot = SoftTargets(said, 5.0, 0.0).softened(), torch.eye(4)[y]
    silent = Distillation(5.0, 0.0)
    torch.testing.assert_close(silent.loss(logits, y, soft), Labels().loss(logits, y, None))
    torch.testing.assert_close(
        silent.error(logits, onehot, soft), Labels().error(logits, onehot, None)
    )


def test_at_temperature_one_the_teacher_says_what_it_said():
    _, _, said = batch()
    np.testing.assert_allclose(SoftTargets(said, 1.0, 0.5).softened().numpy(), said, rtol=1e-5)


def test_a_certain_teacher_is_finite():
    said = np.array([[0.0, 1.0, 0.0]], dtype=np.float32)
    soft = SoftTargets(said, 4.0, 1.0).softened()
    loss = Distillation(4.0, 1.0).loss(torch.zeros(1, 3), torch.tensor([0]), soft)
    assert torch.isfinite(soft).all()
    assert torch.isfinite(loss)
    assert soft.argmax() == 1


@settings(deadline=None, max_examples=25)
@given(
    batch_size=st.integers(0, 12),
    momentum=st.sampled_from([0.0, 0.5]),
    temperature=st.sampled_from([1.0, 4.0]),
)
def test_the_dense_step_distils_like_autograd(batch_size, momentum, temperature):
    rng = np.random.default_rng(1)
    x, y = rng.random((11, 6), dtype=np.float32), rng.integers(5, size=11)
    teacher = SoftTargets(
        rng.dirichlet(np.ones(5), size=11).astype(np.float32), temperature, weight=0.7
    )
    dense, other = (build(Mlp(hidden=(8,)), (6,), 5, seed=2) for _ in range(2))
    watched = nn.Sequential(*other)
    watched[-1].register_forward_hook(lambda *_: None)  # a hook must be called: no short cut
    assert dense_layers(dense) is not None
    assert dense_layers(watched) is None
    config = LocalTraining(epochs=2, batch_size=batch_size, learning_rate=0.1, momentum=momentum)
    for model in (dense, watched):
        train(model, x, y, config, np.random.default_rng(0), teacher=teacher)
    for mine, theirs in zip(dense.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_student_follows_its_teacher_where_the_labels_are_wrong():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    truth = (x[:, 0] > 0).astype(np.int64)
    wrong = 1 - truth
    said = np.eye(2, dtype=np.float32)[truth] * 0.9 + 0.05
    student = build(Mlp(hidden=(8,)), (4,), 2, seed=0)
    train(
        student, x, wrong, LocalTraining(epochs=60, learning_rate=0.1), np.random.default_rng(0),
        teacher=SoftTargets(said, 2.0, 1.0),
    )  # fmt: skip
    with torch.no_grad():
        classes = student(torch.from_numpy(x)).argmax(1).numpy()
    assert np.mean(classes == truth) > 0.9


@pytest.mark.parametrize(("temperature", "weight"), [(0.0, 0.5), (np.inf, 0.5), (1.0, 1.1)])
def test_ranges_of_soft_targets_are_checked(temperature, weight):
    with pytest.raises(ConfigurationError, match="a positive temperature and a weight in"):
        SoftTargets(np.ones((1, 2), np.float32), temperature, weight)


def test_a_teacher_has_one_opinion_for_each_example():
    with pytest.raises(ConfigurationError, match=r"for the client's 4 examples, got \[3, 4\]"):
        objective_of(SoftTargets(batch()[2], 1.0, 0.5), 4, "cpu")
