"""A bank of training photos with their masks, decoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hrsam.data.folders import match_masks, read_object
from hrsam.data.resize import resize, resize_mask, resized
from hrsam.data.sample import Sample
from hrsam.images import read_image


@dataclass(frozen=True, eq=False)
class PhotoBank:
    """Training photos with their masks, decoded, as tensors on one device.

    n photos lie top left in squares of side P, m masks likewise; the rest of a square repeats the last row and column,
    so that neighbours may be averaged up to a photo's edge.  Coordinates are (x, y) in photo pixels, pixel i covering
    [i, i + 1].

    ``photos`` (n, 3, P, P) uint8 RGB; ``sizes`` (n, 2) float32 width and height; ``colours`` (n, 3) float32 mean RGB in
    [0, 1]; ``first``, ``count`` (n,) int64: the masks of photo i are ``first[i]`` … ``first[i] + count[i] - 1``.
    ``masks`` (m, P, P) uint8, 0 or 255; ``owners`` (m,) int64 their photos; ``boxes`` (m, 4) float32 bounds x0, y0, x1,
    y1; ``anchors`` (m, 2) float32 centre of the object pixel nearest to the middle of the box.
    ``names``: ``part/stem`` of each photo.
    """

    photos: Tensor
    sizes: Tensor
    colours: Tensor
    first: Tensor
    count: Tensor
    masks: Tensor
    owners: Tensor
    boxes: Tensor
    anchors: Tensor
    names: tuple[str, ...]

    @classmethod
    def load(cls, folders: Sequence[Path], long_side: int = 448, threads: int = 16) -> PhotoBank:
        """Decode folders in the layout of the data set ``pairs`` into main memory, photos sorted by stem over all folders.

        Photos whose long side exceeds ``long_side`` (the P above, a multiple of 8) are shrunk to it, none is enlarged.
        Raises ``ValueError`` naming every file that cannot be used.
        """
        if long_side < 8 or long_side % 8:
            raise ValueError(f"got long_side={long_side}; give a positive multiple of 8")
        files = [
            pair
            for folder in folders
            for pair in match_masks(Path(folder) / "images", Path(folder) / "masks", numbered=r"_\d+")
        ]
        files.sort(key=lambda pair: (pair[0].stem, pair[0]))
        if not files:
            raise ValueError("there are no folders to load; give at least one folder with images/ and masks/")
        count = np.array([len(masks) for _, masks in files])
        first = np.cumsum(count) - count
        n, m, side = len(files), int(count.sum()), long_side
        photos, masks = np.empty((n, 3, side, side), np.uint8), np.empty((m, side, side), np.uint8)
        sizes, colours = np.empty((n, 2), np.float32), np.empty((n, 3), np.float32)
        boxes, anchors = np.empty((m, 4), np.float32), np.empty((m, 2), np.float32)

        def decode(i: int) -> str | None:
            picture, paths = files[i]
            try:
                pixels = read_image(picture).pixels
                objects = [read_object(path, picture, pixels) for path in paths]
            except ValueError as error:
                return str(error)
            height, width = pixels.shape[:2]
            size = resized(height, width, side, enlarge=False)
            pixels = resize(pixels, size)
            sizes[i] = pixels.shape[1::-1]
            colours[i] = pixels.mean((0, 1)) / 255
            photos[i] = filled(pixels, side).transpose(2, 0, 1)
            for k, mask in enumerate(objects, start=first[i]):
                mask = resize_mask(mask, size)
                boxes[k], anchors[k] = box_and_anchor(mask)
                masks[k] = filled(mask.astype(np.uint8) * 255, side)
            return None

        with ThreadPoolExecutor(threads) as pool:
            problems = [problem for problem in pool.map(decode, range(n)) if problem]
        if problems:
            raise ValueError(f"{len(problems)} of {n} photos cannot be used: " + "; ".join(problems))
        return cls(
            photos=torch.from_numpy(photos),
            sizes=torch.from_numpy(sizes),
            colours=torch.from_numpy(colours),
            first=torch.from_numpy(first),
            count=torch.from_numpy(count),
            masks=torch.from_numpy(masks),
            owners=torch.from_numpy(np.repeat(np.arange(n), count)),
            boxes=torch.from_numpy(boxes),
            anchors=torch.from_numpy(anchors),
            names=tuple(f"{picture.parent.parent.name}/{picture.stem}" for picture, _ in files),
        )

    def __len__(self) -> int:
        """Number of photos."""
        return len(self.names)

    @property
    def side(self) -> int:
        """P, the side in pixels of the squares that photos lie in."""
        return self.photos.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.photos.device

    def to(self, device: torch.device | str) -> PhotoBank:
        """The same bank on another device."""
        tensors = [field.name for field in fields(self) if field.name != "names"]
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def split(self, every: int = 25) -> tuple[PhotoBank, PhotoBank]:
        """(training, held out): photos ``every - 1``, ``2 * every - 1``, … are held out; both are copies."""
        if not 2 <= every <= len(self):
            raise ValueError(f"got every={every}; give a number from 2 to the number of photos, {len(self)}")
        held_out = torch.arange(len(self), device=self.device) % every == every - 1
        return self._where(~held_out), self._where(held_out)

    def _where(self, keep: Tensor) -> PhotoBank:
        of_mask = keep[self.owners]
        count = self.count[keep]
        return PhotoBank(
            photos=self.photos[keep],
            sizes=self.sizes[keep],
            colours=self.colours[keep],
            first=count.cumsum(0) - count,
            count=count,
            masks=self.masks[of_mask],
            owners=torch.repeat_interleave(torch.arange(len(count), device=self.device), count),
            boxes=self.boxes[of_mask],
            anchors=self.anchors[of_mask],
            names=tuple(name for name, kept in zip(self.names, keep.tolist()) if kept),
        )

    def samples(self) -> Iterator[Sample]:
        """Every mask with its photo, as stored; ``name`` is ``part/stem#k``."""
        for i, name in enumerate(self.names):
            width, height = self.sizes[i].int().tolist()
            pixels = self.photos[i, :, :height, :width].permute(1, 2, 0).contiguous().cpu().numpy()
            for k in range(int(self.count[i])):
                mask = self.masks[self.first[i] + k, :height, :width].cpu().numpy() > 0
                yield Sample(pixels, mask, f"{name}#{k}", name.split("/")[0])


def filled(array: np.ndarray, side: int) -> np.ndarray:
    """(H, W, …) in the top left of a square of ``side``, which repeats the last row and column."""
    height, width = array.shape[:2]
    return np.pad(array, ((0, side - height), (0, side - width)) + ((0, 0),) * (array.ndim - 2), mode="edge")


def box_and_anchor(mask: np.ndarray) -> tuple[tuple[float, ...], tuple[float, float]]:
    """Bounds x0, y0, x1, y1 of a mask (H, W) bool, not empty, and the centre of its pixel nearest to their middle."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    if not mask[y, x]:
        ys, xs = np.nonzero(mask)
        nearest = np.argmin((ys - y) ** 2 + (xs - x) ** 2)
        y, x = ys[nearest], xs[nearest]
    return box, (x + 0.5, y + 0.5)
