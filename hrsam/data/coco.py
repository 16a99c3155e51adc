"""Data sets in COCO's formats: instances, LVIS v1 and panoptic maps."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from hrsam import rle
from hrsam.data.annotations import Annotations, PanopticMap, Polygons, Runs, read_instances, read_panoptic
from hrsam.data.folders import Problem, WrongLayout, inside, wrong_size
from hrsam.data.index import Found, Hasher, Item
from hrsam.images import read_image


def coco(root: Path) -> Found:
    """COCO instances: ``annotations/instances_<split>.json``, or the one JSON file in ``annotations/`` or the root.

    ``root``: the folder or the JSON file itself.  Pictures lie in ``<split>/``, ``images/``, the root, or the one other
    folder there is.  Every annotation without ``iscrowd`` is an object.
    """
    patterns = ("annotations/instances_*.json", "instances_*.json", "annotations/*.json", "*.json")
    file, home = _annotation_file(root, patterns)
    return _instances("coco", read_instances(file), home, _picture_folders(home, file.stem.removeprefix("instances_")))


def lvis(root: Path) -> Found:
    """LVIS v1: ``lvis_v1_<split>.json``, in ``annotations/`` or not; pictures in COCO's ``train2017/``, ``val2017/``.

    A picture lies where the end of its ``coco_url`` says.
    """
    file, home = _annotation_file(root, ("annotations/lvis_v1_*.json", "lvis_v1_*.json"))
    found = read_instances(file, file_key="coco_url")
    return _instances("lvis", found, home, (".", "images", "coco", "coco/images"))


def coco_panoptic(root: Path) -> Found:
    """COCO panoptic: ``annotations/panoptic_<split>.json`` with PNGs in ``panoptic_<split>/`` beside it or in the root.

    Every segment, thing or stuff, without ``iscrowd`` is an object.
    """
    file, home = _annotation_file(root, ("annotations/panoptic_*.json", "panoptic_*.json"))
    split = file.stem.removeprefix("panoptic_")
    annotations = read_panoptic(file)
    pictures, problems = _pictures(annotations, home, _picture_folders(home, split))
    beside = file.parent.relative_to(home).as_posix()
    items = []
    for entry in annotations.maps:
        if entry.image.id not in pictures:
            continue
        try:
            png = _find(home, (f"{beside}/{file.stem}", file.stem), entry.file)
        except ValueError as error:
            problems.append(Problem(f"{file.name} annotations of image {entry.image.id}", str(error)))
            continue
        for number in entry.objects:
            name = f"coco_panoptic/{PurePosixPath(entry.image.file).stem}#{number}"
            items.append(Item(name, "coco_panoptic", pictures[entry.image.id], Segment(png, number, entry)))
    note = f"every segment of the panoptic maps, thing or stuff, is an object; {_crowds(annotations)}"
    return Found(items, problems, note)


# ---------------------------------------------------------------- masks


@dataclass(frozen=True)
class Drawn:
    """A mask that is polygons or run lengths in an annotation file, for a picture of (``height``, ``width``).

    Polygons are filled by pycocotools: each on its own grid of a fifth of a pixel, even-odd, then united.  So COCO's
    own masks come out, and they have been checked by :mod:`hrsam.data.annotations` before.
    """

    where: str
    height: int
    width: int
    shape: Polygons | Runs

    def read(self, height: int, width: int) -> tuple[np.ndarray, None]:
        if (self.height, self.width) != (height, width):
            raise ValueError(wrong_size(self.where, (self.height, self.width), (height, width)))
        if isinstance(self.shape, Polygons):
            native: Any = importlib.import_module("pycocotools.mask")  # its types do not know lists of polygons
            parts = native.frPyObjects([list(part) for part in self.shape.parts], height, width)
            return rle.decode(native.merge(parts)), None
        counts = self.shape.counts
        try:
            return rle.decode({"size": [height, width], "counts": counts}), None
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

    def digest(self, sha256: Hasher) -> str:
        shape = self.shape
        content: dict[str, Any] = {"size": [self.height, self.width]}
        if isinstance(shape, Polygons):
            content["polygons"] = shape.parts
        else:
            content["counts"] = shape.counts
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Segment:
    """A mask that is one colour of a panoptic PNG: ``number`` = R + 256 G + 65536 B."""

    path: Path
    number: int
    entry: PanopticMap

    @property
    def where(self) -> str:
        return f"{self.path} segment {self.number}"

    def read(self, height: int, width: int) -> tuple[np.ndarray, None]:
        image = self.entry.image
        if (image.height, image.width) != (height, width):
            where = f"the entry of image {image.id} for {self.path}"
            raise ValueError(wrong_size(where, (image.height, image.width), (height, width)))
        picture = read_image(self.path)
        if picture.notes:
            raise ValueError(f"{self.path} is no 8-bit RGB PNG ({', '.join(picture.notes)}); save it as one")
        if picture.pixels.shape[:2] != (height, width):
            raise ValueError(wrong_size(self.path, picture.pixels.shape, (height, width)))
        labels = picture.pixels.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
        held = set(np.unique(labels).tolist()) - {0}
        lacking, unlisted = sorted(self.entry.listed - held), sorted(held - self.entry.listed)
        if lacking or unlisted:
            said = [f"{what} {_some(ids)}" for what, ids in (("lacks", lacking), ("holds unlisted", unlisted)) if ids]
            raise ValueError(f"{self.path} {' and '.join(said)}; its segments must be those of the annotation file")
        return labels == self.number, None

    def digest(self, sha256: Hasher) -> str:
        return f"{sha256(self.path)}:{self.number}"


def _some(ids: Sequence[int], most: int = 5) -> str:
    return ", ".join(map(str, ids[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")


# ---------------------------------------------------------------- files


def _instances(name: str, annotations: Annotations, home: Path, folders: Sequence[str]) -> Found:
    pictures, problems = _pictures(annotations, home, folders)
    items = []
    for region in annotations.regions:
        image = region.image
        if image.id in pictures:
            stem = PurePosixPath(image.file).stem
            mask = Drawn(f"annotation {region.id} of {image.file}", image.height, image.width, region.shape)
            items.append(Item(f"{name}/{stem}#{region.id}", name, pictures[image.id], mask))
    note = f"every annotation is an object, polygons filled as pycocotools does; {_crowds(annotations)}"
    return Found(items, problems, note)


def _crowds(annotations: Annotations) -> str:
    return f"{annotations.crowds} crowd regions were left out"


def _pictures(annotations: Annotations, home: Path, folders: Sequence[str]) -> tuple[dict[int, Path], list[Problem]]:
    """(files by image id, problems of the annotations and of the files)."""
    problems = list(annotations.problems)
    files: dict[int, Path] = {}
    for image in annotations.images.values():
        try:
            files[image.id] = _find(home, folders, image.file)
        except ValueError as error:
            problems.append(Problem(f"image {image.id}", f"{error}; its objects are left out"))
    return files, problems


def _picture_folders(home: Path, split: str) -> tuple[str, ...]:
    """Where pictures of a split may lie, below ``home``."""
    others = [path.name for path in home.iterdir() if path.is_dir() and path.name != "annotations"]
    return split, f"images/{split}", "images", ".", *(others if len(others) == 1 else ())


def _find(home: Path, folders: Sequence[str], name: str) -> Path:
    """The first of ``folders`` below ``home`` that has the file; ``ValueError``, a phrase, for none or a bad name."""
    inside(home, name)  # says what is wrong with the name itself
    for folder in folders:
        path = inside(home, f"{folder}/{name}")
        if path.is_file():
            return path
    raise ValueError(f"there is no file {name} in {', '.join(folders)}")


def _annotation_file(root: Path, patterns: Sequence[str]) -> tuple[Path, Path]:
    """(the annotation file, the folder that all its files lie below)."""
    if root.is_file():
        folder = root.parent.resolve()
        return folder / root.name, folder.parent if folder.name == "annotations" else folder
    home = root.resolve()
    others = () if "instances" not in patterns[0] else ("panoptic", "lvis_", "captions", "person_keypoints", "stuff_")
    for pattern in patterns:
        found = sorted(path for path in home.glob(pattern) if path.is_file() and not path.name.startswith(others))
        if len(found) > 1:
            found = [path for path in found if "val" in path.stem] or found
        if len(found) > 1:
            names = ", ".join(path.relative_to(home).as_posix() for path in found)
            raise ValueError(f"{root} has several annotation files ({names}); give one of them instead of the folder")
        if found:
            return found[0], home
    raise WrongLayout(f"{root} has no annotation file")
