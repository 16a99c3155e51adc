"""A mask as run lengths is the mask: areas, boxes, windows and bands against the plain array."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hrsam import mask as mask_module
from hrsam import rle
from hrsam.mask import Mask

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


@settings(max_examples=300, deadline=None)
@given(MASKS, st.data())
def test_a_mask_is_its_array(array, data):
    mask = Mask.of(array)
    rows, columns = np.nonzero(array)
    assert mask.area == array.sum()
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if array.any() else None
    assert mask.bbox == box
    assert mask.rle() == rle.encode(array)
    np.testing.assert_array_equal(Mask.from_rle(mask.rle()).starts, mask.starts)
    np.testing.assert_array_equal(mask.array(), array)
    height, width = array.shape
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    step = data.draw(st.integers(1, 5))
    window = mask.window(x0, y0, x1, y1, step)
    assert window.dtype == bool
    np.testing.assert_array_equal(window, array[y0:y1:step, x0:x1:step])


@settings(max_examples=200, deadline=None)
@given(MASKS, st.data())
def test_bands_may_leave_out_background(array, data):
    bands, top = [], 0
    while top < len(array):
        rows = array[top : top + data.draw(st.integers(1, 4))]
        if rows.any() or data.draw(st.booleans()):
            bands.append((top, rows))
        top += len(rows)
    np.testing.assert_array_equal(Mask.scan(*array.shape, bands).starts, Mask.of(array).starts)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_runs_of_no_length_are_allowed(counts):
    """COCO's counts may hold zeros anywhere."""
    total = sum(counts)
    if total == 0:
        return
    value = {"size": [1, total], "counts": counts}
    mask, array = Mask.from_rle(value), rle.decode(value)
    np.testing.assert_array_equal(mask.array(), array)
    assert mask.area == array.sum()
    assert mask.bbox == Mask.of(array).bbox


def test_nothing_and_everything():
    empty = Mask.empty(3, 4)
    assert (empty.area, empty.bbox) == (0, None)
    np.testing.assert_array_equal(empty.starts, Mask.of(np.zeros((3, 4), bool)).starts)
    full = Mask.of(np.ones((3, 4), bool))
    assert (full.area, full.bbox) == (12, (0, 0, 4, 3))


@pytest.mark.parametrize(
    "window", [(0, 0, 0, 3), (0, 0, 5, 3), (-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 4, 4), (2, 2, 1, 3), (0, 0, 4, 3, 0)]
)
def test_windows_lie_in_the_picture(window):
    with pytest.raises(ValueError, match="must lie in the picture of 4x3"):
        Mask.empty(3, 4).window(*window)


def test_a_mask_cannot_be_changed():
    mask = Mask.of(np.eye(4, dtype=bool))
    with pytest.raises(ValueError, match="read-only"):
        mask.starts[1] = 0
    mask.array()[:] = True  # a new one each time
    assert mask.area == 4


def test_a_mask_of_a_huge_picture_is_small():
    bands = ((top, np.ones((10, 30_000), bool)) for top in range(15_000, 15_100, 10))
    mask = Mask.scan(30_000, 30_000, bands)
    assert (mask.area, mask.bbox) == (3_000_000, (0, 15_000, 30_000, 15_100))
    assert mask.window(7, 14_990, 69, 15_110, 60).tolist() == [[False, False], [True, True]]
    assert Mask.from_rle(mask.rle()).area == 3_000_000


def test_a_sample_is_thinned_only_when_the_whole_is_too_much(monkeypatch):
    array = np.random.default_rng(0).random((40, 30)) < 0.5
    mask = Mask.of(array)
    np.testing.assert_array_equal(mask.sample(8), array)
    monkeypatch.setattr(mask_module, "MAX_ARRAY", 1000)
    np.testing.assert_array_equal(mask.sample(8), array[::5, ::5])
    np.testing.assert_array_equal(mask.sample(100), array)
