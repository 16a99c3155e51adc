"""One picture of a training step: what is to be read, and reading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hrsam.data.index import Item
from hrsam.data.packing import Counts
from hrsam.data.resize import resize, resize_mask, resized
from hrsam.data.transforms import CanvasSettings, Dice, colour_change
from hrsam.images import read_image

PATCH = 16  # pixels of a token's side
CANDIDATES = 8  # objects of a picture that are looked at, of a few hundred that some have
AREA = (0.0015, 0.95)  # share of the picture that an object to train on covers


@dataclass(frozen=True)
class Shot:
    """How one picture enters one step; all that its bytes depend on.

    ``items``: objects in the order in which they are tried, ``objects`` of them are taken at most.  ``side``: the long side in
    pixels; ``enlarge``: of smaller pictures too.  ``mirror``, ``colour``: chances; ``seed``: of everything that is drawn.
    """

    picture: Path
    items: tuple[Item, ...]
    objects: int
    side: int
    enlarge: bool
    mirror: float
    colour: float
    seed: int

    @property
    def name(self) -> str:
        """``group/stem`` of the picture."""
        return f"{self.items[0].group}/{self.picture.stem}"


@dataclass(frozen=True, eq=False)
class Photo:
    """``pixels`` (H, W, 3) uint8 RGB and ``masks`` (K, H, W) bool, none empty; ``name``, ``seed`` of the shot."""

    pixels: np.ndarray
    masks: np.ndarray
    name: str
    seed: int

    @property
    def counts(self) -> Counts:
        height, width = self.pixels.shape[:2]
        return Counts(len(self.masks), -(-height // PATCH) * -(-width // PATCH), height * width)


@dataclass(frozen=True)
class Unusable:
    """A picture that cannot be used: one sentence that names the file."""

    why: str


def load_shot(shot: Shot) -> Photo | Unusable:
    """Read, resize, mirror, recolour.  The same shot gives the same bytes wherever it is loaded."""
    try:
        picture = read_image(shot.picture, long_side=shot.side)
        masks = _objects(shot, *picture.size)
    except ValueError as error:
        return Unusable(str(error))
    size = resized(*picture.size, shot.side, shot.enlarge)
    pixels = resize(picture.pixels, size)
    masks = np.stack([resize_mask(mask, size) for mask in masks])
    rng = np.random.default_rng(shot.seed)
    if rng.random() < shot.mirror:
        pixels, masks = np.ascontiguousarray(pixels[:, ::-1]), np.ascontiguousarray(masks[..., ::-1])
    if shot.colour > 0:
        pixels = recolour(pixels, shot.colour, shot.seed)
    return Photo(pixels, masks, shot.name, shot.seed)


def _objects(shot: Shot, height: int, width: int) -> list[np.ndarray]:
    """The first masks (height, width) of a fitting size, else the largest of all."""
    fitting: list[np.ndarray] = []
    largest, most = None, 0
    for item in shot.items:
        mask, ignore = item.read(height, width)
        if ignore is not None:
            raise ValueError(f"{item.mask.where} has pixels to ignore, which training does not know; leave the set out")
        area = np.count_nonzero(mask)
        if AREA[0] <= area / mask.size <= AREA[1]:
            fitting.append(mask)
        elif area > most:
            largest, most = mask, area
        if len(fitting) == shot.objects:
            break
    if fitting:
        return fitting
    assert largest is not None
    return [largest]


def recolour(pixels: np.ndarray, chance: float, seed: int) -> np.ndarray:
    """The colour changes of :mod:`hrsam.data.transforms`, each with this chance, to (H, W, 3) uint8.

    Within two grey levels, as they are rounded twice.  Pixel by pixel and not by a product of matrices, which sums in another
    order with another number of threads.
    """
    import cv2

    settings = CanvasSettings(colour=chance)
    dice = Dice(torch.Generator().manual_seed(seed), 1)
    mean = torch.tensor([cv2.mean(pixels)[:3]]) / 255
    matrix, offset = (t[0].numpy() for t in colour_change(mean, dice, settings))
    gamma = float(dice.sometimes(chance, dice.uniform(*settings.gamma), 1.0))
    mixed = cv2.transform(pixels, np.column_stack((matrix, 255 * offset)))
    levels = 255 * (np.arange(256) / 255) ** gamma
    return cv2.LUT(mixed, (levels + 0.5).astype(np.uint8))
