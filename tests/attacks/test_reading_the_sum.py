"""Attacks that masks cannot stop: they read what the sum itself says.

Each is shown to work on exact sums, so that it is known to be an attack, and to fail on
sums with noise.

[FGCG22] Fowl et al., "Robbing the Fed", ICLR 2022. https://arxiv.org/abs/2110.13057
[LWS+21] Lam et al., "Gradient Disaggregation", ICML 2021. https://arxiv.org/abs/2106.06089
[KOV15]  Kairouz, Oh and Viswanath, ICML 2015, theorem 2.1: no test of (epsilon, delta)-private
         output has true positives beyond false positives by more than
         (e^epsilon - 1 + 2 delta) / (e^epsilon + 1). https://arxiv.org/abs/1311.0776
"""

from itertools import pairwise
from math import erf, exp, sqrt
from statistics import NormalDist

import numpy as np
import pytest

from fedcore.codec import Clip
from fedcore.data import Digits, load
from fedcore.errors import ConfigurationError
from fedcore.models import Cnn, Logistic, Mlp, build
from fedcore.pipeline import Modular
from fedcore.privacy import PrivacyLedger
from fedcore.training import LocalTraining, get_arrays, set_arrays, train
from tests.attacks.rounds import DELTA, add_up, bound_round, exact, noise_of, noisy, reveal

# Parameter traps: a model whose gradient is a list of the examples [FGCG22].

CLIENTS, EXAMPLES, BINS = 20, 2, 400
MODEL = Mlp(hidden=(BINS,))
TRAINING = LocalTraining(epochs=1, batch_size=0, learning_rate=0.1)


@pytest.fixture(scope="module")
def digits():
    """Two examples for each client, as many of others, and the rest for the coordinator."""
    data = load(Digits())
    order = np.random.default_rng(1).permutation(len(data.y_train))
    x, y = data.x_train[order], data.y_train[order]
    cut = CLIENTS * EXAMPLES
    return (x[:cut], y[:cut]), x[cut : 2 * cut], x[2 * cut :]


def trapped(known):
    """The device's own architecture with weights that sort examples by their brightness.

    Unit j of the hidden layer fires for examples brighter than the j-th of `BINS` quantiles,
    and all units feed the output alike: neighbouring rows of the gradient differ by the
    examples between two quantiles.
    """
    model = build(MODEL, known.shape[1:], 10, seed=0)
    brightness = NormalDist.from_samples(known.reshape(len(known), -1).mean(axis=1).tolist())
    quantiles = [brightness.inv_cdf((j + 0.5) / BINS) for j in range(BINS)]
    names = list(get_arrays(model))
    shapes = {name: array.shape for name, array in get_arrays(model).items()}
    inputs = shapes[names[0]][1]
    traps = (
        np.full(shapes[names[0]], 1 / inputs),
        -np.array(quantiles),
        np.repeat(np.linspace(-1, 1, 10)[:, None], BINS, axis=1) / BINS,
        np.zeros(10),
    )
    set_arrays(model, {n: t.astype(np.float32) for n, t in zip(names, traps, strict=True)})
    return model


def flat(model):
    return np.concatenate([array.ravel() for array in get_arrays(model).values()])


@pytest.fixture(scope="module")
def updates(digits):
    """What each client's honest training makes of the trap."""
    (x, y), _, known = digits
    deltas = []
    for client in range(CLIENTS):
        mine = slice(client * EXAMPLES, (client + 1) * EXAMPLES)
        model = trapped(known)
        before = flat(model)
        train(model, x[mine], y[mine], TRAINING, np.random.default_rng(client))
        deltas.append(flat(model) - before)
    return deltas


