"""Launches of attention over a plan, and its autograd function.

Partial sums of the device code are added here by PyTorch, so results are deterministic.  A plan is any object with the
fields of ``hrsam.ops.attend.Plan``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hrsam.kernels import attend_device as programs
from hrsam.kernels import attend_gradients as gradients


class Tiles(NamedTuple):
    """Slots of a tile of queries and of keys, warps of a program, stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(head_dim: int, dtype: torch.dtype, backward: bool = False, window: bool = False) -> Tiles:
    """Sizes for heads of up to 256 channels.

    Raises ``ValueError`` for larger heads or float64, which the kernels do not take.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"the kernel computes in float32 and got {dtype} tensors; use impl='torch' or 'naive' for them"
        )
    if head_dim > 256:
        raise ValueError(f"the kernel takes heads of up to 256 channels; got {head_dim}")
    if dtype == torch.float32:
        if head_dim <= 64:
            return Tiles(32, 32, 4, 1) if backward else Tiles(64, 32, 4, 1)
        return Tiles(32, 16, 4, 1) if head_dim <= 128 and not backward else Tiles(16, 16, 4, 1)
    if backward:
        if head_dim <= 64:
            return Tiles(64, 64, 4, 2)
        return Tiles(64, 32, 4, 1) if head_dim <= 128 else Tiles(32, 32, 4, 1)
    if head_dim <= 64:
        return Tiles(64, 64, 4, 1) if window else Tiles(128, 64, 8, 3)
    return Tiles(128, 64, 8, 2) if head_dim <= 128 else Tiles(64, 32, 4, 2)


class Inputs(NamedTuple):
    """What forward and backward take; ``None`` where a plan has no rotation, padding key or bias.  ``turns`` (places, D):
    cos and sin of each channel pair, see :func:`hrsam.ops.rope.turns`."""

    q: Tensor
    k: Tensor
    v: Tensor
    turns: Tensor | None
    pad_k: Tensor | None
    pad_v: Tensor | None
    bias: Tensor | None


def _ready(inputs: Inputs) -> Inputs:
    """Channels are neighbours, small tables contiguous; padding in the dtype of the rows it stands among."""
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in inputs[:3])
    pad_k = None if inputs.pad_k is None else inputs.pad_k.to(k.dtype).contiguous()
    pad_v = None if inputs.pad_v is None else inputs.pad_v.to(v.dtype).contiguous()
    bias = None if inputs.bias is None else inputs.bias.float().contiguous()
    return Inputs(q, k, v, inputs.turns, pad_k, pad_v, bias)


def _power_of_two(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _constants(x: Inputs, plan: Any) -> dict[str, Any]:
    rope = x.turns is not None
    D, DV = x.q.shape[2], x.v.shape[2]
    return {
        "q_row": x.q.stride(0), "q_head": x.q.stride(1), "k_row": x.k.stride(0), "k_head": x.k.stride(1),
        "v_row": x.v.stride(0), "v_head": x.v.stride(1), "heads": x.q.shape[1], "GROUP": x.q.shape[1] // x.k.shape[1],
        "D": D, "DP": max(32, _power_of_two(D)) if rope else _power_of_two(D), "DV": DV, "DVP": _power_of_two(DV),
        "BM": plan.tile_q, "BN": plan.tile_k, "ROPE": rope, "PAD": x.pad_k is not None and plan.padded, "LABELS": plan.labelled,
        "BIAS": x.bias is not None, "RUNS": plan.runs, "PRECISION": "ieee" if x.q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _pointers(x: Inputs) -> tuple[Tensor, ...]:
    """A tensor for every pointer; those that stand for nothing are never read."""
    return tuple(x.q if t is None else t for t in (x.q, x.k, x.v, x.bias, x.turns, x.pad_k, x.pad_v))


def _tables(plan: Any) -> tuple[Tensor, ...]:
    return plan.q_tokens, plan.k_tokens, plan.q_places, plan.k_places, plan.q_labels, plan.k_labels


def forward(inputs: Inputs, plan: Any, scale: float, warps: int, stages: int) -> tuple[Tensor, Tensor]:
    """Output (T, N, Dv) in q's dtype and log-sum-exp (T, N) float32."""
    x = _ready(inputs)
    fill = torch.empty if plan.covers else torch.zeros
    out = fill(*x.q.shape[:2], x.v.shape[2], dtype=x.q.dtype, device=x.q.device)
    lse = torch.empty(x.q.shape[:2], dtype=torch.float32, device=x.q.device)
    if not plan.covers:
        lse.fill_(-math.inf)
    pointers, constants = _pointers(x), _constants(x, plan)
    base2 = scale * math.log2(math.e)
    with torch.cuda.device_of(x.q):
        if len(plan.groups) and x.bias is None:
            for name in ("BIAS", "RUNS"):
                del constants[name]
            programs.attend_groups[x.q.shape[1], len(plan.groups)](
                *pointers[:3], *pointers[4:], out, lse, *_tables(plan), plan.groups, base2,
                **constants, MASKED=plan.gaps or plan.labelled, KEYS=plan.group_keys, num_warps=warps, num_stages=stages,
            )  # fmt: skip
            return out, lse
        programs.attend[len(plan.q_tokens), x.q.shape[1]](
            *pointers, out, lse, *_tables(plan), *plan.lists, base2, **constants,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def backward(
    inputs: Inputs, plan: Any, scale: float, warps: int, stages: int,
    out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, the padding key and value, and the bias."""
    x = _ready(inputs)
    d_out = d_out.contiguous()
    delta = (d_out.float() * out.float()).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse

    def empty(*shape, dtype=torch.float32):
        return (torch.empty if plan.covers else torch.zeros)(shape, dtype=dtype, device=x.q.device)

    (tokens, heads, D), (key_heads, DV) = x.q.shape, x.v.shape[1:]
    d_q, d_k = empty(*x.q.shape, dtype=x.q.dtype), empty(*x.k.shape, dtype=x.k.dtype)
    d_v = empty(*x.v.shape, dtype=x.v.dtype)
    d_bias = empty(tokens, heads) if x.bias is not None else None
    count = len(plan.k_tokens) if x.pad_k is not None and plan.padded else 0
    d_pad_k, d_pad_v = empty(count, key_heads, D), empty(count, key_heads, DV)
    scales = scale * math.log2(math.e), scale
    saved, options = (*_pointers(x), d_out, lse, delta), {"num_warps": warps, "num_stages": stages}
    with torch.cuda.device_of(x.q):
        gradients.key_gradients[len(plan.k_tokens), key_heads](
            *saved, d_k, d_v, delta if d_bias is None else d_bias, d_pad_k, d_pad_v,
            *_tables(plan), *plan.transposed, *scales, **_constants(x, plan), **options,
        )  # fmt: skip
        gradients.query_gradients[len(plan.q_tokens), heads](
            *saved, d_q, *_tables(plan), *plan.lists, *scales, **_constants(x, plan), **options
        )
    if inputs.pad_k is None or inputs.pad_v is None:
        return d_q, d_k, d_v, None, None, d_bias
    return d_q, d_k, d_v, d_pad_k.sum(0).to(inputs.pad_k.dtype), d_pad_v.sum(0).to(inputs.pad_v.dtype), d_bias


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, turns, pad_k, pad_v, bias, plan, scale, options):
        inputs = Inputs(q, k, v, turns, pad_k, pad_v, bias)
        out, lse = forward(inputs, plan, scale, *options)
        ctx.save_for_backward(*inputs, out, lse)
        ctx.plan, ctx.scale, ctx.options = plan, scale, options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):
        *inputs, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        grads = backward(Inputs(*inputs), ctx.plan, ctx.scale, *ctx.options, out, lse, d_out, d_lse)
        d_q, d_k, d_v, d_pad_k, d_pad_v, d_bias = grads
        if d_bias is not None:
            d_bias = d_bias.to(inputs[6].dtype)
        return d_q, d_k, d_v, None, d_pad_k, d_pad_v, d_bias, None, None, None


def attend(q, k, v, plan, turns, pad_kv, bias, scale):
    """As :func:`hrsam.ops.attend.attend`, which checks the shapes; float32, float16 and bfloat16."""
    size = tiles(max(q.shape[2], v.shape[2]), q.dtype)
    pad_k, pad_v = pad_kv if pad_kv is not None else (None, None)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return _Attend.apply(q, k, v, turns, pad_k, pad_v, bias, plan, scale, (size.warps, size.stages))
