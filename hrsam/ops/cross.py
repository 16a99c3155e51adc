"""Attention of a few queries to many keys, cut into parts that run side by side and are merged by their log-sum-exp.

* Who sees whom: every query of an image sees all keys of that image::

      image 0  x x x x . . . .      4 of these columns are one part
      image 1  . . . . x x x x

* Exact: ``softmax`` over the parts' log-sum-exps weighs their outputs.
* No gradients; for decoding.  Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hrsam.ops.attend import Plan, make_plan
from hrsam.tables import cached, count_to, pieces, ranges

PART = 1024  # keys of a part


@cached(64)
def part_plan(images: int, queries: int, keys: int, tiles: tuple[int, int], device: torch.device) -> Plan:
    """Rows of queries: part, image, query; rows of keys: image, key."""
    parts = max(1, keys // PART)
    per_image = -(-keys // tiles[1])
    sides = []
    for sequences, length, tile in ((parts * images, queries, tiles[0]), (images, keys, tiles[1])):
        starts = count_to(sequences) * length
        first, end, _, ptr = pieces(starts, starts + length, tile)
        sides.append((np.stack((first, end - first), axis=1), ptr))
    (q_runs, blocks), (k_runs, _) = sides
    part, image = np.divmod(count_to(parts * images), images)
    begin, stop = part * per_image // parts, (part + 1) * per_image // parts
    left = (stop * tiles[1] > keys).astype(np.int32)  # the image's last key tile, if it is not whole
    full = ranges(image * per_image + begin, stop - begin - left)
    partial = ranges(image * per_image + stop - left, left)
    return make_plan(
        q_runs, k_runs, full, partial, tiles=tiles, tokens=images * keys, device=device, blocks=blocks, runs=True
    )  # fmt: skip


def merge(outputs: Tensor, lse: Tensor) -> Tensor:
    """Join attentions to disjoint keys: ``outputs`` (parts, ..., D) and ``lse`` (parts, ...) -> (..., D) float32."""
    return (lse.softmax(0).unsqueeze(-1) * outputs.float()).sum(0)


def cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q`` (B, N, Tq, D), ``k`` (B, N, Tk, D), ``v`` (B, N, Tk, Dv) -> (B, N, Tq, Dv) in q's dtype, scale D^-½.

    Runs the attention kernel, so tensors lie on a GPU (or Triton interprets); float32, float16 or bfloat16.
    """
    from hrsam.kernels import attend as kernel  # late: needs Triton

    images, heads, queries, dim = q.shape
    keys = k.shape[2]
    tiles = (16 if queries <= 16 else 64, 128)
    plan = part_plan(images, queries, keys, tiles, q.device)
    parts = max(1, keys // PART)
    rows = q.transpose(1, 2).expand(parts, -1, -1, -1, -1).reshape(-1, heads, dim)
    k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
    out, lse = kernel.forward(kernel.Inputs(rows, k, v, None, None, None, None), plan, dim**-0.5, 4, 2)
    shape = parts, images, queries, heads
    return merge(out.view(*shape, -1), lse.view(shape)).transpose(1, 2).to(q.dtype)
