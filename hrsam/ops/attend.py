"""Exact softmax attention over a plan: which keys each block of queries reads.

A :class:`Plan` cuts queries and keys into tiles of slots and lists, for each tile of queries, the tiles of keys it reads.
FULL tiles hold keys that every query of the tile reads; PARTIAL ones are masked slot by slot: a query reads a slot that
holds a key and, where the plan has labels, the same label.  Tiles in neither list are never touched::

    tiles   k0 k1 k2 k3      q0 reads all of k0 and k1;
    q0      F  F  .  .       q1 a part of k2 (ragged end, other labels …);
    q1      .  .  P  .       q2 nothing: its output is 0 and its log-sum-exp −inf
    q2      .  .  .  .

Slots hold token numbers, so that the order in which tokens are read needs no copy of them: −1 is the padding key, one
learned row of key and value that many slots can share, −2 nobody.  A token has at most one slot among the queries and
one among the keys.  ``places`` are rows of a rotary table: a slot is rotated by its own place, the padding key by the
place of each slot it stands in.

* Exact.  The order of tiles and slots changes rounding only.
* Gradients for q, k, v, the padding key and value, the bias, and through the log-sum-exp.
* Sources: FlashAttention (arXiv 2205.14135), Binary Block Masking (arXiv 2409.15097): lists instead of its flags, and labels
  instead of stored masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hrsam.kernels import resolve_impl
from hrsam.ops.rope import turns
from hrsam.tables import Table, as_table, count_to, pointers, ranges, row_of, to_device

PADDING, NOBODY = -1, -2
Lists = tuple[Table, Table]  # pointers and entries
_NO_GROUPS = np.zeros((0, 3), np.int32)


@dataclass(frozen=True, eq=False)
class Plan:
    """Tiles and lists, int32 tensors on one device, views of one buffer.

    ``q_tokens`` (query tiles, tile_q), ``k_tokens`` (key tiles, tile_k): token numbers; or, with ``runs``, (tiles, 2): first
    token and count of neighbours.  ``q_places``, ``k_places``: rows of the rotary table, as large as the slots; ``q_labels``,
    ``k_labels`` likewise; one element where they are not used.  ``lists``: pointer and index arrays of FULL and PARTIAL key
    tiles of each query tile; ``transposed``: of query tiles of each key tile.  ``tokens``: length T of the sequence;
    ``covers``: every token is a query and a key; ``padded``, ``gaps``: some key slot holds −1, −2.  ``groups`` (groups, 3):
    first query tile, count and first key tile, where neighbouring query tiles read the same ``group_keys`` key tiles, at
    most four, and nothing else; no rows otherwise.
    """

    tile_q: int
    tile_k: int
    tokens: int
    runs: bool
    q_tokens: Tensor
    k_tokens: Tensor
    q_places: Tensor
    k_places: Tensor
    q_labels: Tensor
    k_labels: Tensor
    lists: tuple[Tensor, Tensor, Tensor, Tensor]
    transposed: tuple[Tensor, Tensor, Tensor, Tensor]
    groups: Tensor
    group_keys: int
    covers: bool
    padded: bool
    gaps: bool

    @property
    def labelled(self) -> bool:
        return self.q_labels.ndim == 2

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Token numbers of all slots, (query tiles, tile_q) and (key tiles, tile_k), whether or not stored as runs."""
        if not self.runs:
            return self.q_tokens, self.k_tokens
        return unrolled(self.q_tokens, self.tile_q), unrolled(self.k_tokens, self.tile_k)

    def stats(self) -> dict[str, float]:
        """Shares of tile pairs that are visited, and visited without a mask."""
        pairs = len(self.q_tokens) * len(self.k_tokens)
        full, partial = len(self.lists[1]), len(self.lists[3])
        return {"pairs": pairs, "visited": (full + partial) / pairs, "full": full / pairs}

    def keys_of(self, tile: int) -> tuple[list[int], list[int]]:
        """FULL and PARTIAL key tiles of a query tile."""
        full_ptr, full_idx, part_ptr, part_idx = self.lists
        full = full_idx[full_ptr[tile] : full_ptr[tile + 1]].tolist()
        return full, part_idx[part_ptr[tile] : part_ptr[tile + 1]].tolist()


