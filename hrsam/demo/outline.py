"""A mask as its outline: where it is crossed in each column, as steps from the column before.

A column of a mask is a list of runs (top, bottom), and so of crossings y₀ < y₁ < …, two a run.  From one column to the next
most crossings move by a few pixels, a run or a gap begins, or one ends.  That is what is written, so that a ragged mask of
4096 x 4096 takes a third of its PNG and a plain one a sixth.

The code is a zlib stream of whole numbers, seven bits a byte, the lowest first, with the highest bit for "more to come":

1. for each column, how many pairs of neighbouring crossings of the column before end;
2. for each column, how many pairs begin;
3. of each pair that ends: its place, counted in crossings of the column before, less that of the last one in this column;
4. of each pair that begins: its place in this column, less that of the last one; its first crossing less the one above it
   in this column; its second less the first, less one;
5. of each crossing that stays: how far it moves, 2d for d ≥ 0 and −2d − 1 for d < 0.

Before the first column there are none.  :func:`decode` is the definition; the page has the same in ``outline.js``.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hrsam.mask import Mask


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of a mask of ``height`` x ``width``: ``column``, ``top``, ``bottom`` (excluded), (n,) int64 each.

    Sorted by column and top; runs of one column do not touch.
    """

    height: int
    width: int
    column: np.ndarray
    top: np.ndarray
    bottom: np.ndarray


def runs_of(mask: Mask, box: tuple[int, int, int, int]) -> Runs:
    """The runs of ``mask`` in a box x0, y0, x1, y1 that holds all of the object."""
    x0, y0, x1, y1 = box
    begin, end = mask.starts[1:-1:2], mask.starts[2::2]
    begin, end = begin[end > begin], end[end > begin]
    first, last = begin // mask.height, (end - 1) // mask.height
    count = last - first + 1  # columns that it runs through
    run = np.repeat(np.arange(begin.size), count)
    column = np.arange(run.size) - np.repeat(np.cumsum(count) - count, count) + first[run]
    top = np.where(column == first[run], begin[run] % mask.height, 0)
    bottom = np.where(column == last[run], (end[run] - 1) % mask.height + 1, mask.height)
    apart = (column[1:] != column[:-1]) | (top[1:] > bottom[:-1])  # run lengths may hold gaps of no pixel
    start, stop = (np.insert(apart, at, True) if column.size else np.empty(0, bool) for at in (0, apart.size))
    return Runs(y1 - y0, x1 - x0, column[start] - x0, top[start] - y0, bottom[stop] - y0)


def encode(runs: Runs) -> bytes:
    """The code of a mask."""
    y = np.stack([runs.top, runs.bottom], axis=1).reshape(-1)  # crossings
    column = np.repeat(runs.column, 2)
    offset = np.searchsorted(column, np.arange(runs.width + 1))  # of a column's first crossing
    place = np.arange(y.size) - offset[column]
    begins, ends = _alone(runs, -1), _alone(runs, 1)
    born, dead = _both(begins), _both(ends)
    above = np.where(place > 0, y - np.concatenate([[0], y[:-1]]), y)
    first = np.flatnonzero(begins)
    gone = np.flatnonzero(ends & (column < runs.width - 1))  # after the last column nothing is written
    news = np.stack([_gaps(place[first], column[first]), above[first], y[first + 1] - y[first] - 1], axis=1)
    moves = y[~born] - y[~dead]
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    parts = (
        np.bincount(column[gone] + 1, minlength=runs.width),
        np.bincount(column[first], minlength=runs.width),
        _gaps(place[gone], column[gone]),
        news.reshape(-1),
        np.where(moves < 0, -2 * moves - 1, 2 * moves),
    )
    # each its own Huffman code
    packed = [packer.compress(_varints(part)) + packer.flush(zlib.Z_SYNC_FLUSH) for part in parts]
    return b"".join(packed) + packer.flush()


def _alone(runs: Runs, by: int) -> np.ndarray:
    """For each crossing whether the run or gap that it begins meets none of its kind ``by`` columns on (1 or −1).

    (2n,) bool.  Of a row of such neighbours every second one, so that no crossing belongs to two: the one between goes with
    what lies around it.  Without them both columns have the same number of crossings left.
    """
    high = runs.height + 1
    top, bottom = runs.column * high + runs.top, runs.column * high + runs.bottom
    size, move = top.size, by * high
    run = np.searchsorted(bottom, top + move, side="right") >= np.searchsorted(top, bottom + move, side="left")
    over = np.searchsorted(top, bottom + move, side="right") - 1  # the other column's run that a gap may lie in
    within = (over >= 0) & (runs.column[over] == runs.column + by)
    within[:-1] &= bottom[over[:-1]] >= top[1:] + move
    gap = within & np.concatenate([runs.column[1:] == runs.column[:-1], [False]])[:size]
    alone = np.stack([run, gap], axis=1).reshape(-1)
    number = np.arange(2 * size)
    since = number - np.maximum.accumulate(np.where(alone, -1, number)) if size else number
    return alone & (since % 2 == 1)


def _both(first: np.ndarray) -> np.ndarray:
    """Crossings of pairs, from the ``first`` of each."""
    both = first.copy()
    both[1:] |= first[:-1]
    return both


def _gaps(place: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Places less those of the last pair in the same column."""
    gaps = place.copy()
    same = column[1:] == column[:-1]
    gaps[1:][same] -= place[:-1][same]
    return gaps


def _varints(values: np.ndarray) -> bytes:
    sizes = np.ones(values.size, np.int64)
    for bits in range(7, 35, 7):
        sizes += values >= 1 << bits
    number = np.repeat(np.arange(values.size), sizes)
    place = np.arange(number.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    groups = (values[number] >> 7 * place & 127) | np.where(place < sizes[number] - 1, 128, 0)
    return groups.astype(np.uint8).tobytes()


def decode(code: bytes, height: int, width: int) -> np.ndarray:
    """The mask (height, width) bool of a code."""
    numbers = _numbers(zlib.decompress(code))
    ends = [next(numbers) for _ in range(width)]
    begins = [next(numbers) for _ in range(width)]
    ended = [[next(numbers) for _ in range(count)] for count in ends]
    begun = [[(next(numbers), next(numbers), next(numbers)) for _ in range(count)] for count in begins]
    mask = np.zeros((height, width), dtype=bool)
    crossings: list[int] = []
    for x in range(width):
        place, gone = 0, set()
        for gap in ended[x]:
            place += gap
            gone |= {place, place + 1}
        crossings = [y for i, y in enumerate(crossings) if i not in gone]
        for i in range(len(crossings)):
            number = next(numbers)
            crossings[i] += -(number + 1) // 2 if number % 2 else number // 2
        place = 0
        for gap, above, length in begun[x]:
            place += gap
            y = (crossings[place - 1] if place else 0) + above
            crossings[place:place] = [y, y + length + 1]
        for top, bottom in zip(crossings[::2], crossings[1::2]):
            mask[top:bottom, x] = True
    return mask


def _numbers(raw: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in raw:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0
