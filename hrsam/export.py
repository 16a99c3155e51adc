"""Objects as files: mask PNG, RGBA cut-out, COCO JSON, and the choices of cleaning up before."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from hrsam.cutting import Thing
from hrsam.mask import Mask
from hrsam.pyramid import Pyramid

_BAND = 1 << 22  # pixels written at a time
_GREY, _RGBA = 0, 6  # colour types of PNG
_SUB, _UP = 1, 2  # a byte minus that of the pixel to the left; above


@dataclass(frozen=True)
class CleanUp:
    """What is done to a mask before it leaves.

    ``fill``: holes of fewer pixels are filled; ``drop``: parts of fewer pixels are dropped (pixels that touch by a corner
    belong together); ``tolerance``: how far an outline may move, in pixels, to have fewer corners, polygons only.
    Raises ``ValueError`` for negative numbers.
    """

    fill: int = 0
    drop: int = 0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not (self.fill >= 0 and self.drop >= 0 and 0 <= self.tolerance < float("inf")):
            raise ValueError(f"fill, drop and tolerance are numbers of at least 0; got {self}")


def clean(mask: Mask, how: CleanUp) -> Mask:
    """``mask`` without small parts, then without small holes; the change is the difference of the areas."""
    import cv2

    if mask.bbox is None or (how.fill <= 1 and how.drop <= 1):
        return mask
    left, top, right, bottom = mask.bbox
    part = np.pad(mask.window(left, top, right, bottom), 1)

    def small(region: np.ndarray, below: int, connectivity: int) -> np.ndarray:
        _, labels, stats, _ = cv2.connectedComponentsWithStats(region.view(np.uint8), connectivity=connectivity)
        few = stats[:, cv2.CC_STAT_AREA] < below
        few[[0, labels[0, 0]]] = False  # what is not in the region, and what is outside the object
        return few[np.asarray(labels, np.int32)]

    part[small(part, how.drop, 8)] = False
    part[small(~part, how.fill, 4)] = True
    return Mask.scan(mask.height, mask.width, _placed(part[1:-1, 1:-1], left, top, mask.width))


def _placed(part: np.ndarray, left: int, top: int, width: int) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, _BAND // width)
    for start in range(0, len(part), rows):
        some = part[start : start + rows]
        band = np.zeros((len(some), width), dtype=bool)
        band[:, left : left + part.shape[1]] = some
        yield top + start, band


def write_mask(file: BinaryIO, mask: Mask) -> None:
    """Write ``mask`` as an 8-bit grey PNG of the picture's size, 0 and 255; takes a band of rows of memory."""

    def band(top: int, bottom: int) -> np.ndarray:
        return np.where(mask.window(0, top, mask.width, bottom), np.uint8(255), np.uint8(0))[..., None]

    _write_png(file, mask.width, mask.height, _GREY, _UP, band)


def write_cutout(file: BinaryIO, mask: Mask, pyramid: Pyramid, *, whole: bool = False) -> None:
    """Write the object's native pixels as an RGBA PNG: opaque on the mask, transparent black elsewhere.

    Cut to the object unless ``whole``.  Raises ``ValueError`` for an empty mask, which has nothing to cut to.
    """
    box = (0, 0, mask.width, mask.height) if whole else mask.bbox
    if box is None:
        raise ValueError("the mask is empty, there is nothing to cut out; click on the object first")
    left, top, right, bottom = box

    def band(start: int, stop: int) -> np.ndarray:
        alpha = mask.window(left, top + start, right, top + stop)[..., None]
        colour = pyramid.region(left, top + start, right, top + stop)
        return np.concatenate([colour * alpha, np.where(alpha, np.uint8(255), np.uint8(0))], axis=2)

    _write_png(file, right - left, bottom - top, _RGBA, _SUB, band)


def _write_png(
    file: BinaryIO, width: int, height: int, colour: int, predict: int, band: Callable[[int, int], np.ndarray]
) -> None:
    """A PNG from bands of rows (n, width, channels) uint8, first and last row given, so that it is never in memory whole."""

    def chunk(kind: bytes, data: bytes) -> None:
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    packer = zlib.compressobj(3 if colour == _RGBA else 1)
    above = None
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        pixels = band(top, min(top + rows, height))
        difference = pixels.copy()
        if predict == _SUB:
            difference[:, 1:] -= pixels[:, :-1]
        else:
            difference[1:] -= pixels[:-1]
            difference[0] -= 0 if above is None else above
        above = pixels[-1]
        lines = np.empty((len(pixels), 1 + pixels[0].size), np.uint8)
        lines[:, 0], lines[:, 1:] = predict, difference.reshape(len(pixels), -1)
        if data := packer.compress(lines.tobytes()):
            chunk(b"IDAT", data)
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