def resemblance(delta, images, known):
    """The best cosine between each image and anything that the trap caught.

    Without what all images have in common, or noise would resemble every image.
    """
    pixels = known[0].size
    rows = delta[: BINS * pixels].reshape(BINS, pixels).astype(np.float64)
    bias = delta[BINS * pixels : BINS * (pixels + 1)].astype(np.float64)
    caught, weight = rows[:-1] - rows[1:], bias[:-1] - bias[1:]
    filled = np.abs(weight) > 1e-3 * np.abs(weight).max()
    common = known.reshape(len(known), -1).mean(axis=0)
    found = caught[filled] / weight[filled, None] - common
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    wanted = images.reshape(len(images), -1) - common
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    return np.abs(found @ wanted.T).max(axis=0)


@pytest.mark.parametrize("clip", [100.0, 0.01])
def test_a_trap_reads_most_examples_out_of_an_exact_sum_clipped_or_not(digits, updates, clip):
    (x, _), others, known = digits
    assert max(map(np.linalg.norm, updates)) > 0.01
    bound = bound_round(exact(clip=Clip(clip)), CLIENTS, len(updates[0]))
    delta = reveal(bound, updates).delta
    assert (resemblance(delta, x, known) > 0.99).mean() > 0.5
    assert not (resemblance(delta, others, known) > 0.99).any()


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_a_trap_catches_nothing_that_it_would_not_catch_by_chance_if_there_is_noise(
    digits, updates, noise
):
    (x, _), others, known = digits
    # A clip that cuts little: the noise is not larger than it need be.
    clip = float(np.median([np.linalg.norm(update) for update in updates]))
    bound = bound_round(noisy(noise, clip=Clip(clip)), CLIENTS, len(updates[0]))
    delta = reveal(bound, updates).delta
    inside, outside = (resemblance(delta, images, known) for images in (x, others))
    assert not (inside > 0.99).any()
    spread = sqrt((inside.var() + outside.var()) / len(inside))
    assert abs(inside.mean() - outside.mean()) < 4 * spread


@pytest.mark.parametrize("own", [Logistic(), Cnn()])
def test_a_device_refuses_a_trap_that_is_no_model_of_its_own(digits, own):
    _, _, known = digits
    device = build(own, known.shape[1:] if own == Logistic() else (1, 28, 28), 10, seed=0)
    with pytest.raises(ConfigurationError, match="client and server must use the same model"):
        set_arrays(device, get_arrays(trapped(known)))


# Disaggregation: many sums, and who was in which [LWS+21].

FLEET, ROUNDS, DIM = 10, 30, 256


def disaggregated(run):
    """Solve for single updates from who survived; return errors, what is lost, and noise."""
    rng = np.random.default_rng(5)
    truth = rng.normal(size=(FLEET, DIM)) / sqrt(DIM) / 2  # the same in every round, norm 1/2
    present, sums, noise = np.ones((ROUNDS, FLEET)), np.zeros((ROUNDS, DIM)), np.zeros(ROUNDS)
    for number in range(ROUNDS):
        gone = rng.choice(FLEET, size=3, replace=False).tolist()
        present[number, gone] = 0
        bound = bound_round(run, FLEET, DIM, number + 1)
        mean = reveal(bound, truth, number, dict.fromkeys(gone, "upload"))
        assert mean.survivors == FLEET - 3
        sums[number] = mean.delta * mean.survivors
        noise[number] = noise_of(bound, mean.survivors)
    assert np.linalg.matrix_rank(present) == FLEET
    found = np.linalg.lstsq(present, sums, rcond=None)[0]
    least = noise[0] * np.sqrt(np.diag(np.linalg.inv(present.T @ present)))
    return np.sqrt(((found - truth) ** 2).mean(axis=1)), least, np.sqrt((truth**2).mean(axis=1))


def test_exact_sums_and_a_list_of_who_took_part_give_every_single_update():
    error, _, size = disaggregated(exact(dropout=0.3))
    assert error.max() < 1e-4 * size.min()


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_with_noise_a_single_update_is_known_no_better_than_the_noise_allows(noise):
    """No unbiased estimate beats `least`; at this noise it is worse than guessing zero."""
    error, least, size = disaggregated(noisy(noise, dropout=0.3, clip=Clip(1.0)))
    assert (error > 0.85 * least).all()  # an error over 256 coordinates is known to 5 per cent
    assert (error > 2 * size).all()


