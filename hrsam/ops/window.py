"""Plain and padded-shifted window attention over packed token grids.

Each grid is padded at the top and left by ``(window − shift) mod window`` and at the bottom and right to whole windows, then
cut into non-overlapping windows in row-major order.  There is no cyclic roll and no mask between regions: a window holds
true neighbours and padding.  With window 4, shift 2 on a 4×4 grid (``p`` padding, letters windows)::

    shift 0: A A A A      shift 2: p p p p p p p p
             A A A A               p p p p p p p p
             A A A A               p p A A B B p p      every token sees its own window:
             A A A A               p p A A B B p p      here 4 tokens and 12 padding slots
                                   p p C C D D p p
                                   p p C C D D p p
                                   …

* Who sees whom: a token sees the tokens of its window and, if ``pad_kv`` is given, that window's padding slots.
* Exact.  Token order inside a window does not matter beyond the rotary positions.
* Padding is read but never asks (KV-only padding): one learned key and value row, rotated at its own slot.  The padded-query
  form of HRSAM's first version is the same function.
* Without ``pad_kv`` padding slots are left out; a window always holds at least one real token, so no query is without keys.
* Gradients for q, k, v and ``pad_kv``.
* Source: HRSAM (arXiv 2407.02109), "Flash Swin" and "KV-only padding".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hrsam.kernels import resolve_impl
from hrsam.layout import Layout
from hrsam.ops.attend import NOBODY, PADDING, Plan, check_heads, make_plan, operator
from hrsam.ops.rope import Rope, angles, position_table, position_turns, rotate
from hrsam.tables import Table, as_table, cached, count_to, pointers, ranges, row_of


@dataclass(frozen=True)
class WindowPlan:
    """Index tables of one layout, window and shift.

    ``token_of_slot`` int64 (windows · window²,): packed token of each slot, 0 where the slot is padding;
    ``is_token`` bool, same length: False for padding; ``slot_of_token`` int64 (T,): the inverse.
    """

    token_of_slot: Tensor
    is_token: Tensor
    slot_of_token: Tensor


def window_padding(rows: int, cols: int, window: int, shift: int) -> tuple[int, int, int, int]:
    """Padding of a grid as (top, left, bottom, right), in tokens."""
    before = (window - shift) % window
    bottom = -(rows + before) % window
    right = -(cols + before) % window
    return before, before, bottom, right


def window_tokens(grids: Sequence[tuple[int, int]], window: int, shift: int) -> list[Tensor]:
    """For each grid the packed token of every slot, int64 (windows, window, window), −1 for padding."""
    found, start = [], 0
    for rows, cols in grids:
        top, left, bottom, right = window_padding(rows, cols, window, shift)
        grid = torch.arange(start, start + rows * cols).view(rows, cols)
        grid = F.pad(grid, (left, right, top, bottom), value=PADDING)
        tiles = grid.view(grid.shape[0] // window, window, grid.shape[1] // window, window)
        found.append(tiles.transpose(1, 2).flatten(0, 1))
        start += rows * cols
    return found


@cached(256)
def window_plan(layout: Layout, window: int, shift: int, device: torch.device) -> WindowPlan:
    """Index tables of the plain PyTorch path; cached by value."""
    slots = torch.cat([tokens.flatten() for tokens in window_tokens(layout.grids, window, shift)])
    is_token = slots >= 0
    slot_of_token = torch.empty(layout.tokens, dtype=torch.int64)
    slot_of_token[slots[is_token]] = torch.nonzero(is_token).squeeze(1)
    return WindowPlan(slots.clamp(min=0).to(device), is_token.to(device), slot_of_token.to(device))


class _Windows(NamedTuple):
    """All windows of some grids, one after the other.

    ``ptr`` (grids + 1,): pointers to the windows of each grid.  For each window (windows,): its ``grid``; the token ``base``
    its first slot would hold if the grid went on there; ``cols`` of its grid; and its ``shape``, a row of ``inside``
    (shapes, 4): first row, end, first column and end of the tokens in a window.
    """

    ptr: Table
    grid: Table
    base: Table
    cols: Table
    shape: Table
    inside: Table


def _windows(rows: Table, cols: Table, window: int, shift: int) -> _Windows:
    """``rows``, ``cols`` (grids,)."""
    before = (window - shift) % window
    down, across = (-(-(side + before) // window) for side in (rows, cols))
    ptr = pointers(down * across)
    grid = row_of(ptr)
    y, x = np.divmod(count_to(len(grid)) - ptr[grid], across[grid])
    y, x = y * window - before, x * window - before  # outside of the grid where a window begins with padding
    rows, cols, start = rows[grid], cols[grid], pointers(rows * cols)[grid]
    sides = [np.maximum(-y, 0), np.minimum(rows - y, window), np.maximum(-x, 0), np.minimum(cols - x, window)]
    weights = (window + 1) ** np.arange(4)  # one number for the four
    numbers, shape = np.unique(weights @ np.stack(sides), return_inverse=True)
    inside = numbers[:, None] // weights % (window + 1)
    return _Windows(ptr, grid, start + y * cols + x, cols, shape, inside)


def _slots(inside: Table, window: int, tokens_first: bool) -> tuple[Table, NDArray[np.bool_]]:
    """For windows with tokens ``inside`` (shapes, 4): the place, row · ``window`` + column, of each slot and whether it holds a
    token, both (shapes, window²)."""
    sub = 8 if window % 8 == 0 else window
    places = count_to(window * window).reshape(window // sub, sub, window // sub, sub).swapaxes(1, 2).ravel()
    y, x = places // window, places % window
    top, bottom, left, right = inside.T[:, :, None]
    real = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    if not tokens_first:
        return np.broadcast_to(places, real.shape), real
    at = np.argsort(~real, axis=1, kind="stable")
    return places[at], np.take_along_axis(real, at, 1)


def _tiled(
    windows: _Windows, window: int, places: Table, real: NDArray[np.bool_], other: int, tile: int
) -> tuple[Table, Table, Table]:
    """Token numbers and places (tiles, ``tile``), and pointers to the tiles of each window.  Slots without a token hold
    ``other``; tiles of nobody are left out."""
    shape = len(real), -(-real.shape[1] // tile) * tile
    limit, spots = np.full(shape, NOBODY, np.int32), np.zeros(shape, np.int32)
    limit[:, : real.shape[1]] = np.where(real, np.iinfo(np.int32).max, other)  # token numbers are below it
    np.copyto(spots[:, : real.shape[1]], places, where=limit[:, : real.shape[1]] != NOBODY)
    used = -(-np.count_nonzero(limit != NOBODY, axis=1) // tile)
    ptr, rows = ranges(windows.shape * (shape[1] // tile), used[windows.shape])
    of = row_of(ptr)
    limit, tokens, spots = (t.reshape(-1, tile).take(rows, axis=0) for t in (limit, spots // window, spots))
    tokens *= (windows.cols - window)[of, None]
    tokens += spots
    tokens += windows.base[of, None]
    np.minimum(np.maximum(tokens, 0, out=tokens), limit, out=tokens)
    return tokens, spots, ptr


def _bundled(windows: _Windows, bundle: int, tokens: Table, places: Table, tile: int) -> tuple[Table, Table, Table]:
    """``bundle`` neighbouring windows of a grid in each tile: token numbers, places and labels (tiles, ``tile``), from a row
    of tokens and places for each window."""
    bundles = pointers(-(-np.diff(windows.ptr) // bundle))
    nth = count_to(len(tokens)) - windows.ptr[windows.grid]  # of its grid
    held = tokens != NOBODY
    counts = np.bincount(bundles[windows.grid] + nth // bundle, weights=np.count_nonzero(held, axis=1))
    taken = count_to(tile) < counts[:, None]
    labels = np.broadcast_to(nth[:, None] % bundle, tokens.shape)
    found = []
    for values, fill in ((tokens, NOBODY), (places, 0), (labels, 0)):
        found.append(np.full(taken.shape, fill, np.int32))
        found[-1][taken] = values[held]
    return found[0], found[1], found[2]


@cached(256)
def tile_plan(numbers: tuple[int, ...], tiles: tuple[int, int], padded: bool, device: torch.device) -> Plan:
    """The kernel's plan; ``numbers``: window, shift, then rows and columns of each grid.

    Inside a window slots go by 8×8 sub-tiles where the window is made of whole ones, so that tiles of 64 slots are either
    tokens or padding; padding stands last.  Windows smaller than a tile share it, told apart by labels, but never with
    another grid's.
    """
    window, shift, *grids = numbers
    rows, cols = as_table(grids).reshape(-1, 2).T
    windows = _windows(rows, cols, window, shift)
    bundle = max(1, min(tiles) // window**2)
    places, real = _slots(windows.inside, window, tokens_first=bundle == 1)
    others = NOBODY, PADDING if padded else NOBODY
    sides = [
        _tiled(windows, window, places, real, other, tile if bundle == 1 else window**2)
        for other, tile in zip(others, tiles)
    ]
    if bundle == 1:
        (q_tokens, q_places, blocks), (k_tokens, k_places, ptr) = sides
        labels = None
        whole = (np.count_nonzero(real, axis=1) // tiles[1])[windows.shape]
        full, partial = ranges(ptr[:-1], whole), ranges(ptr[:-1] + whole, np.diff(ptr) - whole)
    else:
        (q_tokens, q_places, q_labels), (k_tokens, k_places, k_labels) = (
            _bundled(windows, bundle, *side[:2], tile) for side, tile in zip(sides, tiles)
        )
        blocks, labels = None, (q_labels, k_labels)
        full, partial = (ranges(count_to(len(q_tokens)), np.full(len(q_tokens), n)) for n in (0, 1))
    return make_plan(
        q_tokens, k_tokens, full, partial, tiles=tiles, tokens=int((rows * cols).sum()), device=device, blocks=blocks,
        places=(q_places, k_places), labels=labels,
    )  # fmt: skip


def _turns(numbers, rope, head_dim, device, dtype):
    return position_turns(Rope(*rope), numbers[0], numbers[0], head_dim, device, dtype)


window_operator = operator("window_attention", tile_plan, _turns)


def triton_window_attention(q, k, v, layout, *, rope, window, shift, pad_kv):
    pad_k, pad_v = pad_kv if pad_kv is not None else (None, None)
    numbers = [window, shift, *(side for grid in layout.grids for side in grid)]
    angles = [] if rope is None else [rope.base, rope.scale]
    return window_operator(q, k, v, pad_k, pad_v, numbers, angles, q.shape[2] ** -0.5)[0]


class _ToSlots(torch.autograd.Function):
    """Tokens (T, F) -> slots (S, F), padding slots filled with ``pad`` (F,).

    Each token has exactly one slot, so the backward pass is a gather too: no atomics, deterministic.
    """

    @staticmethod
    def forward(ctx, x, pad, token_of_slot, is_token, slot_of_token):
        ctx.save_for_backward(is_token, slot_of_token)
        return torch.where(is_token.unsqueeze(1), x[token_of_slot], pad)

    @staticmethod
    def backward(ctx, grad):
        is_token, slot_of_token = ctx.saved_tensors
        on_pad = torch.where(is_token.unsqueeze(1), grad.new_zeros(()), grad)
        on_pad = on_pad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)
        return grad[slot_of_token], on_pad, None, None, None


class _ToTokens(torch.autograd.Function):
    """Slots (S, F) -> tokens (T, F); what padding slots hold is dropped."""

    @staticmethod
    def forward(ctx, y, token_of_slot, is_token, slot_of_token):
        ctx.save_for_backward(token_of_slot, is_token)
        return y[slot_of_token]

    @staticmethod
    def backward(ctx, grad):
        token_of_slot, is_token = ctx.saved_tensors
        return torch.where(is_token.unsqueeze(1), grad[token_of_slot], grad.new_zeros(())), None, None, None


def attend_windows(q, k, v, pad_k, pad_v, cos, sin, mask, token_of_slot, is_token, slot_of_token):
    """The tensor-only core: slots, rotation, attention, back to tokens.

    ``q`` (T, N, D), ``k`` (T, Nk, D), ``v`` (T, Nk, Dv); ``pad_k`` (Nk, D) and ``pad_v`` (Nk, Dv) fill padding slots;
    ``cos``, ``sin`` (window², D / 2); ``mask`` (windows, 1, 1, window²), True where a slot may be read, or ``None``.
    """

    def windows(x, pad):
        slots = _ToSlots.apply(x.flatten(1), pad.flatten(), token_of_slot, is_token, slot_of_token)
        return slots.view(-1, cos.shape[0], *x.shape[1:])

    def rotated(x):
        return rotate(x, cos.unsqueeze(1), sin.unsqueeze(1))

    pad_k, pad_v = pad_k.to(k.dtype), pad_v.to(v.dtype)
    slot_q = rotated(windows(q, q.new_zeros(q.shape[1:])))
    slot_k, slot_v = rotated(windows(k, pad_k)), windows(v, pad_v)
    if k.shape[1] != q.shape[1]:
        slot_k, slot_v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=2) for t in (slot_k, slot_v))
    out = F.scaled_dot_product_attention(
        slot_q.transpose(1, 2), slot_k.transpose(1, 2), slot_v.transpose(1, 2), attn_mask=mask
    )
    out = out.transpose(1, 2).flatten(2).flatten(0, 1)
    return _ToTokens.apply(out, token_of_slot, is_token, slot_of_token).unflatten(1, (q.shape[1], v.shape[2]))


def torch_window_attention(q, k, v, layout, *, rope, window, shift, pad_kv):
    plan = window_plan(layout, window, shift, q.device)
    work = torch.promote_types(q.dtype, torch.float32)
    if rope is None:
        cos = torch.ones(window * window, q.shape[2] // 2, dtype=work, device=q.device)
        sin = torch.zeros_like(cos)
    else:
        cos, sin = position_table(rope, window, window, q.shape[2], q.device, work)
    if pad_kv is None:
        pad_kv = k.new_zeros(k.shape[1:]), v.new_zeros(v.shape[1:])
        mask = plan.is_token.view(-1, 1, 1, window * window)
    else:
        mask = None
    tables = plan.token_of_slot, plan.is_token, plan.slot_of_token
    return attend_windows(q, k, v, pad_kv[0], pad_kv[1], cos, sin, mask, *tables)


def naive_window_attention(q, k, v, layout, *, rope, window, shift, pad_kv):
    """The definition: pad the grid, rotate at padded-grid positions, one softmax a query over its window."""
    work = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(work), k.to(work), v.to(work)
    repeats = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=work, device=q.device)
    for (rows, cols), start in zip(layout.grids, layout.starts):
        top, left, _, _ = window_padding(rows, cols, window, shift)
        for y in range(rows):
            for x in range(cols):
                y0, x0 = (y + top) // window * window, (x + left) // window * window
                keys, values, places = [], [], []
                for py in range(y0, y0 + window):
                    for px in range(x0, x0 + window):
                        ky, kx = py - top, px - left
                        if 0 <= ky < rows and 0 <= kx < cols:
                            keys.append(k[start + ky * cols + kx])
                            values.append(v[start + ky * cols + kx])
                        elif pad_kv is not None:
                            keys.append(pad_kv[0].to(work))
                            values.append(pad_kv[1].to(work))
                        else:
                            continue
                        places.append((py, px))
                query, key = q[start + y * cols + x], torch.stack(keys)
                value = torch.stack(values).repeat_interleave(repeats, dim=1)
                if rope is not None:
                    phi = angles(rope, torch.tensor(places, device=q.device), q.shape[2]).unsqueeze(1)
                    key = rotate(key, phi.cos().to(work), phi.sin().to(work))
                    phi = angles(rope, torch.tensor([y + top, x + left], device=q.device), q.shape[2])
                    query = rotate(query, phi.cos().to(work), phi.sin().to(work))
                key = key.repeat_interleave(repeats, dim=1)
                weights = torch.einsum("nd,knd->nk", query, key).mul(q.shape[2] ** -0.5).softmax(dim=1)
                out[start + y * cols + x] = torch.einsum("nk,kne->ne", weights, value)
    return out


FUNCTIONS = {"naive": naive_window_attention, "torch": torch_window_attention, "triton": triton_window_attention}


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    rope: Rope | None = None,
    window: int = 16,
    shift: int = 0,
    pad_kv: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention inside windows of each grid.

    ``q`` (T, N, D), ``k`` (T, Nk, D), ``v`` (T, Nk, Dv), unrotated, ``Nk`` divides ``N`` -> (T, N, Dv) in q's dtype.
    ``pad_kv``: key (Nk, D), unrotated, and value (Nk, Dv) of every padding slot.  Softmax scale is D^-½.
    ``impl``: ``"naive"`` (definition), ``"torch"``, ``"triton"`` (kernel) or ``"auto"``.
    Raises ``ValueError`` for shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    check_heads(q, k, v, layout.tokens)
    if not 0 <= shift < window:
        raise ValueError(f"the shift must be in [0, {window}); got {shift}")
    choice = FUNCTIONS[resolve_impl(impl, q)]
    return choice(q, k, v, layout, rope=rope, window=window, shift=shift, pad_kv=pad_kv).to(q.dtype)
