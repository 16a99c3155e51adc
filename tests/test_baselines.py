"""Click segmentation without weights."""

import builtins

import numpy as np
import pytest

from hrsam.baselines import BASELINES, build_baseline
from hrsam.clicks import Click, next_click
from hrsam.metrics import iou
from tests.builders import photo
from tests.processes import exit_code


def disc_on_noise(height=120, width=160):
    y, x = np.mgrid[:height, :width]
    truth = (y - 60) ** 2 + (x - 80) ** 2 < 35**2
    noise = np.random.default_rng(0).normal(70, 20, (height, width, 3))
    return (noise + 110 * truth[..., None]).clip(0, 255).astype(np.uint8), truth


@pytest.fixture(params=sorted(BASELINES))
def name(request):
    if request.param == "random_walker":
        pytest.importorskip("skimage")
    return request.param


def test_a_bright_disc_is_found_in_three_clicks(name):
    pixels, truth = disc_on_noise()
    before = pixels.copy()
    baseline = build_baseline(name)
    baseline.start(pixels)
    mask, clicks = np.zeros_like(truth), []
    for _ in range(3):
        clicks.append(next_click(truth, mask, clicks) or Click(80, 60))
        mask = baseline.click(clicks)
        assert mask.dtype == bool
        assert mask.shape == truth.shape
    assert iou(mask, truth) > 0.9
    assert np.array_equal(pixels, before)


def test_clicks_are_obeyed_where_they_are(name):
    pixels, _ = disc_on_noise()
    baseline = build_baseline(name, 100)  # shrunk
    baseline.start(pixels)
    mask = baseline.click([Click(80, 60), Click(100, 60, False)])
    assert mask[60, 80]
    assert not mask[60, 100]


def test_the_same_clicks_give_the_same_mask_whatever_came_before(name):
    pixels, _ = disc_on_noise()
    clicks = [Click(80, 60), Click(90, 40), Click(20, 20, False)]

    def played(baseline):
        baseline.start(pixels)
        return [baseline.click(clicks[: k + 1]) for k in range(3)]

    fresh, used = build_baseline(name), build_baseline(name)
    used.start(photo(50, 70))
    used.click([Click(3, 3)])
    first, second, third = played(fresh), played(used), played(fresh)
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(first, second, third))
    assert np.array_equal(fresh.click(clicks), third[-1])  # asked again, nothing goes on


@pytest.mark.parametrize("shape", [(1, 1), (7, 1500), (3000, 7), (2, 2)])
def test_odd_pictures(name, shape):
    baseline = build_baseline(name)
    baseline.start(photo(*shape))
    for click in (Click(0, 0), Click(shape[1] - 1, shape[0] - 1, False)):
        assert baseline.click([click]).shape == shape
    assert baseline.click([Click(0, 0), Click(shape[1] - 1, shape[0] - 1)]).shape == shape


def test_a_picture_that_is_all_object(name):
    baseline = build_baseline(name)
    baseline.start(photo(8, 8))
    assert baseline.click([Click(x, y) for y in range(8) for x in range(8)]).all()


def test_no_picture_and_no_clicks(name):
    baseline = build_baseline(name)
    with pytest.raises(ValueError, match="call start first"):
        baseline.click([Click(1, 1)])
    baseline.start(photo(20, 30))
    with pytest.raises(ValueError, match="there are no clicks"):
        baseline.click([])


def test_a_negative_first_click_gives_no_object(name):
    baseline = build_baseline(name)
    baseline.start(photo(40, 60))
    assert not baseline.click([Click(30, 20, False)])[20, 30]


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ValueError, match="no baseline 'magic'; choose one of grabcut, random_walker"):
        build_baseline("magic")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("skimage"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'hrsam\[baselines\]'"):
        build_baseline("random_walker")


def test_clicks_at_once_are_clicks_one_by_one():
    pixels, _ = disc_on_noise()
    clicks = [Click(80, 60), Click(90, 40), Click(110, 60, False)]
    one_by_one, at_once = build_baseline("grabcut"), build_baseline("grabcut")
    for baseline in (one_by_one, at_once):
        baseline.start(pixels)
    masks = [one_by_one.click(clicks[: k + 1]) for k in range(3)]
    assert np.array_equal(at_once.click(clicks), masks[-1])
    assert np.array_equal(at_once.click(clicks[:1]), masks[0])  # the others taken back


def click_on_one_colour(x, y, dot):
    pixels = np.full((300, 400, 3), 255, np.uint8)
    pixels[100, 100] = 255 - 255 * dot
    baseline = build_baseline("grabcut")
    baseline.start(pixels)
    assert baseline.click([Click(x, y)]).sum() > 0


@pytest.mark.parametrize("case", [(0, 0, 0), (200, 150, 1)])
def test_areas_of_one_colour_do_not_stall(case):
    """In a process of its own, since OpenCV cannot be interrupted."""
    assert exit_code(click_on_one_colour, *case, seconds=60) == 0
