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
                read = read_image(picture, long_side=side)
                objects = [read_object(path, picture, read.size) for path in paths]
            except ValueError as error:
                return str(error)
            size = resized(*read.size, side, enlarge=False)
            entry = make_entry(resize(read.pixels, size), np.stack([resize_mask(mask, size) for mask in objects]), "")
            own = slice(first[i], first[i] + count[i])
            sizes[i], colours[i], boxes[own], anchors[own] = size[::-1], entry.colour, entry.boxes, entry.anchors
            lay(entry.planes, photos[i])
            lay(entry.masks, masks[own])
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

    @classmethod
    def of(cls, entries: Sequence[Entry], side: int, *, pin: bool = False) -> PhotoBank:
        """At least one photo, each at most ``side`` wide and high, in main memory; ``pin``: page-locked, for copies to CUDA
        that nothing waits for."""
        count = torch.tensor([len(entry.masks) for entry in entries])
        photos = torch.empty(len(entries), 3, side, side, dtype=torch.uint8, pin_memory=pin)
        masks = torch.empty(int(count.sum()), side, side, dtype=torch.uint8, pin_memory=pin)
        first = count.cumsum(0) - count
        for i, entry in enumerate(entries):
            lay(entry.planes, photos[i].numpy())
            lay(entry.masks, masks[first[i] : first[i] + count[i]].numpy())
        return cls(
            photos=photos,
            sizes=torch.tensor([entry.planes.shape[:0:-1] for entry in entries], dtype=torch.float32),
            colours=torch.from_numpy(np.stack([entry.colour for entry in entries])),
            first=first,
            count=count,
            masks=masks,
            owners=torch.repeat_interleave(torch.arange(len(entries)), count),
            boxes=torch.from_numpy(np.concatenate([entry.boxes for entry in entries])),
            anchors=torch.from_numpy(np.concatenate([entry.anchors for entry in entries])),
            names=tuple(entry.name for entry in entries),
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
        """The same bank on another device.  Nothing waits for a copy from main memory; one to it is complete."""
        tensors = [field.name for field in fields(self) if field.name != "names"]
        coming = self.device.type == "cpu"
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=coming) for name in tensors})

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


@dataclass(frozen=True, eq=False)
class Entry:
    """One photo of a bank at its own size: ``planes`` (3, h, w) and ``masks`` (K, h, w) uint8, and of the bank's ``colours``,
    ``boxes`` and ``anchors`` what is its own, (3,), (K, 4) and (K, 2) float32."""

    planes: np.ndarray
    masks: np.ndarray
    colour: np.ndarray
    boxes: np.ndarray
    anchors: np.ndarray
    name: str


def make_entry(pixels: np.ndarray, masks: np.ndarray, name: str) -> Entry:
    """``pixels`` (h, w, 3) uint8 RGB and ``masks`` (K, h, w) bool, none empty, at the size that they are trained at."""
    import cv2

    planes = np.stack(cv2.split(pixels))
    colour = np.array(cv2.sumElems(pixels)[:3]) / planes[0].size / 255
    boxes, anchors = (np.array(each, np.float32) for each in zip(*map(box_and_anchor, masks)))
    return Entry(planes, np.where(masks, np.uint8(255), np.uint8(0)), colour.astype(np.float32), boxes, anchors, name)


def lay(planes: np.ndarray, squares: np.ndarray) -> None:
    """Put (K, h, w) into the top left of ``squares`` (K, P, P), which repeat the last row and column from there on."""
    height, width = planes.shape[-2:]
    squares[:, :height, :width] = planes
    squares[:, :height, width:] = planes[:, :, -1:]
    squares[:, height:] = squares[:, height - 1 : height]


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
