"""Packed order: starts, runs of equal images, boundaries, and what is refused."""

import pytest
import torch

from hrsam.layout import Layout, boundaries_on, token_images

# image 0 and 1: a 2x3 and a 1x2 grid, image 2: the same grids in the other order, image 3: one grid
PACKED = Layout(((2, 3), (1, 2), (2, 3), (1, 2), (1, 2), (2, 3), (4, 1)), (0, 0, 1, 1, 2, 2, 3))


def test_starts_and_lengths():
    assert PACKED.lengths == (6, 2, 6, 2, 2, 6, 4)
    assert PACKED.starts == (0, 6, 8, 14, 16, 18, 24, 28)
    assert PACKED.tokens == 28
    assert PACKED.num_images == 4
    assert PACKED.image_starts == (0, 8, 16, 24, 28)


def test_neighbours_with_equal_grids_form_a_run():
    pair, turned = ((2, 3), (1, 2)), ((1, 2), (2, 3))
    assert PACKED.runs(merge=True) == ((0, 2, pair), (16, 1, turned), (24, 1, ((4, 1),)))
    apart = Layout(((2, 2), (3, 3), (2, 2)), (0, 1, 2))
    assert apart.runs(merge=True) == ((0, 1, ((2, 2),)), (4, 1, ((3, 3),)), (13, 1, ((2, 2),)))
    assert [run[:2] for run in PACKED.runs(merge=False)] == [(0, 1), (8, 1), (16, 1), (24, 1)]


def test_boundaries_of_grids_and_of_images():
    cpu = torch.device("cpu")
    assert PACKED.boundaries(across=False) == PACKED.starts
    assert PACKED.boundaries(across=True) == PACKED.image_starts
    tensor = boundaries_on(PACKED, True, cpu)
    assert tensor.dtype == torch.int32
    assert tensor.tolist() == [0, 8, 16, 24, 28]
    assert boundaries_on(PACKED, True, cpu) is tensor


def test_token_images():
    images = token_images(PACKED, torch.device("cpu"))
    assert images.dtype == torch.int64
    assert images.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 4


def test_layouts_are_equal_by_value():
    again = Layout(tuple(PACKED.grids), tuple(PACKED.images))
    assert again == PACKED
    assert hash(again) == hash(PACKED)
    assert Layout(((2, 3), (1, 2)), (0, 1)) != Layout(((2, 3), (1, 2)), (0, 0))


@pytest.mark.parametrize(
    ("grids", "images", "message"),
    [
        ((), (), "0 grids and 0 image indices"),
        (((2, 2), (2, 2)), (0,), "2 grids and 1 image indices"),
        (((2, 0),), (0,), "token grid of 2x0"),
        (((-1, 2),), (0,), "token grid of -1x2"),
        (((2, 2),), (1,), "without gaps"),
        (((2, 2), (2, 2)), (0, 2), "without gaps"),
        (((2, 2), (2, 2), (2, 2)), (0, 1, 0), "without gaps"),
    ],
)
def test_broken_layouts_are_refused(grids, images, message):
    with pytest.raises(ValueError, match=message):
        Layout(grids, images)
