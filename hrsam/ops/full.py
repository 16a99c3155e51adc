"""Full attention: every token of an image sees every token of the same image.

* Who sees whom: all grids of an image together, images never::

      image 0  x x x . .
               x x x . .
               x x x . .
      image 1  . . . x x
               . . . x x

* Exact.  Token order does not matter beyond the rotary positions, which are row and column in the token's own grid.
* There is no padding: ``pad_kv``, which every mixer is given, is not read.
* There are no queries without keys.  Gradients for q, k and v.
* Source: FlashAttention (arXiv 2205.14135); the plan stores one range of tiles an image, never T² of anything.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from hrsam.kernels import resolve_impl
from hrsam.layout import Layout
from hrsam.ops.attend import Plan, check_heads, make_plan, operator
from hrsam.ops.rope import Rope, angles, position_table, position_turns, rotate
from hrsam.tables import as_table, cached, count_to, pieces, ranges


def naive_full_attention(q, k, v, layout, *, rope):
    """The definition: one softmax over all tokens of the image."""
    work = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(work), k.to(work), v.to(work)
    if rope is not None:
        places = [(y, x) for rows, cols in layout.grids for y in range(rows) for x in range(cols)]
        phi = angles(rope, torch.tensor(places, device=q.device), q.shape[2]).unsqueeze(1)
        q, k = (rotate(t, phi.cos().to(work), phi.sin().to(work)) for t in (q, k))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    out = []
    for start, end in pairwise(layout.image_starts):
        logits = torch.einsum("qnd,knd->nqk", q[start:end], k[start:end]) * q.shape[2] ** -0.5
        out.append(torch.einsum("nqk,kne->qne", logits.softmax(-1), v[start:end]))
    return torch.cat(out)


@cached(64)
def _rotations(layout: Layout, rope: Rope, head_dim: int, device: torch.device, dtype: torch.dtype):
    """cos and sin (T, 1, head_dim / 2) of every token."""
    tables = [position_table(rope, *grid, head_dim, device, dtype) for grid in layout.grids]
    return tuple(torch.cat(parts).unsqueeze(1) for parts in zip(*tables))


def torch_full_attention(q, k, v, layout, *, rope):
    if rope is not None:
        work = torch.promote_types(q.dtype, torch.float32)
        turn = _rotations(layout, rope, q.shape[2], q.device, work)
        q, k = rotate(q, *turn), rotate(k, *turn)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    out = []
    for start, end in pairwise(layout.image_starts):
        one, keys, values = (t[start:end].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        out.append(F.scaled_dot_product_attention(one, keys, values)[0].transpose(0, 1))
    return torch.cat(out)


@cached(64)
def full_plan(numbers: tuple[int, ...], tiles: tuple[int, int], padded: bool, device: torch.device) -> Plan:
    """The kernel's plan; ``numbers``: for each grid rows, columns and image."""
    layout = Layout(tuple(zip(numbers[::3], numbers[1::3])), tuple(numbers[2::3]))
    down, across = (count_to(max(numbers[i::3])) for i in (0, 1))
    down *= len(across)
    places = np.empty(layout.tokens + max(tiles), np.int32)
    for (rows, cols), start in zip(layout.grids, layout.starts):
        np.add(down[:rows, None], across[:cols], out=places[start : start + rows * cols].reshape(rows, cols))
    places[layout.tokens :] = places[layout.tokens - 1]  # of slots behind the last token
    bounds = as_table(layout.image_starts)
    sides = []
    for tile in tiles:
        first, end, _, ptr = pieces(bounds[:-1], bounds[1:], tile)
        sides.append((np.stack((first, end - first), axis=1), sliding_window_view(places, tile)[first], ptr))
    (queries, q_places, blocks), (keys, k_places, ptr) = sides
    whole = np.diff(bounds) // tiles[1]  # key tiles of each image; there is one more if something is left
    full, partial = ranges(ptr[:-1], whole), ranges(ptr[:-1] + whole, np.diff(ptr) - whole)
    return make_plan(
        queries, keys, full, partial, tiles=tiles, tokens=layout.tokens, device=device, blocks=blocks,
        places=(q_places, k_places), runs=True,
    )  # fmt: skip


def _turns(numbers, rope, head_dim, device, dtype):
    return position_turns(Rope(*rope), max(numbers[::3]), max(numbers[1::3]), head_dim, device, dtype)


full_operator = operator("full_attention", full_plan, _turns)


def triton_full_attention(q, k, v, layout, *, rope):
    numbers = [n for (rows, cols), image in zip(layout.grids, layout.images) for n in (rows, cols, image)]
    angles = [] if rope is None else [rope.base, rope.scale]
    return full_operator(q, k, v, None, None, numbers, angles, q.shape[2] ** -0.5)[0]


FUNCTIONS = {"naive": naive_full_attention, "torch": torch_full_attention, "triton": triton_full_attention}


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    rope: Rope | None = None,
    pad_kv: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention among all tokens of each image.

    ``q`` (T, N, D), ``k`` (T, Nk, D), ``v`` (T, Nk, Dv), unrotated, ``Nk`` divides ``N`` -> (T, N, Dv) in q's dtype.
    Softmax scale is D^-½.  ``pad_kv`` is what every mixer is given; full attention has no padding and does not read it.
    ``impl``: ``"naive"`` (definition), ``"torch"``, ``"triton"`` (kernel) or ``"auto"``.
    Raises ``ValueError`` for shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    check_heads(q, k, v, layout.tokens)
    return FUNCTIONS[resolve_impl(impl, q)](q, k, v, layout, rope=rope).to(q.dtype)