def make_plan(
    q_tokens: ArrayLike,
    k_tokens: ArrayLike,
    full: Lists,
    partial: Lists,
    *,
    tiles: tuple[int, int],
    tokens: int,
    device: torch.device,
    blocks: Table | None = None,
    places: tuple[ArrayLike, ArrayLike] | None = None,
    labels: tuple[ArrayLike, ArrayLike] | None = None,
    runs: bool = False,
) -> Plan:
    """A plan from its tables on the CPU and the FULL and PARTIAL key tiles of its blocks.

    ``blocks``: pointers (blocks + 1,) to the query tiles of each block, which all read the same; a tile a block unless given.
    ``full``, ``partial``: pointers and key tiles for each block, see :mod:`hrsam.tables` and :func:`lists_of`.
    Blocks with long lists are put first, so that no multiprocessor starts one last.
    Raises ``ValueError`` for tables that do not fit, or a token in two slots of one side.
    """
    q_tokens, k_tokens = as_table(q_tokens), as_table(k_tokens)
    blocks = count_to(len(q_tokens) + 1) if blocks is None else blocks
    if not len(full[0]) == len(partial[0]) == len(blocks):
        raise ValueError(
            f"{len(blocks) - 1} blocks of query tiles need as many lists; got {len(full[0]) - 1} and {len(partial[0]) - 1}"
        )
    unused = np.zeros(1, np.int32)
    q_places, k_places = (as_table(t) for t in places or (unused, unused))
    q_labels, k_labels = (as_table(t) for t in labels or (unused, unused))
    work = np.diff(full[0]) + np.diff(partial[0])
    if (work[1:] > work[:-1]).any():
        order = np.argsort(-work, kind="stable")
        blocks, at = ranges(blocks[:-1][order], np.diff(blocks)[order])
        q_tokens, q_places, q_labels = (t if t is unused else t[at] for t in (q_tokens, q_places, q_labels))
        full, partial = _selected(full, order), _selected(partial, order)
    sides = ("query", q_tokens, tiles[0]), ("key", k_tokens, tiles[1])
    (asked, _, _), (read, padding, nobody) = (_held(*side, runs, tokens) for side in sides)
    groups, group_keys = (_NO_GROUPS, 0) if runs else _groups(full, partial, blocks, len(k_tokens))
    of = row_of(blocks)
    lists = (*_selected(full, of), *_selected(partial, of))
    transposed = (*_readers(full, blocks, len(k_tokens)), *_readers(partial, blocks, len(k_tokens)))
    slots = q_tokens, k_tokens, q_places, k_places, q_labels, k_labels
    ready = to_device((*slots, *lists, *transposed, groups), device)
    return Plan(
        *tiles, tokens, runs, *ready[:6], lists=ready[6:10], transposed=ready[10:14], groups=ready[14],  # type: ignore[arg-type]
        group_keys=group_keys, covers=asked == read == tokens, padded=padding > 0, gaps=nobody > 0,
    )  # fmt: skip


def unrolled(runs: Tensor, tile: int) -> Tensor:
    """Token numbers (tiles, tile) of tiles stored as (first, count)."""
    steps = torch.arange(tile, dtype=runs.dtype, device=runs.device)
    return torch.where(steps < runs[:, 1:], runs[:, :1] + steps, NOBODY)


def lists_of(rows: Sequence[Sequence[int]]) -> Lists:
    """Pointers and entries of lists that are written out."""
    return pointers(as_table([len(row) for row in rows])), as_table([entry for row in rows for entry in row])


def _held(side: str, held: Table, tile: int, runs: bool, tokens: int) -> tuple[int, int, int]:
    """How many slots of a side hold a token, the padding key and nobody; ``ValueError`` if two hold the same token."""
    if runs:
        first, count = held[np.argsort(held[:, 0])].T
        found, padding = int(count.sum()), 0
        twice = (first[1:] < (first + count)[:-1]).any()
        nobody = len(held) * tile - found
    else:
        times = np.bincount(held.ravel() - NOBODY, minlength=2 + tokens)  # of NOBODY, PADDING, token 0, 1, …
        nobody, padding = times[:2].tolist()
        found = held.size - nobody - padding
        twice = times[2:].max() > 1
    if twice:
        raise ValueError(f"a token stands in two {side} slots of the plan; give each token one slot")
    return found, padding, nobody


def _selected(lists: Lists, rows: Table) -> Lists:
    """The lists of ``rows``."""
    ptr, entries = lists
    ptr, at = ranges(ptr[:-1][rows], np.diff(ptr)[rows])
    return ptr, entries[at]


