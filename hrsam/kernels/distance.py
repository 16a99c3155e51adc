"""Triton kernels of the exact squared distance transform; ``hrsam.ops.distance`` has the definition.

(1) ``along_rows``: distance of each pixel to the nearest False pixel of its row, by running maxima.  (2) ``across_rows``:
the minimum over rows y' of ``(y − y')² + g(y')²``, walking outwards from the pixel: at step k no row nearer than k is left,
so a tile is done as soon as k² reaches the largest minimum in it.  Work is O(H · W · depth).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 128  # of a tile of the second kernel


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit
def along_rows(mask, g, width, BLOCK: tl.constexpr):
    """One program a row; pixels left and right of the picture are False."""
    row = tl.program_id(0).to(tl.int64) * width
    x = tl.arange(0, BLOCK)
    inside = x < width
    on = tl.load(mask + row + x, inside, other=0) != 0
    before = tl.associative_scan(tl.where(on, -1, x), 0, _greater)
    after = -tl.associative_scan(tl.where(on, -width, -x), 0, _greater, reverse=True)
    tl.store(g + row + x, tl.minimum(x - before, after - x).to(tl.int16), inside)


@triton.jit
def across_rows(g, out, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program a tile; rows above and below the picture are False."""
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    picture = tl.program_id(2).to(tl.int64) * height * width
    inside = (y < height) & (x < width)
    own = tl.load(g + picture + y * width + x, inside, other=0).to(tl.int32)
    edge = tl.minimum(y + 1, height - y)
    best = tl.minimum(own * own, tl.where(inside, edge * edge, 0))
    k = 1
    while k * k < tl.max(tl.max(best, 1), 0):
        above = tl.load(g + picture + (y - k) * width + x, inside & (y >= k), other=0).to(tl.int32)
        below = tl.load(g + picture + (y + k) * width + x, inside & (y + k < height), other=0).to(tl.int32)
        nearer = tl.minimum(above * above, below * below) + k * k
        best = tl.minimum(best, tl.where(inside, nearer, 0))
        k += 1
    tl.store(out + picture + y * width + x, best, inside)


def squared_distance(mask: Tensor) -> Tensor:
    """(n, H, W) bool -> (n, H, W) int32."""
    count, height, width = mask.shape
    g = torch.empty(mask.shape, dtype=torch.int16, device=mask.device)
    out = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)
    if mask.numel() == 0:
        return out
    mask = mask.contiguous().view(torch.uint8)
    tiles = (triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS), count)
    with torch.cuda.device_of(mask):
        along_rows[(count * height,)](mask, g, width, BLOCK=triton.next_power_of_2(width))
        across_rows[tiles](g, out, height, width, ROWS=ROWS, COLUMNS=COLUMNS)
    return out
