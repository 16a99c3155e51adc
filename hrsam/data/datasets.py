"""Data sets of the evaluation: ``open_dataset(name, root)`` gives an index of objects that are read one by one.

A new data set that is folders of pictures is a function here and a line in ``DATASETS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hrsam.data import coco, sbd
from hrsam.data.folders import SUFFIXES, Problem, WrongLayout, index_masks, read_lines
from hrsam.data.index import Dataset, Found, Item, MaskFile
from hrsam.images import read_image

__all__ = ["DATASETS", "Dataset", "Item", "Kind", "Problem", "check", "open_dataset"]

HQSEG44K_PARTS = {
    "COIFT": ("thin_object_detection/COIFT", "images", "masks"),
    "HRSOD": ("thin_object_detection/HRSOD", "images", "masks_max255"),
    "ThinObject5K": ("thin_object_detection/ThinObject5K", "images_test", "masks_test"),
    "DIS-VD": ("DIS5K/DIS-VD", "im", "gt"),
}


def davis(root: Path) -> Found:
    """DAVIS frames; ``root``: the folder ``DAVIS`` or the one above.

    ``img/<stem>.jpg`` with ``gt/<stem>#001.png`` (FocusCut) or ``gt/<stem>.png`` (RITM); ``list/val.txt`` or
    ``val.txt``, where there is one, chooses the stems.  Published numbers differ with the distribution of the masks.
    """
    folder = root / "DAVIS" if (root / "DAVIS").is_dir() else root
    _first_layout(folder, ("img", "gt"))
    items, problems = _folder(folder, "img", "gt", "davis", numbered=r"#\d+", rule="exactly one", lists=_LISTS)
    note = "where a mask holds the value 1 it alone is object and 255 (void) background, else every value above 0 is"
    return Found(items, problems, note)


def hqseg44k(root: Path) -> Found:
    """HQSeg-44K validation: COIFT, HRSOD, ThinObject5K, DIS-VD, in this order, each sorted by stem; group: the part."""
    items: list[Item] = []
    problems: list[Problem] = []
    if not any((root / folder).is_dir() for folder, _, _ in HQSEG44K_PARTS.values()):
        raise WrongLayout(f"{root} has none of the parts")
    for part, (folder, images, masks) in HQSEG44K_PARTS.items():
        if not (root / folder / images).is_dir() or not (root / folder / masks).is_dir():
            problems.append(Problem(folder, f"lacks {images}/ or {masks}/; the part {part} is missing"))
            continue
        more, wrong = _folder(root / folder, images, masks, part)
        items += more
        problems += [Problem(f"{folder}/{problem.where}", problem.text) for problem in wrong]
    return Found(items, problems, "every mask value above 0 is object")


def grabcut(root: Path) -> Found:
    """GrabCut as RITM lays it out; the unsure band (128) is seen by neither clicks nor IoU."""
    images, masks = _first_layout(root, ("data_GT", "boundary_GT"))
    items, problems = _folder(root, images, masks, "grabcut", rule="trimap")
    return Found(items, problems, _TRIMAP_NOTE)


def berkeley(root: Path) -> Found:
    """Berkeley as RITM (``images``, ``masks``) or FocusCut (``img``, ``gt`` with ``<stem>#<n>.png``) lays it out."""
    images, masks = _first_layout(root, ("images", "masks"), ("img", "gt"))
    ritm = images == "images"
    rule = "trimap" if ritm else "exactly one"
    items, problems = _folder(root, images, masks, "berkeley", numbered=r"#\d+", rule=rule, lists=_LISTS)
    note = _TRIMAP_NOTE if ritm else "where a mask holds the value 1 it alone is object, else every value above 0 is"
    return Found(items, problems, note)


def pairs(root: Path) -> Found:
    """Any folder with ``images/<stem>.*`` and ``masks/<stem>.*`` or ``masks/<stem>_<k>.*``: one object a mask."""
    images, masks = _first_layout(root, ("images", "masks"))
    items, problems = _folder(root, images, masks, root.name or root.resolve().name, numbered=r"_\d+")
    return Found(items, problems, "every mask value above 0 is object")


@dataclass(frozen=True)
class Kind:
    """``make`` lists what is under a root; ``expected`` objects in the full set, None where there is none; ``line``: the
    set and its layout in a few words."""

    make: Callable[[Path], Found]
    expected: int | None
    line: str


DATASETS: dict[str, Kind] = {
    "davis": Kind(davis, 345, "DAVIS frames: DAVIS/{img,gt}, list/val.txt"),
    "hqseg44k": Kind(
        hqseg44k, 1537, "HQSeg-44K validation: thin_object_detection/{COIFT,HRSOD,ThinObject5K}, DIS5K/DIS-VD"
    ),
    "grabcut": Kind(grabcut, 50, "GrabCut: data_GT/, boundary_GT/"),
    "berkeley": Kind(berkeley, 100, "Berkeley: images/ and masks/, or img/ and gt/"),
    "sbd": Kind(sbd.sbd, 6671, "SBD validation: img/, inst/*.mat, val.txt (needs 'hrsam[sbd]')"),
    "coco": Kind(coco.coco, None, "COCO instances: annotations/instances_*.json or one JSON file, pictures beside it"),
    "coco_panoptic": Kind(
        coco.coco_panoptic, None, "COCO panoptic: annotations/panoptic_*.json with its PNGs, pictures beside it"
    ),
    "lvis": Kind(coco.lvis, None, "LVIS v1: lvis_v1_*.json, pictures in train2017/, val2017/"),
    "pairs": Kind(pairs, None, "any pictures with masks: images/<stem>.*, masks/<stem>.* or masks/<stem>_<k>.*"),
}


def open_dataset(name: str, root: str | Path) -> Dataset:
    """Index a data set; no picture is decoded.

    ``root``: its folder, or for COCO's formats the annotation file.  What is wrong with single files or entries is in
    ``problems`` and the rest is there.  ``ValueError`` for an unknown name, no such folder, a layout that is not the
    one of this data set, and an annotation file that cannot be read at all.
    """
    if name not in DATASETS:
        raise ValueError(f"got data set {name!r:.80}; give one of {', '.join(DATASETS)}")
    kind, root = DATASETS[name], Path(root)
    if not (root.is_dir() or (root.is_file() and root.suffix == ".json")):
        raise ValueError(f"there is no folder {root}; give the root folder of {name}")
    try:
        items, problems, note = kind.make(root)
    except WrongLayout as error:
        raise ValueError(f"{error}; expected {kind.line}") from None
    except OSError as error:
        raise ValueError(
            f"{root} cannot be read ({error.strerror}: {error.filename}); check its permissions"
        ) from error
    uses = Counter(item.name for item in items)
    twice = [shared for shared, count in uses.items() if count > 1]
    problems = problems + [Problem(shared, f"{uses[shared]} masks have this name; keep one") for shared in twice]
    items = [item for item in items if uses[item.name] == 1]
    return Dataset(name, tuple(items), tuple(problems), kind.expected, note)


def check(dataset: Dataset, threads: int = 4) -> tuple[Problem, ...]:
    """All problems at once: those of the index and, in the order of the items, those of loading every item."""
    pictures: dict[Path, list[int]] = {}
    for i, item in enumerate(dataset.items):
        pictures.setdefault(item.picture, []).append(i)

    def load(numbers: list[int]) -> list[tuple[int, Problem]]:
        wrong = []
        pixels = None
        for i in numbers:
            item = dataset.items[i]
            try:
                if pixels is None:
                    pixels = read_image(item.picture).pixels
                item.sample(pixels)
            except ValueError as error:
                wrong.append((i, Problem(item.name, str(error))))
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        found = sorted(
            (pair for wrong in pool.map(load, pictures.values()) for pair in wrong), key=lambda pair: pair[0]
        )
    return dataset.problems + tuple(problem for _, problem in found)


_LISTS = ("list/val.txt", "val.txt")
_TRIMAP_NOTE = "mask values above 128 and exactly 1 are object, 128 is ignored by clicks and IoU"


def _first_layout(root: Path, *layouts: tuple[str, str]) -> tuple[str, str]:
    for layout in layouts:
        if all((root / folder).is_dir() for folder in layout):
            return layout
    raise WrongLayout(f"{root} has no folders {' or '.join('/ and '.join(layout) for layout in layouts)}/")


def _folder(
    root: Path,
    images: str,
    masks: str,
    group: str,
    *,
    numbered: str = "",
    rule: str = "above zero",
    lists: Iterable[str] = (),
) -> tuple[list[Item], list[Problem]]:
    """Items of ``images/`` and ``masks/`` below ``root``, sorted by stem, named by the picture where it has one mask."""
    file = next((root / name for name in lists if (root / name).is_file()), None)
    lines = [] if file is None else read_lines(file)
    chosen = None if file is None else {Path(line).stem if Path(line).suffix in SUFFIXES else line for line in lines}
    matched, problems = index_masks(root / images, root / masks, numbered=numbered, chosen=chosen)
    if file is not None and chosen is not None:
        there = {path.stem for picture, owned in matched for path in (picture, *owned)}
        named = {Path(problem.where).stem for problem in problems}
        missing = sorted(chosen - there - named)
        place = file.relative_to(root).as_posix()
        problems += [Problem(place, f"lists {stem!r:.80}, which has no picture with a mask") for stem in missing]
    items = []
    for picture, owned in matched:
        for path in owned:
            stem = picture.stem if len(owned) == 1 else path.stem
            items.append(Item(f"{group}/{stem}", group, picture, MaskFile(path, rule)))
    return items, problems
