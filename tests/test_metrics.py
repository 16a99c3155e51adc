"""Measures on tables and masks small enough to count by hand."""

import numpy as np
import pytest
import torch

from hrsam.metrics import boundary_iou, clicks_needed, failures, iou, mean_iou_after, noc, thin_part


def ious():
    """Reached (0.9) at click 1, at 20, never, at 3 by equality and lost again, and only just not."""
    table = np.full((5, 20), 0.5)
    table[0] = 0.95
    table[1, 19] = 0.97
    table[3, 2] = 0.9
    table[4] = np.nextafter(0.9, 0)
    return table


def test_iou():
    a = np.array([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]], dtype=bool)
    b = np.array([[[1, 0, 1], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]], dtype=bool)
    expected = [1 / 4, 1.0, 0.0]
    assert iou(a, b).tolist() == pytest.approx(expected)
    assert iou(torch.from_numpy(a), torch.from_numpy(b)).tolist() == pytest.approx(expected)
    assert float(iou(a[0], b[0])) == 1 / 4
    for masks in ((a, b.astype(int)), (a, b[0]), (torch.from_numpy(a), torch.from_numpy(b).float())):
        with pytest.raises(ValueError, match="bool and of one shape"):
            iou(*masks)


def test_boundary_iou_by_hand():
    a, b = np.zeros((30, 40), dtype=bool), np.zeros((30, 40), dtype=bool)  # diagonal 50, so the band is 1 wide
    a[5:15, 5:15] = True
    b[5:15, 5:16] = True
    # Rings of 36 and 38 pixels; shared: the left column, and all but the corners of top and bottom row: 10 + 9 + 9.
    assert boundary_iou(a, b) == pytest.approx(28 / (36 + 38 - 28))
    # Two wide: rings of 10² - 6² and 10·11 - 6·7; shared: two rows at top and bottom and two columns at the left
    # (10·4 + 2·6), and one column at the right inside these rows, where a's last two meet b's last two (6).
    assert boundary_iou(a, b, share=0.04) == pytest.approx(58 / (64 + 68 - 58))
    assert boundary_iou(a, a) == 1
    assert boundary_iou(a & ~a, b & ~b) == 1
    assert boundary_iou(a, a & ~a) == 0


def test_boundary_band_includes_the_picture_edge():
    full = np.ones((30, 40), dtype=bool)
    inner = full.copy()
    inner[0] = False
    shared = 28 * 2 + 40  # left and right column in rows 1 to 28, and the bottom row
    union = (2 * 40 + 2 * 28) + (2 * 40 + 2 * 27) - shared
    assert boundary_iou(full, inner) == pytest.approx(shared / union)
    tiny = np.eye(6, dtype=bool)
    assert boundary_iou(tiny, tiny[::-1]) == 0  # at least one pixel wide
    with pytest.raises(ValueError, match="bool arrays"):
        boundary_iou(full.astype(np.uint8), inner)


def test_noc_and_failures():
    table = ious()
    assert clicks_needed(table, 0.9).tolist() == [1, 20, 20, 3, 20]
    assert noc(table, 0.9) == pytest.approx((1 + 20 + 20 + 3 + 20) / 5)
    assert failures(table, 0.9) == {"never_reached": 2, "equals_max": 3}
    assert clicks_needed(table, 0.9, max_clicks=3).tolist() == [1, 3, 3, 3, 3]
    assert failures(table, 0.9, max_clicks=3) == {"never_reached": 3, "equals_max": 4}


def test_mean_iou_after():
    table = ious()
    assert mean_iou_after(table, 1) == pytest.approx((0.95 + 0.5 + 0.5 + 0.5 + 0.9) / 5)
    assert mean_iou_after(table, 3) == pytest.approx((0.95 + 0.5 + 0.5 + 0.9 + 0.9) / 5)
    assert mean_iou_after(table, 20) == pytest.approx((0.95 + 0.97 + 0.5 + 0.5 + 0.9) / 5)


def test_tables_are_checked():
    table = ious()
    with pytest.raises(ValueError, match=r"20 clicks.*\(5, 19\)"):
        noc(table[:, :19], 0.9)
    with pytest.raises(ValueError, match="at least one sample"):
        failures(table[:0], 0.9)
    with pytest.raises(ValueError, match="counted from 1"):
        mean_iou_after(table, 0)
    with pytest.raises(ValueError, match="21 clicks"):
        mean_iou_after(table, 21)
    table[3, 7] = np.nan
    with pytest.raises(ValueError, match="sample 3"):
        noc(table, 0.9)


def test_thin_part_is_what_an_opening_takes_away():
    mask = np.zeros((300, 400), bool)  # diagonal 500: a disc 5 wide
    mask[100:160, 100:160] = True
    mask[128:131, 160:300] = True  # a bar 3 wide
    thin = thin_part(mask)
    assert thin[128:131, 165:300].all()
    assert not thin[104:156, 104:156].any()
    assert thin.sum() <= 3 * 140 + 4 * 5
    wide = mask.copy()
    wide[100:160, 160:300] = True
    assert not thin_part(wide).any()  # corners alone are no thin part
    assert not thin_part(np.ones((50, 60), bool)).any()
    cut = np.zeros((300, 400), bool)
    cut[:, :3] = True  # its edge lies outside of the picture, it may go on there
    assert not thin_part(cut).any()
    with pytest.raises(ValueError, match="bool array"):
        thin_part(mask.astype(np.uint8))
