"""A mask of any size, kept as run lengths: what it takes grows with the outline and not with the picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from hrsam import rle

MAX_PIXELS = 900_000_000  # of a picture: 30,000 x 30,000
MAX_ARRAY = 400_000_000  # pixels of which an array is made without asking
_BAND = 1 << 22  # pixels looked at together


class Mask:
    """An object's pixels in a picture of ``height`` x ``width``; immutable, and an array only where one is asked for.

    ``starts``: where its runs begin and the number of pixels, as in :func:`hrsam.rle.starts`.
    """

    def __init__(self, height: int, width: int, starts: np.ndarray):
        starts = np.asarray(starts, dtype=np.int64)
        assert starts[0] == 0
        assert starts[-1] == height * width
        starts.setflags(write=False)
        self.height, self.width = height, width
        self.starts = starts

    @classmethod
    def empty(cls, height: int, width: int) -> Mask:
        return cls(height, width, np.array([0, height * width]))

    @classmethod
    def of(cls, array: np.ndarray) -> Mask:
        """The mask that ``array`` (H, W) bool is."""
        height, width = array.shape
        rows = max(1, _BAND // width)
        return cls.scan(height, width, ((top, array[top : top + rows]) for top in range(0, height, rows)))

    @classmethod
    def scan(cls, height: int, width: int, bands: Iterable[tuple[int, np.ndarray]]) -> Mask:
        """A mask from bands of its rows as :class:`Scan` takes them."""
        scan = Scan(height, width)
        for top, rows in bands:
            scan.add(top, rows)
        return scan.mask()

    @classmethod
    def from_rle(cls, value: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS) -> Mask:
        """From COCO run lengths; ``ValueError`` as in :func:`hrsam.rle.decode`."""
        starts = rle.to_starts(value, max_pixels=max_pixels)
        return cls(value["size"][0], value["size"][1], starts)

    def rle(self) -> dict[str, Any]:
        """COCO's compressed run lengths, ``{"size": [H, W], "counts": str}``."""
        return rle.from_starts(self.starts, self.height)

    @cached_property
    def area(self) -> int:
        """Number of pixels."""
        return int(np.diff(self.starts)[1::2].sum())

    @cached_property
    def bbox(self) -> tuple[int, int, int, int] | None:
        """x0, y0, x1, y1 of the smallest window that holds the object, the far side excluded; None when it is empty."""
        begin, end = self.starts[1:-1:2], self.starts[2::2]
        begin, end = begin[end > begin], end[end > begin]
        if not begin.size:
            return None
        left, right = int(begin[0]) // self.height, (int(end[-1]) - 1) // self.height
        over = (
            begin // self.height != (end - 1) // self.height
        )  # runs on from one column's bottom to the next one's top
        top = 0 if over.any() else int((begin % self.height).min())
        bottom = self.height if over.any() else int(((end - 1) % self.height).max()) + 1
        return left, top, right + 1, bottom

    def window(self, x0: int, y0: int, x1: int, y1: int, step: int = 1) -> np.ndarray:
        """Pixels (y, x) of rows y0, y0 + step, … below y1 and columns likewise: a new bool array.

        Raises ``ValueError`` for a window that is empty or leaves the picture, or a step below 1.
        """
        if not (0 <= x0 < x1 <= self.width and 0 <= y0 < y1 <= self.height and step >= 1):
            raise ValueError(
                f"got the window {x0}, {y0}, {x1}, {y1} with step {step}; it must lie in the picture of "
                f"{self.width}x{self.height} pixels, hold one, and have a step of at least 1"
            )
        columns = np.arange(x0, x1, step, dtype=np.int64)
        out = np.zeros((len(range(y0, y1, step)), len(columns)), dtype=np.uint8)
        begin = columns * self.height + y0
        before = np.searchsorted(self.starts, begin, side="right")
        out[0] = (before - 1) % 2  # a value, below it: whether it changes there
        after = np.searchsorted(self.starts, begin + (y1 - y0), side="left")
        count = after - before
        inside = np.arange(count.sum()) + np.repeat(before - np.cumsum(count) + count, count)
        column = np.repeat(np.arange(len(columns)), count)
        row = -((begin[column] - self.starts[inside]) // step)  # the first row at or below the change
        seen = row < len(out)
        np.add.at(out.reshape(-1), row[seen] * len(columns) + column[seen], 1)
        out &= 1
        for upper, lower in pairwise(out):
            lower ^= upper
        return out.view(bool)

    def array(self) -> np.ndarray:
        """The whole as (H, W) bool."""
        return self.window(0, 0, self.width, self.height)

    def sample(self, side: int) -> np.ndarray:
        """Every s-th row and column of it, bool: all of a mask of up to ``MAX_ARRAY`` pixels, else about ``side``."""
        step = 1 if self.height * self.width <= MAX_ARRAY else max(1, max(self.height, self.width) // side)
        return self.window(0, 0, self.width, self.height, step)


class Scan:
    """Makes a mask of ``height`` x ``width`` out of bands of its rows, top down.  Rows left out are background."""

    def __init__(self, height: int, width: int):
        self._height, self._width = height, width
        self._background = np.zeros((1, width), dtype=bool)
        self._first = self._last = self._background
        self._end = 0  # ``_last`` is the row before it
        self._steps = [np.empty(0, np.int64)]

    def add(self, top: int, rows: np.ndarray) -> None:
        """The next band: number of its first row, (n, width) bool."""
        if top > self._end and self._last.any():
            self._step(self._last, self._background, self._end - 1)
            self._last = self._background
        self._first = rows[:1].copy() if top == 0 else self._first
        if top > 0:
            self._step(self._background if top > self._end else self._last, rows[:1], top - 1)
        self._steps.append(rle.steps_down(rows, top, self._height))
        self._last, self._end = rows[-1:].copy(), top + len(rows)

    def mask(self) -> Mask:
        """The mask, when all bands were added."""
        if self._end < self._height:
            if self._last.any():
                self._step(self._last, self._background, self._end - 1)
            self._last = self._background
        starts = rle.starts(np.concatenate(self._steps), self._first[0], self._last[0], self._height)
        return Mask(self._height, self._width, starts)

    def _step(self, upper: np.ndarray, lower: np.ndarray, top: int) -> None:
        self._steps.append(rle.steps_down(np.concatenate([upper, lower]), top, self._height))
