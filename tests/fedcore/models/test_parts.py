"""Parts of models: fewer channels, taken from a chain and put back where they were."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import ConfigurationError
from fedcore.models import Cnn1d, LeNet, Mlp, build, hidden_widths, widths_of
from fedcore.models.parts import channels_of, part_of
from fedcore.training import get_arrays, set_arrays
from fedcore.vectors import Layout

MODELS = [
    (Mlp(hidden=(12, 7)), (5,)),
    (LeNet(), (1, 28, 28)),
    (Cnn1d(channels=6, hidden=8), (2, 16)),
]
STRUCTURES = ["nested", "rolling"]
shares = st.floats(1e-6, 1.0)


@given(width=st.integers(1, 200), share=shares, turn=st.integers(0, 10**6))
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_part_has_its_share_of_the_channels_each_once_and_in_order(structure, width, share, turn):
    kept = channels_of(width, share, structure, turn)
    assert len(kept) == max(1, np.ceil(share * width - 1e-9))
    assert (np.diff(kept) > 0).all()
    assert kept[0] >= 0
    assert kept[-1] < width


@given(width=st.integers(1, 60), small=shares, large=shares, turn=st.integers(0, 100))
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_smaller_part_lies_within_a_larger_one(structure, width, small, large, turn):
    small, large = sorted((small, large))
    inner, outer = (channels_of(width, share, structure, turn) for share in (small, large))
    assert set(inner) <= set(outer)


@given(width=st.integers(1, 60), share=shares, first=st.integers(0, 100))
def test_a_rolling_part_trains_every_channel_equally_often(width, share, first):
    seen = np.zeros(width, int)
    for turn in range(first, first + width):
        seen[channels_of(width, share, "rolling", turn)] += 1
    assert len(set(seen)) == 1


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("config", "shape"), MODELS, ids=lambda value: getattr(value, "kind", ""))
def test_a_part_is_a_model_of_the_same_kind_and_goes_back_where_it_was(structure, config, shape):
    arrays = get_arrays(build(config, shape, 3, 0))
    part = part_of(Layout.of(arrays), 0.5, structure, 3)
    small = part.take(arrays)
    widths = widths_of(small)
    assert widths == tuple(-(-width // 2) for width in hidden_widths(config))
    set_arrays(build(config, shape, 3, 0, widths), small)  # refuses what does not fit

    same = part.put(arrays, small)
    assert all((same[name] == array).all() for name, array in arrays.items())
    changed = part.put(arrays, {name: array + 1 for name, array in small.items()})
    layout = Layout.of(arrays)
    moved = layout.flatten(changed) != layout.flatten(arrays)
    assert (moved == part.mask()).all()
    assert 0 < part.mask().sum() < layout.dim


@pytest.mark.parametrize(("config", "shape"), MODELS, ids=lambda value: getattr(value, "kind", ""))
def test_all_of_a_model_is_a_part_of_share_one(config, shape):
    arrays = get_arrays(build(config, shape, 3, 0))
    assert part_of(Layout.of(arrays), 1.0, "rolling", 5).mask().all()


def test_a_part_computes_what_the_model_does_whose_other_channels_are_silent():
    torch = pytest.importorskip("torch")
    model = build(LeNet(), (1, 28, 28), 4, 0)
    arrays = get_arrays(model)
    layout = Layout.of(arrays)
    part = part_of(layout, 0.5, "rolling", 2)
    small = build(LeNet(), (1, 28, 28), 4, 0, widths_of(part.take(arrays)))
    set_arrays(small, part.take(arrays))
    silent = layout.unflatten(np.where(part.mask(), layout.flatten(arrays), np.float32(0)))
    set_arrays(model, silent)
    x = torch.randn(5, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arrays",
    [
        {"0.weight": np.zeros((4, 3)), "1.weight": np.zeros((2, 5))},
        {"0.weight": np.zeros((4, 3)), "0.running_mean": np.zeros(4)},
        {"scale": np.zeros(3)},
    ],
)
def test_what_is_no_chain_has_no_parts(arrays):
    with pytest.raises(ConfigurationError, match="train the whole model on every device"):
        part_of(Layout.of(arrays), 0.5, "nested", 0)