def coco_document(
    objects: Iterable[Thing],
    picture: str,
    height: int,
    width: int,
    *,
    polygons: bool = False,
    how: CleanUp | None = None,
) -> dict[str, Any]:
    """COCO instances of one picture, an annotation for each object that is not empty; names become categories.

    Shapes are run lengths, or polygons along the pixels' edges (x from 0 to ``width``), which give the very mask when
    rasterised.  COCO's polygons cannot hold a hole: as in CVAT, an object with holes stays run lengths.  Unlike there
    ``iscrowd`` is 0 for it too, because training code drops the others.
    ``attributes`` says the object's colour and, as ``area_change``, the pixels that ``how`` added or took.
    """
    how = how or CleanUp()
    categories: dict[str, int] = {}
    annotations = []
    for thing in objects:
        mask = clean(thing.mask, how)
        if mask.bbox is None:
            continue
        shape: Any = mask.rle()
        area: float = mask.area
        left, top, right, bottom = mask.bbox
        if polygons and (rings := outlines(mask, how.tolerance)) is not None:
            shape = [ring.ravel().tolist() for ring in rings]
            area = float(sum(ring_area(ring) for ring in rings))
            corners = np.concatenate(rings)
            (left, top), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
        annotations.append(
            {
                "id": thing.id,
                "image_id": 1,
                "category_id": categories.setdefault(thing.name, len(categories) + 1),
                "segmentation": shape,
                "area": area,
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
                "attributes": {"colour": thing.colour, "area_change": area - thing.mask.area},
            }
        )
    return {
        "images": [{"id": 1, "file_name": picture, "width": width, "height": height}],
        "annotations": annotations,
        "categories": [{"id": number, "name": name, "supercategory": ""} for name, number in categories.items()],
    }


def outlines(mask: Mask, tolerance: float = 0.0) -> list[np.ndarray] | None:
    """The outlines of a mask along its pixels' edges, clockwise (n, 2) x, y; None when it has a hole.

    Pixels that touch by a corner only are in outlines of their own.  ``tolerance``: as in :class:`CleanUp`; what becomes a
    line or less is left out.
    """
    import cv2

    if mask.bbox is None:
        return []
    left, top, right, bottom = mask.bbox
    rings = []
    for ring in _rings(mask.window(left, top, right, bottom)):
        if ring_area(ring) < 0:
            return None
        if tolerance > 0:
            ring = cv2.approxPolyDP(ring.astype(np.int32)[:, None], tolerance, True)[:, 0]
            if len(ring) < 3 or ring_area(ring) <= 0:
                continue
        rings.append(ring + np.array([left, top]))
    return rings


def ring_area(ring: np.ndarray) -> float:
    """Area inside a closed outline (n, 2) x, y; positive when it runs clockwise on the screen."""
    x, y = ring[:, 0].astype(np.float64), ring[:, 1].astype(np.float64)
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _rings(part: np.ndarray) -> Iterator[np.ndarray]:
    """Closed outlines of (h, w) bool as corners (n, 2) x, y, the object to the right of the way: holes run backwards."""
    framed = np.pad(part, 1)
    inside = framed[1:-1, 1:-1]
    starts, ends, ways = [], [], []
    # For each side of a pixel: its neighbour there, and where the edge begins and ends from the pixel's upper left corner.
    for way, (neighbour, begin, end) in enumerate(
        (
            (framed[:-2, 1:-1], (0, 0), (1, 0)),
            (framed[1:-1, 2:], (1, 0), (1, 1)),
            (framed[2:, 1:-1], (1, 1), (0, 1)),
            (framed[1:-1, :-2], (0, 1), (0, 0)),
        )
    ):
        y, x = np.nonzero(inside & ~neighbour)
        starts.append(np.stack((x + begin[0], y + begin[1]), axis=1))
        ends.append(np.stack((x + end[0], y + end[1]), axis=1))
        ways.append(np.full(len(x), way))
    start, end, way = np.concatenate(starts), np.concatenate(ends), np.concatenate(ways)
    key = (start[:, 1] * (part.shape[1] + 1) + start[:, 0]) * 4 + way
    order = np.argsort(key)
    start, end, way, key = start[order], end[order], way[order], key[order]
    corner = (end[:, 1] * (part.shape[1] + 1) + end[:, 0]) * 4
    # Two edges may leave a corner: turning right keeps to the same pixel.
    right = corner + (way + 1) % 4
    following = np.searchsorted(key, right)
    turns_right = (following < len(key)) & (key[np.minimum(following, len(key) - 1)] == right)
    following = np.where(turns_right, following, np.searchsorted(key, corner)).tolist()
    seen = np.zeros(len(key), dtype=bool)
    for first in range(len(key)):
        if seen[first]:
            continue
        ring, edge = [], first
        while not seen[edge]:
            seen[edge] = True
            ring.append(edge)
            edge = following[edge]
        turn = way[ring] != np.roll(way[ring], 1)
        yield start[ring][turn]
