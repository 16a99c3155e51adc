"""Photos of a bank seen through linear maps, whole batches with few large operations.

Points are (x, y) in pixels, pixel i covering [i, i + 1], on photos and on canvases alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from hrsam.data.bank import PhotoBank

LEVELS = 4  # a photo at full, half, quarter and eighth size
SMOOTHING = 0.7  # of masks; without it enlarged outlines are stairs, at 0.75 lines one photo pixel wide vanish


@dataclass(frozen=True, eq=False)
class Placement:
    """canvas = ``matrix`` (B, 2, 2) · (photo - ``source``) + ``target``, both (B, 2)."""

    matrix: Tensor
    source: Tensor
    target: Tensor

    @property
    def scale(self) -> Tensor:
        m = self.matrix
        return (m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]).abs().sqrt()

    def bounds(self, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest canvas coordinates (B, 2) of photos with ``sizes`` (B, 2)."""
        middle = times(self.matrix, sizes / 2 - self.source) + self.target
        half = times(self.matrix.abs(), sizes / 2)
        return middle - half, middle + half


def linear(across: Tensor, down: Tensor, mirror: Tensor, angle: Tensor) -> Tensor:
    """(B, 2, 2): scale x by ``across`` and y by ``down``, mirror x, then turn."""
    across = torch.where(mirror, -across, across)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos * across, -sin * down, sin * across, cos * down), 1).view(-1, 2, 2)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector for each canvas, outside of matmul, where TF32 would move points by half a pixel."""
    return (matrix * vector.unsqueeze(1)).sum(2)


def warp(
    bank: PhotoBank, photo: Tensor, masks: Tensor, placement: Placement, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Photos and their ``masks`` (B, M) seen through ``placement``.

    Returns colours (B, 3, S, S) in [0, 1], which repeat the photo's edge beyond it, masks (B, M, S, S) in [0, 1], and
    where the photo is, (B, 1, S, S) bool.  A photo that shrinks is read from an averaged copy of the size that is
    nearest above, so at most 1.6 photo pixels are skipped.
    """
    level = (0.3 - placement.scale.log2()).floor().clamp(0, LEVELS - 1).long()
    sheet = _sheet(bank.photos[photo], bank.masks[masks])
    unit, corner = constant(_levels(bank.side), bank.device).view(LEVELS, 2, 2)[level].unbind(1)
    grid = _grid(placement, unit, corner, side)
    low, high = corner.view(-1, 1, 1, 2), torch.addcmul(corner, unit, bank.sizes[photo]).view(-1, 1, 1, 2)
    inside = (grid >= low).logical_and_(grid <= high)
    half = (
        constant(_levels(bank.side)[:2], bank.device) / 2
    )  # a pixel of the sheet: the outermost ones' middles are read
    low = low + half
    grid.clamp_(low, (high - half).maximum(low))
    seen = F.grid_sample(sheet, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return seen[:, :3], seen[:, 3:], (inside[..., 0] & inside[..., 1]).unsqueeze(1)


def _grid(placement: Placement, unit: Tensor, corner: Tensor, side: int) -> Tensor:
    """(B, S, S, 2): where the canvas pixels' centres are, in coordinates in which a photo pixel is ``unit`` (B, 2) wide and
    high and the photo begins at ``corner`` (B, 2)."""
    a, b, c, d = placement.matrix.flatten(1).unbind(1)
    inverse = torch.stack((d, -c, -b, a), 1).view(-1, 2, 2) / (a * d - b * c).view(-1, 1, 1)
    x, y = (inverse * unit.unsqueeze(1)).unsqueeze(2).unbind(1)  # (B, 1, 2): what a step to the right, and down, adds
    centres = torch.arange(side, device=unit.device).view(1, -1, 1) + 0.5
    across, down = ((centres - place.view(-1, 1, 1)) * step for place, step in zip(placement.target.unbind(1), (x, y)))
    down = down + torch.addcmul(corner, unit, placement.source).unsqueeze(1)
    return across.unsqueeze(1) + down.unsqueeze(2)


def _sheet(photos: Tensor, masks: Tensor) -> Tensor:
    """uint8 (B, 3, P, P) and (B, M, P, P) → float32 (B, 3 + M, P, 3P/2) in [0, 1] with smaller copies to read from.

    Right of the full size stands the half, below that the quarter, then the eighth.  Masks are smoothed.
    """
    batch, side = photos.shape[0], photos.shape[-1]
    sheet = torch.empty(batch, 3 + masks.shape[1], side, side + side // 2, device=photos.device)
    sheet[..., side:] = 0  # beside the copies: a neighbour that is NaN counts even with weight 0
    full = sheet[..., :side]
    torch.div(photos, 255, out=full[:, :3])
    sharp = masks / 255
    blurred = F.avg_pool2d(sharp, 3, stride=1, padding=1, count_include_pad=False)
    torch.lerp(sharp, blurred, SMOOTHING, out=full[:, 3:])
    top = 0
    for level in range(1, LEVELS):
        full, part = F.avg_pool2d(full, 2), side >> level
        sheet[..., top : top + part, side : side + part] = full
        top += part
    return sheet


@lru_cache(maxsize=64)
def _levels(side: int) -> tuple[float, ...]:
    """Width and height of a photo pixel, and x and y of the photo's corner, at each level, in a sheet from -1 to 1."""
    width, height = side + side // 2, side
    found: list[float] = []
    for level in range(LEVELS):
        left, top = (side, side * (1 - 2 * 0.5**level)) if level else (0, 0)
        found += [2 * 0.5**level / width, 2 * 0.5**level / height, 2 * left / width - 1, 2 * top / height - 1]
    return tuple(found)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device, copied there once."""
    return torch.tensor(values, device=device)
