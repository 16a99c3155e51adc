"""SBD: objects in MATLAB files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrsam.data.folders import Problem, WrongLayout, index_masks, read_lines, wrong_size
from hrsam.data.index import Found, Hasher, Item

MAX_MAT_BYTES = 10_000_000
"""Largest .mat file read; SBD's have about 20 kB."""


def sbd(root: Path) -> Found:
    """SBD validation: ``img/<stem>.jpg``, ``inst/<stem>.mat``, ``val.txt`` with one stem a line, or these in ``dataset/``.

    Every instance is an object.  Finding them means reading every .mat file once, which needs scipy.
    """
    if (root / "dataset" / "inst").is_dir():
        root = root / "dataset"
    if not all((root / name).exists() for name in ("img", "inst", "val.txt")):
        raise WrongLayout(f"{root} lacks img/, inst/ or val.txt")
    _loadmat()  # says so once when it is missing
    stems = list(dict.fromkeys(read_lines(root / "val.txt")))
    matched, problems = index_masks(root / "img", root / "inst", chosen=stems, mask_suffixes=(".mat",))
    files = {picture.stem: (picture, masks[0]) for picture, masks in matched}
    named = {Path(problem.where).stem for problem in problems}
    items = []
    for stem in stems:
        if stem not in files:
            if stem not in named:
                problems.append(Problem("val.txt", f"lists {stem!r:.80}, which has no picture and no .mat file"))
            continue
        picture, mat = files[stem]
        try:
            labels = read_mat(mat)
        except ValueError as error:
            problems.append(Problem(f"inst/{mat.name}", str(error)))
            continue
        numbers = np.unique(labels[labels > 0]).tolist()
        if not numbers:
            problems.append(Problem(f"inst/{mat.name}", "holds no object"))
        items += [Item(f"sbd/{stem}#{k}", "sbd", picture, Instance(mat, int(k))) for k in numbers]
    return Found(items, problems, "every instance of GTinst.Segmentation is an object, boundaries included")


@dataclass(frozen=True)
class Instance:
    """A mask that is one value of an SBD file."""

    path: Path
    number: int

    @property
    def where(self) -> str:
        return f"{self.path} instance {self.number}"

    def read(self, height: int, width: int) -> tuple[np.ndarray, None]:
        labels = read_mat(self.path)
        if labels.shape != (height, width):
            raise ValueError(wrong_size(self.path, labels.shape, (height, width)))
        return labels == self.number, None

    def digest(self, sha256: Hasher) -> str:
        return f"{sha256(self.path)}:{self.number}"


def _loadmat() -> Callable[..., Any]:
    try:
        return importlib.import_module("scipy.io").loadmat
    except ImportError:
        raise ValueError("SBD's .mat files need scipy, which is not installed; run: pip install 'hrsam[sbd]'") from None


def read_mat(path: Path) -> np.ndarray:
    """``GTinst.Segmentation`` of an SBD file: (H, W) whole numbers, 0 is background.  ``ValueError`` that names it.

    MATLAB's format cannot be checked before it is unpacked, so only files up to ``MAX_MAT_BYTES`` are read.
    """
    loadmat = _loadmat()
    try:
        if path.stat().st_size > MAX_MAT_BYTES:
            raise ValueError(f"has more than {MAX_MAT_BYTES} bytes")
        labels = np.asarray(loadmat(str(path), variable_names=["GTinst"])["GTinst"][0, 0]["Segmentation"])
    except Exception as error:  # loadmat fails in many ways on damaged files
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is no SBD file with GTinst.Segmentation ({reason}); get it again") from error
    if labels.ndim != 2 or labels.dtype.kind not in "ui" or not labels.size:
        raise ValueError(f"{path} has a segmentation {labels.dtype} {labels.shape}; it must be (H, W) whole numbers")
    return labels
