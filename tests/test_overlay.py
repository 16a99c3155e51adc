"""The drawing of a mask and its clicks, down to the pixel."""

from dataclasses import dataclass

import numpy as np
import pytest

from hrsam.overlay import overlay

RNG = np.random.default_rng(0)


@dataclass
class Dot:
    x: float
    y: float
    positive: bool = True


def disc(height, width, radius) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    return (x - width // 2) ** 2 + (y - height // 2) ** 2 < radius**2


def test_overlay_tints_the_object_and_draws_its_edge():
    pixels, mask = np.full((600, 1024, 3), 100, np.uint8), disc(600, 1024, 60)
    before = pixels.copy()
    drawn = overlay(pixels, mask, colour=(200, 0, 100), opacity=0.5)
    np.testing.assert_array_equal(pixels, before)
    ray = drawn[300, 512:]  # from the centre; pixel 59 is the last of the object
    assert (ray[:58] == (150, 50, 100)).all()
    assert (ray[59:61] == (200, 0, 100)).all()  # two pixels of line on the edge
    assert (ray[[58, 61]].min(axis=1) > 190).all()  # a white rim on both sides
    assert (ray[62:] == 100).all()
    np.testing.assert_array_equal(overlay(pixels, np.zeros_like(mask)), pixels)


def test_overlay_bands_are_invisible(monkeypatch):
    pixels, mask = RNG.integers(0, 256, (400, 90, 3), dtype=np.uint8), disc(400, 90, 70)
    whole = overlay(pixels, mask)
    monkeypatch.setattr("hrsam.overlay._BAND", 1)
    np.testing.assert_array_equal(overlay(pixels, mask), whole)


def test_overlay_clicks():
    pixels, nothing = np.full((64, 96, 3), 128, np.uint8), np.zeros((64, 96), bool)
    drawn = overlay(pixels, nothing, [Dot(30, 20), Dot(70, 40, positive=False), Dot(-500, 900)]).astype(int)
    assert (drawn[20, 30] > 230).all()  # the sign is white
    assert drawn[18, 28, 1] > drawn[18, 28, 0] + 50  # green around the plus
    assert drawn[38, 70, 0] > drawn[38, 70, 1] + 50  # red above the minus, where the plus would be white
    np.testing.assert_array_equal(drawn[20, 25:36], drawn[20, 35:24:-1])  # centred on the pixel
    assert (drawn[:, 45:60] == 128).all()
    corner = overlay(pixels, nothing, [Dot(0, 0), Dot(95, 63)])
    assert (corner[0, 0] > 230).all()
    assert (corner[63, 95] > 230).all()


def test_overlay_refuses_misfits():
    pixels, mask = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), bool)
    for bad in ((pixels[..., 0], mask), (pixels / 255, mask), (pixels, mask.T), (pixels, mask.astype(np.uint8))):
        with pytest.raises(ValueError, match="give"):
            overlay(*bad)
    with pytest.raises(ValueError, match="opacity"):
        overlay(pixels, mask, opacity=45)
