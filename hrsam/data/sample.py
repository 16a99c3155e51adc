"""One picture and one object in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Sample:
    """``pixels`` (H, W, 3) uint8 RGB and ``mask`` (H, W) bool of the same size, at least one pixel of it True.

    ``name`` is unique within a data set; ``dataset`` is the group that results are averaged over.
    """

    pixels: np.ndarray
    mask: np.ndarray
    name: str
    dataset: str
