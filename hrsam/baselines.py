"""Click segmentation that needs no weights, so that a model's number has a neighbour.

Each has ``start(pixels)``, (H, W, 3) uint8 RGB, and ``click(clicks)``, all clicks so far in pixels of the picture -> mask
(H, W) bool, like a model in :mod:`hrsam.evaluation`; it works on a picture shrunk to ``side``.  The same clicks give the
same mask, whatever was played before.  Clicks before a picture or no clicks are a ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hrsam.clicks import Click


class _Shrunk:
    """A picture at working size, and discs at clicks."""

    def __init__(self, pixels: np.ndarray, side: int):
        import cv2

        self.size = pixels.shape[:2]
        factor = min(1.0, side / max(self.size))
        height, width = (max(1, round(length * factor)) for length in self.size)
        self.pixels = np.ascontiguousarray(pixels)
        if (height, width) != self.size:
            self.pixels = cv2.resize(self.pixels, (width, height), interpolation=cv2.INTER_AREA)
        self.side = max(height, width)

    def disc(self, click: Click, share: float) -> np.ndarray:
        """(h, w) bool: pixels within ``share`` of the long side round a click, at least the clicked one."""
        height, width = self.pixels.shape[:2]
        y, x = np.ogrid[:height, :width]
        row = np.clip((click.y + 0.5) * height / self.size[0] - 0.5, 0, height - 1)
        column = np.clip((click.x + 0.5) * width / self.size[1] - 0.5, 0, width - 1)
        radius = max(share * self.side, 0.75)
        return (y - row) ** 2 + (x - column) ** 2 <= radius**2

    def enlarged(self, mask: np.ndarray) -> np.ndarray:
        """(h, w) bool -> (H, W) bool: bilinear, cut at one half."""
        import cv2

        if mask.shape == self.size:
            return mask.copy()
        grey = cv2.resize(mask.astype(np.float32), self.size[::-1], interpolation=cv2.INTER_LINEAR)
        return grey > 0.5


class GrabCut:
    """GrabCut (Rother et al., SIGGRAPH 2004) as OpenCV has it, steered by clicks.

    Discs of 1 % of the long side are certain at every click.  At the first click what lies within 20 % round it is probably
    object, all else probably not; later the mask so far is probable, with a disc of 6 % round the newest click changed to
    what that click says.  Three iterations a click.  While one of the two kinds is missing the mask is the discs.  Grey
    levels are moved by at most one, always the same way: on areas of exactly one colour OpenCV's graph cut can take minutes.
    """

    CERTAIN, CHANGED, FIRST, ITERATIONS = 0.01, 0.06, 0.20, 3

    def __init__(self, side: int = 512):
        self.side = side
        self._picture: _Shrunk | None = None
        self._mask: np.ndarray | None = None
        self._clicks: tuple[Click, ...] = ()

    def start(self, pixels: np.ndarray) -> None:
        picture = _Shrunk(pixels, self.side)
        noise = np.random.default_rng(0).integers(-1, 2, picture.pixels.shape)
        picture.pixels = (picture.pixels + noise).clip(0, 255).astype(np.uint8)
        self._picture, self._mask, self._clicks = picture, None, ()

    def click(self, clicks: Sequence[Click]) -> np.ndarray:
        if self._picture is None:
            raise ValueError("no picture is set; call start first")
        clicks = tuple(clicks)
        if not clicks:
            raise ValueError("there are no clicks; give at least one")
        if clicks[: len(self._clicks)] != self._clicks:  # taken back: play again
            self._mask, self._clicks = None, ()
        for count in range(len(self._clicks) + 1, len(clicks) + 1):
            self._mask, self._clicks = self._cut(self._picture, clicks[:count]), clicks[:count]
        assert self._mask is not None
        return self._picture.enlarged(self._mask)

    def _cut(self, picture: _Shrunk, clicks: Sequence[Click]) -> np.ndarray:
        import cv2

        newest = clicks[-1]
        share = self.FIRST if self._mask is None else self.CHANGED
        probable = np.zeros(picture.pixels.shape[:2], bool) if self._mask is None else self._mask.copy()
        probable[picture.disc(newest, share)] = newest.positive
        labels = np.where(probable, np.uint8(cv2.GC_PR_FGD), np.uint8(cv2.GC_PR_BGD))
        for click in clicks:
            labels[picture.disc(click, self.CERTAIN)] = cv2.GC_FGD if click.positive else cv2.GC_BGD
        object_now = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        if object_now.all() or not object_now.any():
            return object_now
        cv2.setRNGSeed(0)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        bgr = np.ascontiguousarray(picture.pixels[..., ::-1])
        cv2.grabCut(bgr, labels, None, *models, self.ITERATIONS, cv2.GC_INIT_WITH_MASK)  # type: ignore[call-overload]
        return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


class RandomWalker:
    """Random walks (Grady, PAMI 2006) from scikit-image, on colour, β = 130.

    Seeds are discs of 1 % of the long side at the clicks.  Without a negative click the picture's edge is background.
    """

    CERTAIN, BETA = 0.01, 130

    def __init__(self, side: int = 256):
        try:
            from skimage.segmentation import random_walker
        except ImportError:
            raise ValueError(
                "the method random_walker needs scikit-image; run: pip install 'hrsam[baselines]'"
            ) from None
        self.side = side
        self._walk: Callable[..., Any] = random_walker
        self._picture: _Shrunk | None = None

    def start(self, pixels: np.ndarray) -> None:
        self._picture = _Shrunk(pixels, self.side)

    def click(self, clicks: Sequence[Click]) -> np.ndarray:
        import warnings

        picture = self._picture
        if picture is None:
            raise ValueError("no picture is set; call start first")
        if not clicks:
            raise ValueError("there are no clicks; give at least one")
        seeds = np.zeros(picture.pixels.shape[:2], np.int32)
        if all(click.positive for click in clicks):
            seeds[[0, -1]] = 2
            seeds[:, [0, -1]] = 2
        for click in clicks:
            seeds[picture.disc(click, self.CERTAIN)] = 1 if click.positive else 2
        if not (seeds == 1).any() or not (seeds == 2).any() or (seeds > 0).all():
            return picture.enlarged(seeds == 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="skimage")
            labels = self._walk(
                picture.pixels.astype(np.float64) / 255, seeds, beta=self.BETA, mode="bf", channel_axis=-1
            )
        return picture.enlarged(labels == 1)


BASELINES: dict[str, type[GrabCut] | type[RandomWalker]] = {"grabcut": GrabCut, "random_walker": RandomWalker}
"""Name on the command line -> class; ``side`` is its only argument."""


def build_baseline(name: str, side: int | None = None) -> GrabCut | RandomWalker:
    """A baseline by name, at its own working size or ``side``; ``ValueError`` that lists the known ones."""
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}; choose one of {', '.join(BASELINES)}")
    return BASELINES[name]() if side is None else BASELINES[name](side)