def test_the_ledger_charges_for_every_round_that_disaggregation_uses():
    bound = bound_round(noisy(2.0, dropout=0.3), FLEET, DIM)
    ledger, spent = PrivacyLedger(delta=DELTA), [0.0]
    for _ in range(ROUNDS):
        ledger = ledger.record(bound.release(FLEET - 3))
        spent.append(ledger.epsilon)
    assert all(one < two for one, two in pairwise(spent))
    assert spent[-1] > sqrt(ROUNDS) * spent[1] * 0.9


# Single elements: a row of an embedding that one client alone has touched.

WORDS, WIDTH, SPEAKERS, TRIALS = 16, 4, 5, 400
RARE = 11


def spoken(*, rare):
    """Everybody changes common words; client 0 also changes a rare one, if it has it."""
    rng = np.random.default_rng(3)
    deltas = np.zeros((SPEAKERS, WORDS, WIDTH))
    deltas[:, :8] = 0.02 * rng.normal(size=(SPEAKERS, 8, WIDTH))
    deltas[0] = 0.0
    if rare:
        deltas[0, RARE] = 0.5  # norm 1: as much as the clip lets through
    return deltas.reshape(SPEAKERS, -1)


def test_a_word_that_one_client_alone_used_shows_in_an_exact_sum():
    bound = bound_round(exact(clip=Clip(1.0)), SPEAKERS, WORDS * WIDTH)
    without, with_rare = (
        reveal(bound, spoken(rare=rare)).delta.reshape(WORDS, WIDTH)[RARE] for rare in (0, 1)
    )
    assert np.abs(without).max() < 1e-6
    assert with_rare * SPEAKERS == pytest.approx(0.5, abs=1e-6)


def advantage(noise):
    """True minus false positives of the likelihood-ratio test for the rare word."""
    bound = bound_round(
        noisy(noise, clip=Clip(1.0), quantize=Modular(20), dropout=0.0), SPEAKERS, WORDS * WIDTH
    )
    shares = []
    for rare in (True, False):
        deltas = spoken(rare=rare)
        rows = [
            add_up(bound, deltas, (noise, rare, trial)).delta.reshape(WORDS, WIDTH)[RARE]
            for trial in range(TRIALS)
        ]
        # Only this row differs, its noise is Gaussian: the sum along it is all there is to know.
        scores = np.array(rows).sum(axis=1) * SPEAKERS * 0.5
        shares.append((scores > 0.5).mean())
    return shares[0] - shares[1], PrivacyLedger(delta=DELTA).record(bound.release(SPEAKERS)).epsilon


@pytest.mark.parametrize("noise", [2.0, 4.0, 8.0])
def test_with_noise_a_word_that_one_client_alone_used_hides_as_well_as_epsilon_says(noise):
    found, epsilon = advantage(noise)
    error = sqrt(0.5 / TRIALS)  # of a difference of two frequencies, at most
    assert found <= (exp(epsilon) - 1 + 2 * DELTA) / (exp(epsilon) + 1)
    assert found <= erf(1 / (2 * noise) / sqrt(2)) + 4 * error


def test_with_too_little_noise_the_same_test_finds_the_word():
    found, epsilon = advantage(0.2)
    assert found > 0.9
    assert epsilon > 20


def test_the_sum_under_masks_is_the_one_that_these_tests_add_up():
    bound = bound_round(noisy(2.0, clip=Clip(1.0)), SPEAKERS, WORDS * WIDTH)
    deltas = spoken(rare=True)
    assert (reveal(bound, deltas, 7).delta == add_up(bound, deltas, 7).delta).all()
