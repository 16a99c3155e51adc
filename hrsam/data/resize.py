"""Pictures and masks at the size they are trained at."""

from __future__ import annotations

import numpy as np


def resized(height: int, width: int, side: int, enlarge: bool) -> tuple[int, int]:
    """(h, w) with the long side ``side``, or as it is where that would enlarge and must not."""
    long = max(height, width)
    if long <= side and not enlarge:
        return height, width
    return max(1, int(side / long * height + 0.5)), max(1, int(side / long * width + 0.5))


def resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8, by averaging where it shrinks, else bilinearly."""
    import cv2

    if array.shape[:2] == size:
        return array
    shrinks = size[0] < array.shape[0] or size[1] < array.shape[1]
    return cv2.resize(array, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut at one half, or below where a thin object would be lost."""
    grey = resize(mask.astype(np.uint8) * 255, size)
    if grey.any():
        return grey > min(127, int(grey.max()) - 1)
    small, places = np.zeros(size, bool), np.nonzero(mask)  # less than a hundredth of a pixel is left of it
    small[tuple(at * now // before for at, now, before in zip(places, size, mask.shape))] = True
    return small
