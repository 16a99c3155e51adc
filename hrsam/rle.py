"""COCO run-length encoding of masks, in numpy.

A mask is read column by column; ``counts`` are the lengths of its runs, the first one of background (it may be 0).
The compressed form stores from the fourth count on the difference to the count two places before, each number as
groups of five bits, lowest first, with bit 5 for "more to come", plus 48 to be printable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_PIXELS = 400_000_000
"""Largest mask decoded by default, in pixels (one byte each, about two while decoding)."""

_MAX_GROUPS = 7  # 35 bits: what COCO's own 32-bit counts can need


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (H, W) bool as ``{"size": [H, W], "counts": str}``, COCO's compressed form.

    Raises ``ValueError`` for another dtype or shape, or a mask without pixels.
    """
    if mask.dtype != bool or mask.ndim != 2 or not mask.size:
        raise ValueError(f"got a mask {mask.dtype} {mask.shape}; give (H, W) bool with at least one pixel")
    height = len(mask)
    return from_starts(starts(steps_down(mask, 0, height), mask[0], mask[-1], height), height)


def steps_down(rows: np.ndarray, top: int, height: int) -> np.ndarray:
    """Where the value changes down the columns of some rows (n, W) bool, ``top`` the first, of a mask ``height`` high.

    Returns positions in the mask read column by column, int64, not sorted.
    """
    # Found row by row (the mask's order in memory), to be sorted by column later: much faster than turning the mask.
    row, column = np.divmod(np.flatnonzero(rows[1:] != rows[:-1]), rows.shape[1])
    return column * height + (row + top + 1)


def starts(steps: np.ndarray, first: np.ndarray, last: np.ndarray, height: int) -> np.ndarray:
    """Where the runs of a mask begin, and its number of pixels at the end, from :func:`steps_down` of all its rows.

    ``first`` and ``last`` (W,) bool are its rows 0 and ``height`` − 1.  Even runs are background, the first may be empty.
    """
    tops = (np.flatnonzero(first[1:] != last[:-1]) + 1) * height
    begin = [0, 0] if first[0] else [0]
    return np.concatenate([begin, np.sort(np.concatenate([steps, tops])), [height * len(first)]])


def from_starts(starts: np.ndarray, height: int) -> dict[str, Any]:
    """What :func:`encode` gives for the mask whose runs begin at ``starts``."""
    return {"size": [height, int(starts[-1]) // height], "counts": _compress(np.diff(starts))}


def to_starts(rle: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Where the runs of an RLE begin, and its number of pixels; checks and errors are those of :func:`decode`."""
    height, width = _size(rle, max_pixels)
    counts = _counts(rle, height * width)
    total = int(counts.sum())
    if total != height * width:
        raise ValueError(
            f"RLE counts add up to {total}, but {height}x{width} pixels need {height * width}; it is damaged"
        )
    return np.concatenate([[0], np.cumsum(counts)])


def decode(rle: Mapping[str, Any], *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode COCO's ``{"size": [H, W], "counts": …}`` to a mask (H, W) bool.

    ``counts`` may be compressed (``str`` or ``bytes``) or a list of integers.  Nothing of the mask's size is allocated
    before everything has been checked.  Raises ``ValueError`` for missing keys, sizes below 1 or over ``max_pixels``,
    characters that do not belong, cut-off or negative counts, and counts that do not add up to H·W.
    """
    counts = np.diff(to_starts(rle, max_pixels=max_pixels))
    height, width = rle["size"]
    columns = np.repeat(np.arange(counts.size) % 2 == 1, counts).reshape(width, height)
    mask = np.empty((height, width), bool)
    for left in range(0, width, 32):  # in strips that fit the cache: five times as fast as one transposed copy
        mask[:, left : left + 32] = columns[left : left + 32].T
    return mask


def _size(rle: Mapping[str, Any], max_pixels: int) -> tuple[int, int]:
    if not isinstance(rle, Mapping) or "size" not in rle or "counts" not in rle:
        raise ValueError('an RLE is a mapping with the keys "size" ([height, width]) and "counts"')
    size = rle["size"]
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"got RLE size {size!r:.80}; give [height, width], whole numbers of at least 1")
    if size[0] * size[1] > max_pixels:
        raise ValueError(f"got an RLE of {size[0]}x{size[1]} pixels, the limit is {max_pixels}; raise max_pixels")
    return size[0], size[1]


def _counts(rle: Mapping[str, Any], pixels: int) -> np.ndarray:
    """Checked counts, int64, each from 0 to ``pixels``."""
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        values = _expand(counts)
    elif isinstance(counts, (list, tuple)) and all(type(n) is int for n in counts):
        if any(abs(n) > pixels for n in counts):  # before numpy: the numbers may not fit 64 bits
            raise ValueError(f"an RLE count is longer than the mask's {pixels} pixels; it is damaged")
        values = np.array(counts, dtype=np.int64)
    else:
        raise ValueError(f"got RLE counts as {type(counts).__name__}; give a string or a list of integers")
    if values.size and (values.min() < 0 or values.max() > pixels):
        raise ValueError(f"RLE counts must be from 0 to {pixels}, got {values.min()} to {values.max()}; it is damaged")
    return values


def _compress(counts: np.ndarray) -> str:
    values = counts.copy()
    values[3:] -= counts[1:-2]
    size = np.where(values < 0, ~values, values)  # a group more when bit 4 of the last would be read as a sign
    groups = np.ones(values.size, np.int64)
    for bits in range(4, 5 * _MAX_GROUPS, 5):
        groups += size >= 1 << bits
    number = np.repeat(np.arange(values.size), groups)
    place = np.arange(number.size) - np.repeat(np.cumsum(groups) - groups, groups)
    characters = (values[number] >> 5 * place & 31) | np.where(place < groups[number] - 1, 32, 0)
    return (characters + 48).astype(np.uint8).tobytes().decode("ascii")


def _expand(text: str | bytes) -> np.ndarray:
    raw = np.frombuffer(text if isinstance(text, bytes) else text.encode("utf-8"), np.uint8).astype(np.int64) - 48
    if not raw.size:
        return raw
    if raw.min() < 0 or raw.max() > 63:
        raise ValueError("RLE string has characters outside '0'…'o'; it is damaged or not COCO's compressed form")
    last = raw < 32
    if not last[-1]:
        raise ValueError("RLE string ends in the middle of a number; it is cut off")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    groups = np.diff(np.append(starts, raw.size))
    if groups.max() > _MAX_GROUPS:
        raise ValueError("RLE string holds a number of more than 35 bits; it is damaged")
    place = np.arange(raw.size) - np.repeat(starts, groups)
    values = np.add.reduceat((raw & 31) << 5 * place, starts)
    values -= np.where(raw[last] & 16, 1, 0) << 5 * groups  # bit 4 of the last group is the sign
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
