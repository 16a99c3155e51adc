"""Reading and checking annotation files: COCO instances, LVIS v1 and COCO panoptic.

Everything in such a file is foreign text.  Types, ids, sizes, polygons and file names are checked here, before a
picture is opened or anything native sees a number.  A file that is no such document at all is one ``ValueError``; an
entry that is wrong becomes a :class:`Problem`, and what depends on it is left out.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hrsam.data.folders import Problem
from hrsam.images import MAX_PIXELS

MAX_JSON_BYTES = 2_000_000_000
"""Largest annotation file read; LVIS v1's training file has 1.1 GB."""
MAX_OUTLINE = 4_000_000
"""Longest outline of an object in pixels; rasterising takes about 60 bytes a pixel of it."""

_MOST_ID = 2**53
_MOST_SEGMENT = 2**24 - 1  # three bytes of colour

T = TypeVar("T")


@dataclass(frozen=True)
class ImageEntry:
    """``file``: path as the annotation file says it, not yet checked; for LVIS ``split/name``."""

    id: int
    width: int
    height: int
    file: str


@dataclass(frozen=True)
class Polygons:
    """Closed polygons x0, y0, x1, y1, … in pixels, finite, near the picture, outline at most ``MAX_OUTLINE``."""

    parts: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Runs:
    """COCO run lengths of the picture's size; a ``str`` is compressed and its total not yet checked."""

    counts: str | tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """One object: its entry's ``id``, the picture's entry, and its shape."""

    id: int
    image: ImageEntry
    shape: Polygons | Runs


@dataclass(frozen=True)
class PanopticMap:
    """One panoptic PNG: it must hold exactly the ids ``listed``; ``objects``: those without fault that are no crowd."""

    image: ImageEntry
    file: str
    listed: frozenset[int]
    objects: tuple[int, ...]


@dataclass(frozen=True)
class Annotations:
    """``images`` by id, without those that ``problems`` concern; ``crowds``: regions of many objects, left out."""

    images: dict[int, ImageEntry]
    regions: tuple[Region, ...]
    maps: tuple[PanopticMap, ...]
    problems: tuple[Problem, ...]
    crowds: int


class _Bad(ValueError):
    """A fault of one entry, a phrase."""


def read_instances(path: Path, *, file_key: str = "file_name") -> Annotations:
    """Read COCO instances, or LVIS with ``file_key="coco_url"``.

    Detected: entries of a wrong type, missing keys, ids that are no whole numbers or used twice, references to images
    and categories that are not listed, absurd picture sizes, polygons that are odd, short, not finite, far outside
    (more than the picture's size beyond an edge) or of absurd length, run lengths of another size than their picture or
    with a wrong total (compressed ones: when they are decoded).  Self-crossing polygons are allowed.  ``ValueError``
    for a file that is missing, over ``MAX_JSON_BYTES``, no JSON, or lacks a list ``images``, ``annotations``,
    ``categories``.
    """
    document = _load(path, ("images", "annotations", "categories"))
    audit = _Audit(path.name)
    images, refused = _images(document, audit, file_key)
    categories = audit.table(document["categories"], "categories", "id", _category)
    crowds = 0

    def parse(record: dict[str, Any]) -> Region | None:
        nonlocal crowds
        number = _whole(record, "id", 0, _MOST_ID)
        image_id, crowd = _common(record, categories)
        if image_id in refused:
            return None
        image = _known(images, image_id)
        region = Region(number, image, _shape(record.get("segmentation"), image))
        crowds += crowd
        return None if crowd else region

    regions = audit.table(document["annotations"], "annotations", "id", parse)
    return Annotations(images, tuple(r for r in regions.values() if r), (), tuple(audit.problems), crowds)


