"""One picture and one object in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """``pixels`` (H, W, 3) uint8 RGB and ``mask`` (H, W) bool of the same size, at least one pixel of it True.

    ``name`` is unique within a data set; ``dataset`` is the group that results are averaged over.  ``ignore`` (H, W)
    bool: pixels that neither clicks nor IoU see, disjoint from ``mask``; None where every pixel counts.
    """

    pixels: np.ndarray
    mask: np.ndarray
    name: str
    dataset: str
    ignore: np.ndarray | None = None