def _readers(lists: Lists, blocks: Table, key_tiles: int) -> Lists:
    """For each key tile the query tiles of the blocks that list it, ascending."""
    ptr, entries = lists
    block = row_of(ptr)[np.argsort(entries, kind="stable")]
    tiles, readers = ranges(blocks[:-1][block], np.diff(blocks)[block])
    return tiles[pointers(np.bincount(entries, minlength=key_tiles))], readers


def _groups(full: Lists, partial: Lists, blocks: Table, key_tiles: int) -> tuple[Table, int]:
    """Runs of query tiles that read the same few neighbouring key tiles, if all do and none shares with another."""
    work = np.diff(full[0]) + np.diff(partial[0])
    size = int(work[0])
    if not 1 <= size <= 4 or (work != size).any():
        return _NO_GROUPS, 0
    by_block = np.argsort(np.concatenate((row_of(full[0]), row_of(partial[0]))), kind="stable")
    reads = np.sort(np.concatenate((full[1], partial[1]))[by_block].reshape(-1, size), axis=1)
    starts = np.flatnonzero(np.diff(reads[:, 0], prepend=-1))
    keys = reads[starts, 0]
    if (reads[:, -1] - reads[:, 0] != size - 1).any() or not np.array_equal(keys, np.arange(0, key_tiles, size)):
        return _NO_GROUPS, 0
    firsts = blocks[starts]
    return np.stack((firsts, np.diff(firsts, append=blocks[-1]), keys), axis=1), size


def naive_attend(q, k, v, plan, *, table=None, pad_kv=None, bias=None, scale=None):
    """The definition, one query at a time; shapes as in :func:`attend`.  ``table``: cos and sin (places, D / 2)."""
    work = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    repeats = q.shape[1] // k.shape[1]
    q, k, v = q.to(work), k.to(work), v.to(work)
    out = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=work, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=work, device=q.device)
    q_slots, k_slots = (t.tolist() for t in plan.slots)
    pads = [t.to(work) for t in pad_kv or ()]

    def turned(x, place):
        if table is None:
            return x
        cos, sin = table[0][place].to(work), table[1][place].to(work)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos + odd * sin, odd * cos - even * sin), -1).flatten(-2)

    for tile, row in enumerate(q_slots):
        full, partial = plan.keys_of(tile)
        for slot, token in enumerate(row):
            keys, values, extra = [], [], []
            for other in (full + partial) if token >= 0 else ():
                for at, key in enumerate(k_slots[other]):
                    if key == NOBODY:
                        continue
                    if plan.labelled and plan.q_labels[tile, slot] != plan.k_labels[other, at] and other in partial:
                        continue
                    row_k, row_v = (k[key], v[key]) if key >= 0 else pads
                    keys.append(turned(row_k, plan.k_places[other, at]) if table is not None else row_k)
                    values.append(row_v)
                    extra.append(bias[key].to(work) if bias is not None and key >= 0 else q.new_zeros(q.shape[1]))
            if keys:
                query = turned(q[token], plan.q_places[tile, slot]) if table is not None else q[token]
                key, value = (torch.stack(t).repeat_interleave(repeats, dim=1) for t in (keys, values))
                logits = torch.einsum("nd,knd->kn", query, key) * scale + torch.stack(extra)
                out[token] = torch.einsum("kn,kne->ne", logits.softmax(0), value)
                lse[token] = logits.logsumexp(0)
    return out, lse


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    table: tuple[Tensor, Tensor] | None = None,
    pad_kv: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the keys its plan gives it.

    ``q`` (T, N, D), ``k`` (T, Nk, D), ``v`` (T, Nk, Dv), unrotated, ``Nk`` divides ``N`` -> output (T, N, Dv) in q's dtype and
    log-sum-exp (T, N), natural logarithm, float32 (float64 for float64 inputs).  ``table``: cos and sin (places, D / 2) of
    :mod:`hrsam.ops.rope`; ``pad_kv``: key (Nk, D), unrotated, and value (Nk, Dv) of slots that hold −1; ``bias`` (T, N) is
    added to the logits of each key; ``scale`` of the products, D^-½ unless given.
    ``impl``: ``"naive"`` (definition, and what ``"torch"`` runs: a plan has no other plain form), ``"triton"``, or ``"auto"``.
    Raises ``ValueError`` for shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    check_heads(q, k, v, plan.tokens)
    if bias is not None and bias.shape != q.shape[:2]:
        raise ValueError(f"the bias is (tokens, heads), here {tuple(q.shape[:2])}; got {tuple(bias.shape)}")
    choice = resolve_impl(impl, q)
    if choice != "triton":
        out, lse = naive_attend(q, k, v, plan, table=table, pad_kv=pad_kv, bias=bias, scale=scale)
        return out.to(q.dtype), lse
    from hrsam.kernels import attend as kernel  # late: needs Triton

    return kernel.attend(q, k, v, plan, None if table is None else turns(*table, q.dtype), pad_kv, bias, scale)


