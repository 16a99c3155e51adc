"""A mask and its clicks drawn over the picture, for people to look at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

_BAND = 1 << 22  # pixels drawn at a time, so that temporary arrays stay small


class ClickLike(Protocol):
    """x, y in pixels of the picture (x to the right, whole numbers are pixel centres), and whether it adds."""

    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...
    @property
    def positive(self) -> bool: ...


def overlay(
    pixels: np.ndarray,
    mask: np.ndarray,
    clicks: Iterable[ClickLike] = (),
    *,
    colour: tuple[int, int, int] = (30, 144, 255),
    opacity: float = 0.45,
) -> np.ndarray:
    """Draw a mask and its clicks over a picture: (H, W, 3) uint8, a new array.

    ``pixels`` (H, W, 3) uint8 RGB, ``mask`` (H, W) bool, ``clicks`` with x, y in pixels of the picture.  The object is
    tinted with ``colour`` (RGB) at ``opacity`` in [0, 1] and outlined in it with a white rim; positive clicks are green
    dots with a plus, negative ones red with a minus.  Line and dots grow with the picture; all edges are anti-aliased.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"got pixels {pixels.dtype} {pixels.shape}; give (H, W, 3) uint8 RGB")
    if mask.dtype != bool or mask.shape != pixels.shape[:2]:
        raise ValueError(f"got a mask {mask.dtype} {mask.shape}; give bool {pixels.shape[:2]} for this picture")
    if not 0 <= opacity <= 1:
        raise ValueError(f"got opacity {opacity}; give a number from 0 to 1")
    out = pixels.copy()
    unit = max(mask.shape) / 1024
    line = max(1.5, 2.0 * unit)
    rim = max(0.5, 1.0 * unit)
    halo = int(line + rim) + 8  # nothing further than this from an edge changes, so bands see all they need
    rows = max(64, _BAND // mask.shape[1])
    for top in range(0, mask.shape[0], rows):
        start, stop = max(0, top - halo), min(top + rows + halo, mask.shape[0])
        if not mask[start:stop].any():
            continue
        depth = _depth(mask[start:stop])[top - start : top - start + rows]
        band = out[top : top + rows]
        _blend(band, colour, opacity * np.clip(depth + 0.5, 0, 1))
        _blend(band, (255, 255, 255), 0.8 * np.clip(line / 2 + rim + 0.5 - np.abs(depth), 0, 1))
        _blend(band, colour, np.clip(line / 2 + 0.5 - np.abs(depth), 0, 1))
    for click in clicks:
        _dot(out, click, radius=max(4.0, 8.0 * unit))
    return out


def _depth(mask: np.ndarray) -> np.ndarray:
    """Signed distance to the mask's edge in pixels, positive inside, without stair steps: (h, w) float32."""
    import cv2

    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    outside = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    depth = np.where(mask, inside - 0.5, 0.5 - outside)
    return cv2.GaussianBlur(np.clip(depth, -1e4, 1e4), (5, 5), 1.0)


def _blend(pixels: np.ndarray, colour: tuple[int, int, int], alpha: np.ndarray) -> None:
    """Mix ``colour`` into ``pixels`` (h, w, 3) in place, by ``alpha`` (h, w) in [0, 1]."""
    rows, columns = np.nonzero(alpha)
    old = pixels[rows, columns].astype(np.float32)
    new = old + (np.asarray(colour, np.float32) - old) * alpha[rows, columns, None]
    pixels[rows, columns] = np.rint(new).astype(np.uint8)


def _dot(pixels: np.ndarray, click: ClickLike, radius: float) -> None:
    reach = radius + 2
    left, top = max(0, int(click.x - reach)), max(0, int(click.y - reach))
    window = pixels[top : max(0, int(click.y + reach) + 2), left : max(0, int(click.x + reach) + 2)]
    y, x = np.ogrid[top : top + window.shape[0], left : left + window.shape[1]]
    x, y = np.abs(x - click.x), np.abs(y - click.y)
    distance = np.hypot(x, y)

    def bar(along: np.ndarray, across: np.ndarray) -> np.ndarray:
        outside = np.maximum(along - 0.42 * radius, across - 0.11 * radius)
        return np.clip(0.5 - outside, 0, 1)

    sign = np.maximum(bar(x, y), bar(y, x)) if click.positive else bar(x, y)
    _blend(window, (0, 0, 0), 0.35 * np.clip(radius + 1.5 - distance, 0, 1))
    _blend(window, (255, 255, 255), np.clip(radius + 0.5 - distance, 0, 1))
    _blend(window, (22, 163, 74) if click.positive else (220, 38, 38), np.clip(0.8 * radius + 0.5 - distance, 0, 1))
    _blend(window, (255, 255, 255), sign)
