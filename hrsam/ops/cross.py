"""Attention of a few queries to many keys, cut into parts that run side by side and are merged by their log-sum-exp.

* Who sees whom: every query of an image sees all keys of that image::

      image 0  x x x x . . . .      4 of these columns are one part
      image 1  . . . . x x x x

* Exact: ``softmax`` over the parts' log-sum-exps weighs their outputs.
* No gradients; for decoding.  Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hrsam.ops.attend import Plan, make_plan

PART = 1024  # keys of a part


@lru_cache(maxsize=64)
def part_plan(images: int, queries: int, keys: int, tiles: tuple[int, int], device: torch.device) -> Plan:
    """Rows of queries: part, image, query; rows of keys: image, key."""
    parts = max(1, keys // PART)
    per_image = -(-keys // tiles[1])
    q_runs = [
        ((part * images + image) * queries + first, min(tiles[0], queries - first))
        for part in range(parts) for image in range(images) for first in range(0, queries, tiles[0])
    ]  # fmt: skip
    k_runs = [
        (image * keys + first, min(tiles[1], keys - first))
        for image in range(images) for first in range(0, keys, tiles[1])
    ]  # fmt: skip
    full: list[list[int]] = []
    partial: list[list[int]] = []
    for first, _ in q_runs:
        part, image = divmod(first // queries, images)
        mine = range(image * per_image + part * per_image // parts, image * per_image + (part + 1) * per_image // parts)
        full.append([t for t in mine if k_runs[t][1] == tiles[1]])
        partial.append([t for t in mine if k_runs[t][1] < tiles[1]])
    return make_plan(
        torch.tensor(q_runs), torch.tensor(k_runs), full, partial, tiles=tiles, tokens=images * keys, device=device,
        runs=True,
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