def check_heads(q: Tensor, k: Tensor, v: Tensor, tokens: int) -> None:
    """Shapes of q, k and v against each other and the number of tokens; ``ValueError`` when they do not fit."""
    if q.ndim != 3 or q.shape[0] != tokens or k.shape[0] != tokens or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"the layout has {tokens} tokens; got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"key heads must divide query heads and share their size; got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )


def operator(
    name: str, plan_of: Callable[..., Plan], turns_of: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function ``(q, k, v, pad_k, pad_v, numbers, rope, scale) -> (output, log-sum-exp)`` the compiler knows as
    ``hrsam::name`` and does not look into.

    ``numbers`` describe the plan, ``rope`` is (base, scale) or empty.  ``plan_of(numbers, tiles, padded, device)`` and
    ``turns_of(numbers, rope, head_dim, device, dtype)`` are called at run time and cache what they return, so that no index is
    built twice.  ``tiles`` is what :func:`hrsam.kernels.attend.tiles` says for the forward or the backward pass.
    """

    def prepare(q, v, pad_k, numbers, rope, backward):
        from hrsam.kernels import attend as kernel  # late: needs Triton

        size = kernel.tiles(max(q.shape[2], v.shape[2]), q.dtype, backward, name == "window_attention")
        plan = plan_of(tuple(numbers), (size.queries, size.keys), pad_k is not None, q.device)
        table = turns_of(tuple(numbers), tuple(rope), q.shape[2], q.device, q.dtype) if rope else None
        return kernel, plan, table, (size.warps, size.stages)

    @torch.library.custom_op(f"hrsam::{name}", mutates_args=())
    def forward(
        q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None,
        numbers: Sequence[int], rope: Sequence[float], scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        kernel, plan, table, options = prepare(q, v, pad_k, numbers, rope, False)
        return kernel.forward(kernel.Inputs(q, k, v, table, pad_k, pad_v, None), plan, scale, *options)

    @forward.register_fake
    def _(q, k, v, pad_k, pad_v, numbers, rope, scale):
        return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)

    @torch.library.custom_op(f"hrsam::{name}_backward", mutates_args=())
    def backward(
        q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None, out: Tensor, lse: Tensor,
        d_out: Tensor, numbers: Sequence[int], rope: Sequence[float], scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        kernel, plan, table, options = prepare(q, v, pad_k, numbers, rope, True)
        inputs = kernel.Inputs(q, k, v, table, pad_k, pad_v, None)
        d_q, d_k, d_v, d_pad_k, d_pad_v, _ = kernel.backward(inputs, plan, scale, *options, out, lse, d_out, None)
        d_pad_k, d_pad_v = (q.new_zeros(0) if t is None else t for t in (d_pad_k, d_pad_v))
        return d_q, d_k, d_v, d_pad_k, d_pad_v

    @backward.register_fake
    def _(q, k, v, pad_k, pad_v, out, lse, d_out, numbers, rope, scale):
        pads = (
            q.new_empty(0 if t is None else t.shape, dtype=q.dtype if t is None else t.dtype) for t in (pad_k, pad_v)
        )
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *pads

    def save(ctx, inputs, output):
        *tensors, ctx.numbers, ctx.rope, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)

    def differentiate(ctx, d_out, d_lse):  # the log-sum-exp of these operators is not for use
        *tensors, out, lse = ctx.saved_tensors
        grads = backward(*tensors, out, lse, d_out, ctx.numbers, ctx.rope, ctx.scale)
        return (*(None if t is None else g for g, t in zip(grads, tensors)), None, None, None)

    forward.register_autograd(differentiate, setup_context=save)
    return forward