def read_panoptic(path: Path) -> Annotations:
    """Read COCO panoptic annotations; faults and errors as in :func:`read_instances`.

    Whether a PNG holds exactly the listed segments is seen when it is decoded.
    """
    document = _load(path, ("images", "annotations", "categories"))
    audit = _Audit(path.name)
    images, refused = _images(document, audit, "file_name")
    categories = audit.table(document["categories"], "categories", "id", _category)
    crowds = 0

    def parse(record: dict[str, Any]) -> PanopticMap | None:
        nonlocal crowds
        image_id = _whole(record, "image_id", 0, _MOST_ID)
        file, segments = _text(record, "file_name"), record.get("segments_info")
        if type(segments) is not list:
            raise _Bad(f"segments_info is {_shown(segments)}, not a list")
        if not segments:
            raise _Bad("segments_info lists no segment")
        if image_id in refused:
            return None
        image = _known(images, image_id)
        place = f"annotations of image {image_id}, segments_info"
        found = audit.table(segments, place, "id", lambda entry: _segment(entry, categories))
        crowds += sum(found.values())
        listed = [entry.get("id") for entry in segments if type(entry) is dict]
        return PanopticMap(
            image,
            file,
            frozenset(number for number in listed if type(number) is int),
            tuple(number for number, crowd in found.items() if not crowd),
        )

    maps = audit.table(document["annotations"], "annotations", "image_id", parse)
    return Annotations(images, (), tuple(m for m in maps.values() if m), tuple(audit.problems), crowds)


# ---------------------------------------------------------------- the document


def _load(path: Path, lists: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the annotation file or the folder it lies in")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes, the limit is {MAX_JSON_BYTES}; split it")
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for an annotation file; it is damaged") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it is damaged or cut off") from error
    if type(document) is not dict:
        raise ValueError(f"{path} holds {_shown(document)}, not an object with {', '.join(lists)}; give a COCO file")
    for key in lists:
        if type(document.get(key)) is not list:
            raise ValueError(f"{path} has {_shown(document.get(key))} for {key}, not a list; give a COCO file")
    return document


