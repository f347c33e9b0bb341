from dataclasses import replace
from math import inf

import numpy as np
import pytest

from fedcore.codec import Clip, Quantize, RandomK
from fedcore.data import Dirichlet, Iid, Natural, NpzFile
from fedcore.errors import ConfigurationError, DataError
from fedcore.job import Job, NoClip, NoQuantize, check
from fedcore.models import Cnn1d, Logistic, Mlp
from fedcore.pipeline import Bonawitz, Modular, NoSecAgg, Uniform
from fedcore.privacy import DistributedGaussian, DistributedSkellam, PrivacyLedger
from fedcore.privacy.target import rounded_up
from fedcore.training import ExampleLevelPrivacy, LocalTraining

JOB = Job(model=Logistic(), partition=Iid(), clients=8, clients_per_round=8)
WEIGHTS = 650
PRIVATE = replace(
    JOB,
    clip=Clip(1.0),
    weighting=Uniform(),
    privacy=DistributedGaussian(noise_multiplier=1.0, delta=1e-5),
)
PLAIN = {"clip": NoClip(), "quantize": NoQuantize(), "secagg": NoSecAgg()}


def budget(epsilon, rounds=10, **changes):
    privacy = replace(PRIVATE.privacy, epsilon_budget=epsilon, **changes)
    return replace(PRIVATE, privacy=privacy, rounds=rounds)


@pytest.mark.parametrize(("authority", "clients"), [("ab" * 32, 128), (None, 129)])
def test_few_bits_will_do_where_no_draw_protects_anybody(authority, clients):
    secagg = Bonawitz(security_bits=40, authority=authority)
    check(replace(JOB, clients=129, clients_per_round=clients, secagg=secagg))


def test_too_few_bits_for_many_enrolled_devices_are_refused_with_the_repair():
    secagg = Bonawitz(security_bits=79, authority="ab" * 32)
    job = replace(JOB, clients=129, clients_per_round=129, secagg=secagg)
    with pytest.raises(ConfigurationError, match=r"at least 80 .* got 79 for 129: set it to 80"):
        check(job)
    assert check(replace(job, secagg=replace(secagg, security_bits=None))).bound is not None


def test_what_is_known_before_a_run_starts():
    preflight = check(JOB)
    assert preflight.parameters == WEIGHTS
    assert preflight.dataset.name == "digits"
    assert len(preflight.shards) == 8
    assert sum(map(len, preflight.shards)) == len(preflight.dataset.y_train)
    assert preflight.bound.update_dim == WEIGHTS
    assert preflight.bound.plan.clients == 8
    assert (preflight.epsilon, preflight.delta, preflight.example_release) == (inf, None, None)
    assert "array" not in repr(preflight)


def test_plain_float32_has_no_round_to_put_together():
    preflight = check(replace(JOB, **PLAIN))
    assert (preflight.bound, preflight.epsilon) == (None, inf)


@pytest.mark.parametrize("rounds", [1, 7])
def test_the_projected_epsilon_is_that_of_the_ledger(rounds):
    preflight = check(replace(PRIVATE, rounds=rounds))
    ledger = PrivacyLedger(delta=1e-5)
    for number in range(1, rounds + 1):
        ledger = ledger.record(replace(preflight.bound.release(8), round_number=number))
    assert preflight.epsilon == pytest.approx(ledger.epsilon)
    assert preflight.delta == 1e-5


def test_a_budget_that_is_too_small_names_the_rounds_that_it_lasts_for():
    full, seven = check(PRIVATE).epsilon, check(replace(PRIVATE, rounds=7)).epsilon
    check(budget(full))
    with pytest.raises(ConfigurationError) as caught:
        check(budget(seven * 1.001))
    assert f"must be at least {rounded_up(full):g} for 10 rounds" in str(caught.value)
    check(budget(rounded_up(full)))
    assert "it lasts for 7 rounds" in str(caught.value)
    with pytest.raises(ConfigurationError, match="it lasts for 0 rounds"):
        check(budget(1e-3))


def examples(path, classes=3, shape=(4,), count=30):
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    x = rng.normal(size=(count, *shape)).astype(np.float32)
    np.savez(path, x_train=x, y_train=labels, x_test=x, y_test=labels)
    return NpzFile(path=str(path))


