"""A data set as an index: which objects there are, each read when its turn comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hrsam.data.folders import Problem, wrong_size
from hrsam.data.sample import Sample
from hrsam.images import read_image, read_labels

Hasher = Callable[[Path], str]


class MaskSource(Protocol):
    """Where the mask of one object comes from; picklable."""

    @property
    def where(self) -> str:
        """The file, or the entry of a file, for messages."""
        ...

    def read(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(mask, ignore), each (height, width) bool; ``ValueError``, one sentence, when they are not of this size."""
        ...

    def digest(self, sha256: Hasher) -> str:
        """What identifies the mask; ``sha256`` gives a file's hash."""
        ...


@dataclass(frozen=True)
class Item:
    """One object to cut out.

    ``name`` is unique in the data set and the same on every machine; ``group`` is what results are averaged over.
    """

    name: str
    group: str
    picture: Path
    mask: MaskSource

    def read(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The object's (mask, ignore) in a picture of this size; ``ValueError`` that names the mask."""
        mask, ignore = self.mask.read(height, width)
        if not mask.any():
            raise ValueError(f"{self.mask.where} holds no object; remove it or draw the object")
        return mask, ignore

    def sample(self, pixels: np.ndarray) -> Sample:
        """The object in its picture, given as ``pixels`` (H, W, 3) uint8; ``ValueError`` that names the mask."""
        mask, ignore = self.read(*pixels.shape[:2])
        return Sample(pixels, mask, self.name, self.group, ignore)


class Found(NamedTuple):
    """What the maker of a data set finds under its root; ``note``: one sentence, how objects and masks are read."""

    items: list[Item]
    problems: list[Problem]
    note: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """``items`` in the order of the set; items that ``problems`` concern are not among them.

    ``expected``: number of objects in the full, published set, None where there is none.  ``note``: one sentence, how
    objects and masks are read.
    """

    name: str
    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    expected: int | None
    note: str

    def __len__(self) -> int:
        return len(self.items)

    def load(self, item: Item) -> Sample:
        """Read picture and mask.  ``ValueError``, one sentence naming the file, for everything wrong with them."""
        return item.sample(read_image(item.picture).pixels)

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the items' names, the bytes of their pictures and the bytes of their masks.

        Masks that are drawn in an annotation file count with what they say there in canonical JSON.  Where the files
        lie does not matter.  ``ValueError`` for a file that cannot be read.
        """
        known: dict[Path, str] = {}

        def sha256(path: Path) -> str:
            if path not in known:
                known[path] = _file_sha256(path)
            return known[path]

        whole = hashlib.sha256()
        for item in sorted(self.items, key=lambda item: item.name):
            whole.update(f"{item.name}\0{sha256(item.picture)}\0{item.mask.digest(sha256)}\n".encode())
        return whole.hexdigest()


def _file_sha256(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; it was there when the data set was indexed")
    sha = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    return sha.hexdigest()


# ---------------------------------------------------------------- masks that are picture files


def _above_zero(labels: np.ndarray) -> tuple[np.ndarray, None]:
    return labels > 0, None


def _exactly_one(labels: np.ndarray) -> tuple[np.ndarray, None]:
    ones = labels == 1
    if not ones.any():
        return labels > 0, None
    values = np.unique(labels)
    if len(values) > _MOST_LABELS:
        raise ValueError(
            f"holds 1 and {len(values) - 1} other values, neither labels nor black and white; draw it again"
        )
    return ones, None


def _trimap(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    unsure = labels == 128
    return (labels > 128) | (labels == 1), unsure if unsure.any() else None


_MOST_LABELS = 64  # a mask with soft edges has more values, one with labels fewer

RULES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]] = {
    "above zero": _above_zero,
    "exactly one": _exactly_one,
    "trimap": _trimap,
}
"""Labels (H, W) as stored → (mask, ignore).

``above zero``: any value above 0 is object.  ``exactly one``: where the value 1 occurs, it alone is object and all
others (255 is void, then) background, as FocusCut and HRSAM read DAVIS; else as ``above zero``.  ``trimap``: above 128
and exactly 1 are object, 128 is ignored, as RITM reads GrabCut and Berkeley.
"""


@dataclass(frozen=True)
class MaskFile:
    """A mask that is a picture file, read by one of the ``RULES``."""

    path: Path
    rule: str = "above zero"

    @property
    def where(self) -> str:
        return str(self.path)

    def read(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        labels = read_labels(self.path)
        if labels.shape != (height, width):
            raise ValueError(wrong_size(self.path, labels.shape, (height, width)))
        try:
            return RULES[self.rule](labels)
        except ValueError as error:
            raise ValueError(f"{self.path} {error}") from None

    def digest(self, sha256: Hasher) -> str:
        return sha256(self.path)