class _Audit:
    """Collects the problems of one file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[Problem] = []

    def table(self, records: list[Any], place: str, key: str, parse: Callable[[dict[str, Any]], T]) -> dict[int, T]:
        """Entries without fault by their ``key``; all entries that share a key are refused."""
        ids = (record.get(key) for record in records if type(record) is dict)
        uses = Counter(number for number in ids if type(number) is int)
        found: dict[int, T] = {}
        for i, record in enumerate(records):
            where = f"{self.name} {place}[{i}]"
            number = record.get(key) if type(record) is dict else None
            if type(number) is int:
                where += f" ({key} {_shown(number)})"
            try:
                if type(record) is not dict:
                    raise _Bad(f"is {_shown(record)}, not an object")
                entry = parse(record)
                assert type(number) is int
                if uses[number] > 1:
                    raise _Bad(f"{key} {number} is used by {uses[number]} entries")
                found[number] = entry
            except _Bad as bad:
                self.problems.append(Problem(where, str(bad)))
        return found


def _images(document: dict[str, Any], audit: _Audit, file_key: str) -> tuple[dict[int, ImageEntry], set[int]]:
    """Entries without fault, and the ids of the others."""

    def parse(record: dict[str, Any]) -> ImageEntry:
        number = _whole(record, "id", 0, _MOST_ID)
        width, height = _whole(record, "width", 1, MAX_PIXELS), _whole(record, "height", 1, MAX_PIXELS)
        if width * height > MAX_PIXELS:
            raise _Bad(f"{width}x{height} is more than {MAX_PIXELS} pixels")
        if file_key not in record and "file_name" in record:
            return ImageEntry(number, width, height, _text(record, "file_name"))
        file = _text(record, file_key)
        if file_key == "coco_url":
            file = "/".join(file.split("/")[-2:])
        return ImageEntry(number, width, height, file)

    images = audit.table(document["images"], "images", "id", parse)
    ids = (record.get("id") for record in document["images"] if type(record) is dict)
    return images, {number for number in ids if type(number) is int} - images.keys()


# ---------------------------------------------------------------- values


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if type(value) in (dict, list):
        return f"{'an object' if type(value) is dict else 'a list'} of {len(value)}"
    return reprlib.repr(value)


def _whole(record: dict[str, Any], key: str, low: int, high: int) -> int:
    value = record.get(key)
    if type(value) is not int or not low <= value <= high:
        raise _Bad(f"{key} is {_shown(value)}, not a whole number from {low} to {high}")
    return value


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if type(value) is not str or not value:
        raise _Bad(f"{key} is {_shown(value)}, not a text")
    return value


def _is_number(value: Any) -> bool:
    """Finite and of a size that converts to float; bool is no number."""
    return type(value) in (int, float) and abs(value) <= 1e15


def _category(record: dict[str, Any]) -> str:
    _whole(record, "id", 0, _MOST_ID)
    return _text(record, "name")


def _known(images: dict[int, ImageEntry], number: int) -> ImageEntry:
    if number not in images:
        raise _Bad(f"image_id {number} is not among the images")
    return images[number]


def _common(record: dict[str, Any], categories: dict[int, str]) -> tuple[int, bool]:
    """(image id, is it a crowd) of an annotation."""
    return _whole(record, "image_id", 0, _MOST_ID), _described(record, categories)


def _segment(record: dict[str, Any], categories: dict[int, str]) -> bool:
    _whole(record, "id", 1, _MOST_SEGMENT)
    return _described(record, categories)


def _described(record: dict[str, Any], categories: dict[int, str]) -> bool:
    """Check category, box and area; is it a crowd?"""
    category = _whole(record, "category_id", 0, _MOST_ID)
    if category not in categories:
        raise _Bad(f"category_id {category} is not among the categories")
    box, area = record.get("bbox", [0, 0, 0, 0]), record.get("area", 0)
    if type(box) is not list or len(box) != 4 or not all(_is_number(v) for v in box) or min(box[2:]) < 0:
        raise _Bad(f"bbox is {_shown(box)}, not four numbers x, y, width, height")
    if not _is_number(area) or area < 0:
        raise _Bad(f"area is {_shown(area)}, not a number of pixels")
    return bool(_whole(record, "iscrowd", 0, 1)) if "iscrowd" in record else False


def _shape(value: Any, image: ImageEntry) -> Polygons | Runs:
    if type(value) is list:
        if not value:
            raise _Bad("segmentation has no polygon")
        parts = tuple(_polygon(part, i, image) for i, part in enumerate(value))
        if (length := sum(map(_length, parts))) > MAX_OUTLINE:
            raise _Bad(f"segmentation has an outline of {length:.3g} pixels, the limit is {MAX_OUTLINE}")
        return Polygons(parts)
    if type(value) is dict:
        return _runs(value, image)
    raise _Bad(f"segmentation is {_shown(value)}, neither polygons nor run lengths")


def _polygon(values: Any, number: int, image: ImageEntry) -> tuple[float, ...]:
    name = f"polygon {number}"
    if type(values) is not list or any(type(v) not in (int, float) for v in values):
        raise _Bad(f"{name} is {_shown(values)}, not a list of numbers x0, y0, x1, y1, …")
    if len(values) < 6 or len(values) % 2:
        raise _Bad(f"{name} has {len(values)} numbers; an even count of at least 6 is needed")
    if not all(_is_number(v) for v in values):
        raise _Bad(f"{name} has a NaN, infinite or huge coordinate")
    points = np.array(values, np.float64).reshape(-1, 2)
    sides = image.width, image.height
    if (points < np.negative(sides)).any() or (points > np.multiply(sides, 2)).any():
        raise _Bad(f"{name} reaches far outside its picture of {image.width}x{image.height} pixels")
    return tuple(map(float, values))


def _length(part: tuple[float, ...]) -> float:
    points = np.reshape(part, (-1, 2))
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(1).sum())


def _runs(value: dict[str, Any], image: ImageEntry) -> Runs:
    size, counts = value.get("size"), value.get("counts")
    if type(size) is not list or len(size) != 2 or any(type(n) is not int for n in size):
        raise _Bad(f"size of the run lengths is {_shown(size)}, not [height, width]")
    if size != [image.height, image.width]:
        raise _Bad(f"run lengths are for {_product(size)} pixels, the picture has {image.width}x{image.height}")
    if type(counts) is str:
        if not counts.isascii():
            raise _Bad("run lengths have characters outside '0'…'o'")
        return Runs(counts)
    if type(counts) is not list or any(type(n) is not int for n in counts):
        raise _Bad(f"counts is {_shown(counts)}, neither a text nor a list of whole numbers")
    pixels = image.width * image.height
    if any(not 0 <= n <= pixels for n in counts):
        raise _Bad(f"run lengths must be from 0 to the picture's {pixels} pixels")
    if sum(counts) != pixels:
        raise _Bad(f"run lengths add up to {sum(counts)}, the picture has {pixels} pixels")
    return Runs(tuple(counts))


def _product(size: list[int]) -> str:
    return f"{_shown(size[1])}x{_shown(size[0])}"
