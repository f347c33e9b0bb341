"""Images from what travels: exact without masks, nothing from the noisy sum."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.audit.inversion import _observe, audit_inversion, check_inversion
from experiments.audit.reconstruct import analytic, best_matches, by_gradient
from experiments.audit.settings import InversionSettings
from fedcore.data import NpzFile
from fedcore.errors import ConfigurationError
from fedcore.job import NoClip, NoQuantize, check
from fedcore.models import LeNet, Logistic, build
from fedcore.pipeline import Bonawitz, Modular, NoSecAgg
from fedcore.training import LocalTraining, get_arrays, train
from fedcore.vectors import Layout
from tests.experiments.audit.jobs import JOB, noisy

SETTINGS = InversionSettings(cohort=10, examples=1, steps=60)
MASKED = replace(JOB, secagg=Bonawitz())


@pytest.fixture(scope="module")
def views():
    job = noisy(MASKED, 2.0)
    audit = audit_inversion(job, check(job), SETTINGS, quiet=True)
    return {view.name: view.recovered for view in audit.views}


def test_one_update_without_a_mask_is_the_image_itself(views):
    assert views["one update"].correlation.min() > 0.99
    assert views["one update"].psnr.min() > 25
    assert set(views["one update"].attack) == {"analytic"}


def test_the_sum_of_few_devices_still_shows_their_images_less_exactly(views):
    sums, alone = views["sum"], views["one update"]
    assert sums.correlation.mean() > views["nothing"].correlation.mean() + 0.3
    assert (sums.correlation < alone.correlation).all()
    assert sums.psnr.mean() < alone.psnr.mean() - 10


def test_the_noisy_sum_shows_hardly_more_than_nothing(views):
    floor = views["nothing"].correlation.mean()
    assert views["noisy sum"].correlation.mean() < floor + 0.1
    assert views["noisy sum"].correlation.mean() < views["sum"].correlation.mean() - 0.1


def test_a_run_without_noise_has_no_noisy_views():
    audit = audit_inversion(MASKED, check(MASKED), replace(SETTINGS, steps=2), quiet=True)
    assert [view.name for view in audit.views] == ["one update", "sum", "nothing"]
    assert [view.devices for view in audit.views] == [1, 10, 0]
    assert audit.noise_multiplier == 0


def test_the_tapped_uploads_add_up_to_what_secure_grid_returns():
    devices = replace(JOB, clients=20, clients_per_round=5)
    model = build(JOB.model, (1, 8, 8), 10, 0)
    arrays = get_arrays(model)
    clear = _observe(devices, devices.plan, 5, arrays, signed=False)
    masked = _observe(devices, replace(devices.plan, secagg=Bonawitz()), 5, arrays, signed=False)
    assert len(clear.single) == 5
    assert masked.single == ()
    np.testing.assert_allclose(np.mean(clear.single, axis=0), masked.sum, atol=1e-5)
    np.testing.assert_array_equal(clear.sum, masked.sum)


def test_the_ratio_of_weight_to_bias_is_an_example_that_is_alone_in_its_unit():
    model = build(Logistic(), (1, 2, 3), 2, 0)
    x = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3) / 5
    slopes = np.array([0.5, -0.25])
    update = np.concatenate([np.outer(slopes, x.ravel()).ravel(), slopes])
    np.testing.assert_allclose(analytic(model, update, (1, 2, 3)), [x[0], x[0]], atol=1e-6)


def test_the_search_by_gradient_reads_a_convolutional_model():
    rng = np.random.default_rng(0)
    model = build(LeNet(), (1, 28, 28), 10, 0)
    image = np.zeros((1, 1, 28, 28), np.float32)
    image[0, 0, 8:20, 12:16] = 1
    before = Layout.of(get_arrays(model))
    start = before.flatten(get_arrays(model))
    train(model, image, np.array([3]), LocalTraining(learning_rate=0.01), rng)
    update = before.flatten(get_arrays(model)) - start
    steps = []
    fresh = build(LeNet(), (1, 28, 28), 10, 0)
    found = by_gradient(
        fresh, update, np.array([3]), (1, 28, 28), steps=150, seed=0,
        on_step=lambda: steps.append(1),
    )  # fmt: skip
    assert len(steps) == 150
    assert best_matches(image, {"gradient": found}).correlation[0] > 0.7
    assert len(analytic(fresh, update, (1, 28, 28))) == 0


def test_every_original_gets_its_best_match():
    rng = np.random.default_rng(0)
    originals = rng.random((3, 1, 4, 4)).astype(np.float32)
    found = best_matches(
        originals, {"analytic": 2 * originals[::-1] + 1, "gradient": rng.random((5, 1, 4, 4))}
    )
    np.testing.assert_allclose(found.correlation, 1, atol=1e-6)
    np.testing.assert_allclose(found.images, originals, atol=1e-5)
    assert found.attack == ("analytic",) * 3


@pytest.mark.parametrize(
    ("job", "settings", "message"),
    [
        (JOB, InversionSettings(cohort=1000, examples=2), "must be at most 1438"),
        (
            replace(JOB, clip=NoClip(), quantize=NoQuantize(), secagg=NoSecAgg()),
            SETTINGS,
            "quantize=none sends plain float32",
        ),
        (
            noisy(JOB, 2.0, quantize=Modular(8)),
            InversionSettings(cohort=1000),
            "raise quantize.bits",
        ),
    ],
    ids=["too many", "plain", "cohort"],
)
def test_what_cannot_be_read_is_refused(job, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        check_inversion(job, check(replace(job, clients=20, clients_per_round=20)), settings)


def test_inputs_that_are_no_images_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "table.npz"
    x, y = rng.random((60, 5)).astype(np.float32), np.arange(60) % 3
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    job = replace(JOB, data=NpzFile(path=str(path)))
    with pytest.raises(ConfigurationError, match=r"recovers images .* inputs \[5\]"):
        check_inversion(job, check(job), SETTINGS)
