"""Files of a data set: finding pictures and masks, pairing them by name, and saying what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrsam.images import read_mask

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
MAX_LIST_BYTES = 10_000_000
"""Largest list of names that is read."""


@dataclass(frozen=True)
class Problem:
    """``where``: the file (or entry of a file) or the item, without absolute path; ``text``: what is wrong, a phrase."""

    where: str
    text: str


class WrongLayout(ValueError):
    """A folder without the files by which a data set is known."""


@dataclass(frozen=True)
class _Matched:
    pairs: list[tuple[Path, tuple[Path, ...]]]
    bare: list[Path]  # pictures without mask
    strays: list[Path]  # masks without picture
    twins: list[tuple[Path, Path]]  # pictures of one stem; no pair has it
    unprintable: list[Path]


def match_masks(images: Path, masks: Path, *, numbered: str = "") -> list[tuple[Path, tuple[Path, ...]]]:
    """Every picture of ``images`` with its masks, sorted by stem.

    A mask belongs to the picture of equal stem, else to the one whose stem is left when ``numbered`` (a regular
    expression) is cut off its end.  Raises ``ValueError`` listing what is missing on either side.
    """
    found = _match(images, masks, numbered, None, SUFFIXES)
    if found.twins:
        first, second = found.twins[0]
        raise ValueError(f"{first.name} and {second.name} in {images} share a stem; keep one of them")
    if found.bare or found.strays:
        sides = (found.bare, "mask"), (found.strays, "picture")
        wrong = [f"{_listed(paths)} without {what}" for paths, what in sides if paths]
        raise ValueError(f"{images.parent}: {' and '.join(wrong)}; complete or remove them")
    return found.pairs


def index_masks(
    images: Path,
    masks: Path,
    *,
    numbered: str = "",
    chosen: Collection[str] | None = None,
    mask_suffixes: Collection[str] = SUFFIXES,
) -> tuple[list[tuple[Path, tuple[Path, ...]]], list[Problem]]:
    """As :func:`match_masks`, but what cannot be paired is left out and listed.

    ``chosen``: stems of the pictures or masks that belong to the set; other files are not looked at.  Raises
    ``ValueError`` when a folder is missing, cannot be listed, or ``images`` holds no pictures at all.
    """
    found = _match(images, masks, numbered, chosen, mask_suffixes)
    problems = [Problem(_place(path), "has no mask; add it or remove the picture") for path in found.bare]
    problems += [Problem(_place(path), "has no picture; add it or remove the mask") for path in found.strays]
    problems += [Problem(_place(a), f"has the stem of {b.name} too; keep one of them") for a, b in found.twins]
    problems += [Problem(ascii(_place(path)), "has a name that is not text; rename it") for path in found.unprintable]
    return found.pairs, sorted(problems, key=lambda problem: problem.where)


def _match(
    images: Path, masks: Path, numbered: str, chosen: Collection[str] | None, mask_suffixes: Collection[str]
) -> _Matched:
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}; give the data set's root folder")

    def owner(stem: str) -> str:
        return re.sub(f"(?:{numbered})$", "", stem)

    listed, drawn = _files(images, SUFFIXES), _files(masks, mask_suffixes)
    if not listed:
        raise ValueError(f"{images} holds no pictures ({', '.join(SUFFIXES)}); give the data set's root folder")
    if chosen is not None:
        stems = {*chosen, *map(owner, chosen)}
        listed = [path for path in listed if path.stem in stems]
        whole = {path.stem for path in listed} & set(chosen)  # pictures that are chosen with all their masks
        drawn = [path for path in drawn if path.stem in chosen or owner(path.stem) in whole]
    unprintable = [path for path in listed + drawn if not path.name.isprintable()]
    pictures: dict[str, Path] = {}
    twins = []
    for path in listed:
        if path.name.isprintable() and pictures.setdefault(path.stem, path) != path:
            twins.append((pictures[path.stem], path))
    found: dict[str, list[Path]] = {stem: [] for stem in pictures}
    strays: list[Path] = []
    for path in drawn:
        if path.name.isprintable():
            found.get(path.stem if path.stem in found else owner(path.stem), strays).append(path)
    for first, _ in twins:
        found.pop(first.stem, None)
    bare = [pictures[stem] for stem, owned in found.items() if not owned]
    pairs = [(pictures[stem], tuple(sorted(found[stem], key=_by_number))) for stem in sorted(found) if found[stem]]
    return _Matched(pairs, bare, strays, twins, unprintable)


def read_object(path: Path, picture: Path, size: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) bool in ``path``, any value above 0, of the ``picture`` of this ``size`` (H, W).

    Raises ``ValueError`` that names the file when it cannot be read, has another size or holds no object.
    """
    mask = read_mask(path)
    if mask.shape != size:
        raise ValueError(wrong_size(path, mask.shape, size, picture.name))
    if not mask.any():
        raise ValueError(f"{path} holds no object (every value is 0); remove it or draw the object")
    return mask


def wrong_size(mask: object, size: Sequence[int], expected: Sequence[int], picture: str = "") -> str:
    """The sentence for a mask of another (height, width) than its picture."""
    name = f" {picture}" if picture else ""
    return f"{mask} is {size[1]}x{size[0]} and its picture{name} {expected[1]}x{expected[0]}; they must have one size"


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file without white space around them, empty ones left out; ``ValueError`` that names it."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; it lists the names of the data set")
    if path.stat().st_size > MAX_LIST_BYTES:
        raise ValueError(f"{path} is longer than {MAX_LIST_BYTES} bytes; that is no list of names")
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text ({error}); save it again") from error
    return [line.strip() for line in lines if line.strip()]


def inside(root: Path, name: str) -> Path:
    """The path of ``name``, which a file of the data set says, below the folder ``root``; it need not exist.

    ``name`` is relative with forward slashes.  Raises ``ValueError``, a phrase, for one that is absolute, climbs, is
    not plain text, or leaves ``root`` through a link.
    """
    parts = name.split("/")
    if not name or len(name) > 1000 or not name.isprintable():
        raise ValueError(f"{name!r:.80} is no file name; give one relative to the data set")
    if ".." in parts or "" in parts or "\\" in name or ":" in parts[0]:
        raise ValueError(f"{name!r:.80} is not a plain path below the data set's folder")
    home = root.resolve()
    try:
        path = (home / name).resolve()
        path.exists()  # fails for names that the file system cannot hold
    except (OSError, RuntimeError, ValueError):
        raise ValueError(f"{name!r:.80} cannot be a file here") from None
    if not path.is_relative_to(home):
        raise ValueError(f"{name!r:.80} leads out of the data set's folder through a link")
    return path


def _files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.name[0] != ".")
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from error


def _by_number(path: Path) -> tuple[int, str]:
    return len(path.stem), path.stem


def _place(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _listed(paths: Sequence[Path], most: int = 5) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(path.name for path in paths[:most]) + more
