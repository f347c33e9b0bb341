"""DP-SGD: clipping, noise, sampling and accounting are what they claim to be."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedcore.crypto.entropy import ReplayedEntropy
from fedcore.errors import ConfigurationError
from fedcore.models import LeNet, Mlp, build
from fedcore.training import (
    ExampleLevelPrivacy,
    LocalTraining,
    example_level_epsilon,
    get_arrays,
    train,
    train_example_level,
)
from fedcore.training.secure_noise import secure_normal, uniforms

SHAPE = (1, 28, 28)
CLIPPING = ("hooks", "ghost", "one_by_one")
WAYS = [(way, secure) for way in CLIPPING for secure in (False, True)]
BY = {"hooks": {}, "ghost": {"ghost": True}, "one_by_one": {"one_by_one": True}}
FULL = LocalTraining(epochs=3, batch_size=0, learning_rate=0.1, momentum=0.5, weight_decay=0.01)


def examples(count=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((count, *SHAPE), dtype=np.float32), rng.integers(10, size=count)


def privately(model, x, y, config, privacy, seed=0, mu=0.0):
    rng = np.random.default_rng(seed)
    return train_example_level(model, x, y, config, privacy, rng=rng, proximal_mu=mu)


@pytest.mark.parametrize("model", [Mlp(hidden=(16,)), LeNet()], ids=lambda model: model.kind)
@pytest.mark.parametrize(("way", "secure"), WAYS)
def test_without_noise_and_clipping_full_batches_are_plain_sgd(model, way, secure):
    x, y = examples()
    private, plain = (build(model, SHAPE, 10, seed=1) for _ in range(2))
    privacy = ExampleLevelPrivacy(
        noise_multiplier=0.0, max_grad_norm=1e6, **BY[way], secure_mode=secure
    )
    report = privately(private, x, y, FULL, privacy, mu=0.2)
    expected = train(plain, x, y, FULL, np.random.default_rng(0), proximal_mu=0.2)
    for mine, other in zip(private.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert (report.steps, report.sample_rate, report.examples) == (3, 1.0, 12)
    assert report.loss == pytest.approx(expected.loss, rel=1e-4)
    assert report.accuracy == expected.accuracy


@pytest.mark.parametrize("model", [Mlp(hidden=(16,)), LeNet()], ids=lambda model: model.kind)
@pytest.mark.parametrize("way", CLIPPING)
def test_a_noiseless_step_is_the_mean_of_the_clipped_gradients(model, way):
    x, y = examples(6)
    bound = 0.3
    trained = build(model, SHAPE, 10, seed=1)
    start = [weight.detach().clone() for weight in trained.parameters()]
    expected = [torch.zeros_like(weight) for weight in start]
    for row in range(6):
        loss = cross_entropy(trained(torch.from_numpy(x[[row]])), torch.from_numpy(y[[row]]))
        gradient = torch.autograd.grad(loss, list(trained.parameters()))
        norm = math.sqrt(sum(float((part**2).sum()) for part in gradient))
        assert norm > bound  # or the test would not test clipping
        for total, part in zip(expected, gradient, strict=True):
            total.add_(part, alpha=bound / norm / 6)
    privacy = ExampleLevelPrivacy(noise_multiplier=0.0, max_grad_norm=bound, **BY[way])
    privately(trained, x, y, LocalTraining(batch_size=0, learning_rate=1.0), privacy)
    for weight, origin, step in zip(trained.parameters(), start, expected, strict=True):
        torch.testing.assert_close(weight, origin - step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("way", "secure"), WAYS)
def test_noise_has_the_stated_deviation(way, secure):
    x, y = examples(4)
    privacy = ExampleLevelPrivacy(
        noise_multiplier=50.0, max_grad_norm=0.01, **BY[way], secure_mode=secure
    )
    model = build(Mlp(hidden=(64,)), SHAPE, 10, seed=1)
    start = np.concatenate([array.ravel() for array in get_arrays(model).values()])
    privately(model, x, y, LocalTraining(batch_size=0, learning_rate=1.0), privacy)
    moved = np.concatenate([array.ravel() for array in get_arrays(model).values()]) - start
    # 50,890 values of deviation 50 * 0.01 / 4; 4 standard errors of the estimate are 1.3 %.
    assert moved.std() == pytest.approx(0.125, rel=0.015)
    assert abs(moved.mean()) < 4 * 0.125 / math.sqrt(moved.size)


@pytest.mark.parametrize("way", CLIPPING)
def test_without_secure_mode_the_same_seed_gives_the_same_bytes(way):
    x, y = examples()
    config, privacy = LocalTraining(epochs=2, batch_size=4), ExampleLevelPrivacy(**BY[way])

    def run(seed):
        model = build(LeNet(), SHAPE, 10, seed=1)
        torch.rand(3)
        report = privately(model, x, y, config, privacy, seed)
        return report, b"".join(array.tobytes() for array in get_arrays(model).values())

    assert run(4) == run(4)
    assert run(4)[1] != run(5)[1]


def test_in_secure_mode_the_seed_decides_nothing():
    x, y = examples()
    runs = []
    for _ in range(2):
        model = build(Mlp(hidden=(4,)), SHAPE, 10, seed=1)
        privately(model, x, y, LocalTraining(), ExampleLevelPrivacy(secure_mode=True))
        runs.append(get_arrays(model)["output.bias"])
    assert not np.array_equal(*runs)


@pytest.mark.parametrize("way", CLIPPING)
def test_an_empty_sample_still_takes_a_noisy_step(way):
    x, y = examples(2)
    privacy, config = ExampleLevelPrivacy(**BY[way]), LocalTraining(batch_size=1)
    rates = []
    for seed in range(12):  # two steps of rate 1/2 over two examples: empty with probability 1/4
        model = build(LeNet(), SHAPE, 10, seed=1)
        before = get_arrays(model)
        report = privately(model, x, y, config, privacy, seed)
        after = get_arrays(model)
        assert all(np.isfinite(after[name]).all() for name in after)
        assert not any(np.array_equal(before[name], after[name]) for name in after)
        assert math.isfinite(report.loss)
        rates.append((report.steps, report.sample_rate))
    assert set(rates) == {(2, 0.5)}


@pytest.mark.parametrize("way", CLIPPING)
def test_nothing_of_the_private_gradients_stays_on_the_model(way):
    x, y = examples(4)
    model = build(LeNet(), SHAPE, 10, seed=1)
    fresh = build(LeNet(), SHAPE, 10, seed=1)
    privately(model, x, y, LocalTraining(), ExampleLevelPrivacy(**BY[way]))
    for used, new in zip(model.parameters(), fresh.parameters(), strict=True):
        assert used.__dict__ == new.__dict__
        assert used.grad is None
    for used, new in zip(model.modules(), fresh.modules(), strict=True):
        assert used.__dict__.keys() == new.__dict__.keys()
        assert not used._forward_hooks
        assert not used._backward_hooks
    train(model, x, y, LocalTraining(), np.random.default_rng(0))


def test_steps_and_sample_rate_follow_from_epochs_and_batch_size():
    x, y = examples(12)
    model = build(Mlp(hidden=(4,)), SHAPE, 10, seed=1)
    for batch_size, epochs, expected in ((5, 2, (6, 1 / 3)), (12, 1, (1, 1.0)), (99, 4, (4, 1.0))):
        config = LocalTraining(epochs=epochs, batch_size=batch_size)
        report = privately(model, x, y, config, ExampleLevelPrivacy())
        assert (report.steps, report.sample_rate) == expected


@pytest.mark.parametrize("secure", [False, True])
def test_every_example_joins_every_batch_by_itself_with_the_stated_probability(secure):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(40, 3)
            self.seen = []

        def forward(self, x):
            self.seen.append(x.detach().sum(dim=0).numpy())
            return self.linear(x)

    model, config = Counting(), LocalTraining(epochs=100, batch_size=10, learning_rate=1e-3)
    x = np.eye(40, dtype=np.float32)  # the sum of a batch says who is in it
    report = privately(model, x, np.arange(40) % 3, config, ExampleLevelPrivacy(secure_mode=secure))
    joined = np.array(model.seen)
    assert joined.shape == (400, 40)
    assert (report.steps, report.sample_rate) == (400, 0.25)
    # 16,000 coins of probability 1/4; batch sizes of a binomial spread, not of a shuffle's none.
    assert joined.mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.1875 / 16_000))
    assert joined.sum(axis=1).var() == pytest.approx(40 * 0.1875, rel=5 * math.sqrt(2 / 400))
    assert joined.mean(axis=0) == pytest.approx(0.25, abs=5 * math.sqrt(0.1875 / 400))
    pairs = np.corrcoef(joined.T)[np.triu_indices(40, 1)]
    assert np.abs(pairs).max() < 6 / math.sqrt(400)


def test_all_ways_to_clip_train_the_same_weights_from_the_same_seed():
    x, y = examples()
    config = LocalTraining(epochs=3, batch_size=4, learning_rate=0.1)
    weights = []
    for way in CLIPPING:
        model = build(LeNet(), SHAPE, 10, seed=1)
        privately(model, x, y, config, ExampleLevelPrivacy(max_grad_norm=0.3, **BY[way]))
        weights.append(get_arrays(model))
    for other in weights[1:]:
        for name, array in weights[0].items():
            np.testing.assert_allclose(array, other[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", CLIPPING)
def test_a_model_that_mixes_examples_is_refused(way):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4))
    with pytest.raises(ConfigurationError, match="treats examples separately"):
        privately(model, *examples(), LocalTraining(), ExampleLevelPrivacy(**BY[way]))


def test_only_one_way_to_clip_can_be_chosen():
    with pytest.raises(ConfigurationError, match="set one of them"):
        ExampleLevelPrivacy(ghost=True, one_by_one=True)


def test_a_client_without_examples_is_refused():
    x, y = examples()
    model = build(Mlp(hidden=(4,)), SHAPE, 10, seed=1)
    with pytest.raises(ConfigurationError, match="one label for each"):
        privately(model, x[:0], y[:0], LocalTraining(), ExampleLevelPrivacy())
    with pytest.raises(ConfigurationError, match="proximal_mu"):
        privately(model, x, y, LocalTraining(), ExampleLevelPrivacy(), mu=-1.0)


def test_secure_normal_values_are_standard_normal():
    values = secure_normal(200_000, ReplayedEntropy(b"seed"))
    assert values.shape == (200_000,)
    assert abs(values.mean()) < 4 / math.sqrt(200_000)
    assert values.var() == pytest.approx(1, abs=4 * math.sqrt(2 / 200_000))
    tail = np.mean(np.abs(values) > 2)
    assert tail == pytest.approx(0.0455, abs=4 * math.sqrt(0.0455 / 200_000))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / math.sqrt(200_000)


def test_secure_uniforms_are_multiples_of_the_smallest_step_below_one():
    values = uniforms(10_000, ReplayedEntropy(b"seed"))
    assert values.min() >= 0
    assert values.max() < 1
    np.testing.assert_array_equal(values * 2**53, np.floor(values * 2**53))


def gaussian_epsilon(mu, delta):
    """Invert the exact curve of the Gaussian mechanism [BW18, Theorem 8] by bisection."""
    phi = lambda t: math.erfc(-t / math.sqrt(2)) / 2  # noqa: E731
    low, high = 0.0, 200.0
    for _ in range(100):
        epsilon = (low + high) / 2
        exact = phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)
        low, high = (epsilon, high) if exact > delta else (low, epsilon)
    return high


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (2.0, 16), (5.0, 10)])
def test_epsilon_without_sampling_is_the_gaussian_mechanism(sigma, steps):
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, 1e-5)
    bound = example_level_epsilon(sigma, 1.0, steps, 1e-5)
    assert exact <= bound <= exact * 1.01 + 0.02


def test_epsilon_of_the_opacus_tutorial_setting():
    # Known from prv_accountant and dp-accounting alike: sigma 1, q 0.01, 10,000 steps, 1e-6.
    assert example_level_epsilon(1.0, 0.01, 10_000, 1e-6) == pytest.approx(6.91, abs=0.05)


def test_more_noise_costs_less_and_more_steps_cost_more():
    costs = [example_level_epsilon(sigma, 0.1, 100, 1e-5) for sigma in (0.3, 0.5, 1.0, 2.0, 20.0)]
    assert costs == sorted(costs, reverse=True)
    steps = [example_level_epsilon(1.0, 0.1, count, 1e-5) for count in (0, 1, 10, 100)]
    assert steps == sorted(steps)
    assert steps[0] == 0.0


def test_no_noise_is_no_privacy():
    assert example_level_epsilon(0.0, 0.1, 1, 1e-5) == math.inf


def test_an_extreme_setting_gives_a_bound_without_warning_or_delay():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 1000 < example_level_epsilon(0.05, 0.5, 100, 1e-5) < math.inf
        assert 0 <= example_level_epsilon(1000.0, 0.001, 1, 1e-5) < 0.2


@pytest.mark.parametrize(
    "arguments",
    [(-1.0, 0.1, 1, 1e-5), (1.0, 0.0, 1, 1e-5), (1.0, 1.1, 1, 1e-5), (1.0, 0.1, -1, 1e-5),
     (1.0, 0.1, 1, 0.0), (1.0, 0.1, 1, 1.0), (math.nan, 0.1, 1, 1e-5)],
)  # fmt: skip
def test_an_argument_out_of_range_is_refused(arguments):
    with pytest.raises(ConfigurationError, match="epsilon needs"):
        example_level_epsilon(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": -0.1}, "privacy.noise_multiplier"),
        ({"noise_multiplier": math.nan}, "privacy.noise_multiplier"),
        ({"max_grad_norm": 0.0}, "privacy.max_grad_norm"),
        ({"max_grad_norm": math.inf}, "privacy.max_grad_norm"),
        ({"delta": 0.0}, "privacy.delta"),
        ({"delta": 1.0}, "privacy.delta"),
    ],
)
def test_a_setting_out_of_range_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        ExampleLevelPrivacy(**change)