@pytest.mark.parametrize(
    ("job", "error", "named"),
    [
        (replace(JOB, classes=9), ConfigurationError, "classes must be 10.*'digits'.*got 9"),
        (
            replace(JOB, data=NpzFile(path="/nowhere/data.npz")),
            DataError,
            r"/nowhere/data\.npz does not exist: check data\.path",
        ),
        (replace(JOB, model=Cnn1d()), ConfigurationError, "cnn1d|input"),
        (
            replace(PRIVATE, quantize=Modular(4)),
            ConfigurationError,
            r"at least \d+ bits, got 4",
        ),
        (
            replace(JOB, quantize=Modular(4), metric_slots=1, clients=20, clients_per_round=20),
            ConfigurationError,
            "bits",
        ),
        (
            replace(JOB, clients_per_round=1),
            ConfigurationError,
            "fewer than 2 clients reveals its input",
        ),
        (
            replace(JOB, secagg=Bonawitz(corrupt=0.45), dropout=0.4),
            ConfigurationError,
            "lower secagg.corrupt or secagg.dropout|invite more clients",
        ),
        (replace(JOB, partition=Natural()), ConfigurationError, "another partition"),
        (replace(JOB, clients=5000), ConfigurationError, "clients|examples"),
    ],
)
def test_what_cannot_work_is_found_before_training(job, error, named):
    with pytest.raises(error, match=named) as caught:
        check(job)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_the_data_is_refused(tmp_path):
    data = examples(tmp_path / "sensors.npz", shape=(4,))
    job = replace(JOB, data=data, clients=3, clients_per_round=3)
    assert check(job).parameters == 4 * 3 + 3
    with pytest.raises(ConfigurationError):
        check(replace(job, model=Cnn1d()))


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match="cannot be read"):
        check(replace(JOB, data=NpzFile(path=str(path))))


def test_the_number_of_classes_may_be_demanded(tmp_path):
    data = examples(tmp_path / "three.npz")
    job = replace(JOB, data=data, clients=3, clients_per_round=3, classes=3)
    assert check(job).dataset.classes == 3


def test_the_first_round_is_put_together_for_the_cohort_not_the_population():
    bound = check(replace(JOB, clients=8, clients_per_round=5)).bound
    assert bound.plan.clients == 5


def test_sparse_uploads_are_known_in_advance():
    bound = check(replace(JOB, sparsify=RandomK(0.1), quantize=Quantize(8))).bound
    assert bound.update_dim == 65


@pytest.mark.parametrize(
    ("batch_size", "epochs", "batches"), [(10, 1, 18), (10, 3, 18), (0, 2, 1), (1000, 1, 1)]
)
def test_example_level_privacy_is_that_of_the_device_with_the_fewest_examples(
    batch_size, epochs, batches
):
    job = replace(
        JOB,
        weighting=Uniform(),
        privacy=ExampleLevelPrivacy(noise_multiplier=2.0),
        training=LocalTraining(batch_size=batch_size, epochs=epochs),
    )
    preflight = check(job)
    release = preflight.example_release
    assert min(map(len, preflight.shards)) == 179
    assert release.unit == "example"
    assert release.sampling_rate == 1 / batches
    assert release.steps == epochs * batches
    assert 0 < preflight.epsilon < inf
    assert preflight.delta == 1e-5
    assert preflight.epsilon == PrivacyLedger(delta=1e-5).projected_epsilon(release, 10)


def test_the_device_with_the_fewest_examples_has_the_highest_sampling_rate():
    job = replace(
        JOB,
        partition=Dirichlet(alpha=0.3),
        weighting=Uniform(),
        privacy=ExampleLevelPrivacy(),
        training=LocalTraining(batch_size=10),
    )
    preflight = check(job)
    sizes = sorted(map(len, preflight.shards))
    assert sizes[0] < sizes[-1] - 10
    assert preflight.example_release.sampling_rate == 1 / -(-sizes[0] // 10)


def test_example_level_clipping_without_noise_promises_nothing():
    job = replace(JOB, weighting=Uniform(), privacy=ExampleLevelPrivacy(noise_multiplier=0.0))
    assert check(job).epsilon == inf


def test_both_mechanisms_can_be_projected():
    skellam = DistributedSkellam(noise_multiplier=1.0, delta=1e-5)
    one, other = check(PRIVATE).epsilon, check(replace(PRIVATE, privacy=skellam)).epsilon
    # Skellam is accounted at whole orders only, which costs some percent at so few.
    assert one <= other <= one * 1.05


def test_the_model_may_be_any_that_fits():
    assert check(replace(JOB, model=Mlp(hidden=(4,)))).parameters == 64 * 4 + 4 + 4 * 10 + 10
