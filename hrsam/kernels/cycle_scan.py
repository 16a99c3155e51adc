"""Launches of the cycle scan's kernels and the operators ``hrsam::cycle_scan`` and ``hrsam::cycle_scan_backward``.

Partial sums of the device code are added here by PyTorch, so results are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import triton
from torch import Tensor

from hrsam.kernels import cycle_scan_device as programs

CHUNK = 16  # tokens; a lane of B3 keeps 5 values a token in registers
LANES = 32  # channels of a program, one warp
CHAIN_LANES, CHAIN_WARPS = 16, 4  # the same for F2 and B2, whose programs hold all states
CHAIN_AHEAD = 8  # chunks that F2 and B2 load before they use them


@lru_cache(maxsize=256)
def scan_tables(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables for sequences that begin at ``bounds[:-1]``; ``bounds[-1]`` is the number of tokens.

    ``chunks`` int32 (chunks, 3): first token, end of the sequence, sequence; ``first_chunk`` int32 (sequences + 1,):
    the first chunk of each sequence, with the number of chunks at the end.
    """
    starts = torch.tensor(bounds)
    counts = (starts.diff() + CHUNK - 1) // CHUNK
    first_chunk = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    sequence = torch.repeat_interleave(counts)
    place = torch.arange(len(sequence)) - first_chunk[sequence]
    chunks = torch.stack([starts[sequence] + CHUNK * place, starts[sequence + 1], sequence], dim=1)
    return chunks.to(device, torch.int32), first_chunk.to(device, torch.int32)


def _rows(x: Tensor) -> Tensor:
    """Any row stride will do, channels must be neighbours."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _parameters(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float().contiguous() for t in tensors)


def _state_shapes(A_log, bounds):
    """Shapes of ``entry``, ``prefix``, ``elapsed`` and ``closing``."""
    (channels, states), sequences = A_log.shape, len(bounds) - 1
    chunks = sum(-(-(end - start) // CHUNK) for start, end in pairwise(bounds))
    slots = chunks + sequences
    return (slots, states, channels), (slots, channels), (chunks, channels), (sequences, states, channels)


@torch.library.custom_op("hrsam::cycle_scan", mutates_args=())
def _forward(
    u: Tensor, r: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, gamma: Tensor,
    bounds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    chunks, first_chunk = scan_tables(tuple(bounds), u.device)
    (channels, states), cycles, sequences = A_log.shape, gamma.shape[1], len(bounds) - 1
    u, r, B, C = (_rows(t) for t in (u, r, B, C))
    dt_bias, A_log_t, D, gamma = _parameters(dt_bias, A_log.t(), D, gamma)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    shapes = ((len(chunks), states, channels), *_state_shapes(A_log, bounds))
    local, entry, prefix, elapsed, closing = (torch.empty(s, dtype=torch.float32, device=u.device) for s in shapes)
    rows = {"u_row": u.stride(0), "r_row": r.stride(0), "B_row": B.stride(0)}
    sizes = {"channels": channels, "N": states, "CHUNK": CHUNK, "BC": LANES, "num_warps": 1}
    chain = {"NP": triton.next_power_of_2(states), "AHEAD": CHAIN_AHEAD, "BC": CHAIN_LANES, "num_warps": CHAIN_WARPS}
    grid, chain_grid = (len(chunks), triton.cdiv(channels, LANES)), (sequences, triton.cdiv(channels, CHAIN_LANES))
    with torch.cuda.device_of(u):
        programs.local_states[grid](u, r, B, dt_bias, A_log_t, chunks, local, elapsed, **rows, **sizes)
        programs.chain_states[chain_grid](
            local, elapsed, A_log_t, gamma, first_chunk, entry, prefix, closing,
            channels=channels, N=states, R=cycles, **chain,
        )  # fmt: skip
        programs.outputs[grid](
            u, r, B, C, dt_bias, A_log_t, D, gamma, chunks, entry, prefix, closing, y,
            **rows, C_row=C.stride(0), R=cycles, **sizes,
        )  # fmt: skip
    return y, entry, prefix, elapsed, closing


@_forward.register_fake
def _(u, r, dt_bias, A_log, B, C, D, gamma, bounds):
    states = (u.new_empty(shape, dtype=torch.float32) for shape in _state_shapes(A_log, bounds))
    return (u.new_empty(u.shape), *states)


@torch.library.custom_op("hrsam::cycle_scan_backward", mutates_args=())
def _backward(
    w: Tensor, u: Tensor, r: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, gamma: Tensor,
    entry: Tensor, prefix: Tensor, elapsed: Tensor, closing: Tensor, bounds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    types = [t.dtype for t in (u, r, dt_bias, A_log, B, C, D, gamma)]
    chunks, first_chunk = scan_tables(tuple(bounds), u.device)
    (channels, states), cycles, sequences = A_log.shape, gamma.shape[1], len(bounds) - 1
    blocks = triton.cdiv(channels, LANES)
    w, u, r, B, C = (_rows(t) for t in (w, u, r, B, C))
    dt_bias, A_log_t, D, gamma = _parameters(dt_bias, A_log.t(), D, gamma)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=u.device)

    local, leave = empty(len(chunks), states, channels), empty(len(chunks), states, channels)
    suffix, d_last = torch.empty_like(elapsed), torch.empty_like(closing)
    d_delta, d_gamma = empty(sequences, channels), empty(sequences, cycles, channels)
    d_u, d_r = empty(*u.shape, dtype=u.dtype), empty(*r.shape, dtype=r.dtype)
    d_B, d_C, d_A_log = empty(blocks, *B.shape), empty(blocks, *C.shape), torch.empty_like(entry)
    d_dt_bias, d_D, d_total = (torch.empty_like(elapsed) for _ in range(3))
    rows = {"w_row": w.stride(0), "r_row": r.stride(0), "C_row": C.stride(0)}
    sizes = {"channels": channels, "N": states, "CHUNK": CHUNK, "BC": LANES, "num_warps": 1}
    chain = {"NP": triton.next_power_of_2(states), "AHEAD": CHAIN_AHEAD, "BC": CHAIN_LANES, "num_warps": CHAIN_WARPS}
    grid, chain_grid = (len(chunks), blocks), (sequences, triton.cdiv(channels, CHAIN_LANES))
    with torch.cuda.device_of(u):
        programs.local_adjoints[grid](w, r, C, dt_bias, A_log_t, chunks, local, **rows, **sizes)
        programs.chain_adjoints[chain_grid](
            local, elapsed, A_log_t, gamma, first_chunk, entry, prefix,
            leave, suffix, d_last, d_A_log, d_gamma, d_delta,
            channels=channels, N=states, R=cycles, **chain,
        )  # fmt: skip
        programs.gradients[grid](
            w, u, r, B, C, dt_bias, A_log_t, D, gamma, chunks, entry, prefix, closing, leave, suffix, d_last, d_delta,
            d_u, d_r, d_B, d_C, d_dt_bias, d_A_log, d_D, d_total, u.shape[0],
            **rows, u_row=u.stride(0), B_row=B.stride(0), R=cycles, **sizes,
        )  # fmt: skip
    d_gamma = (d_gamma.sum(0) + d_total.sum(0)).t()
    grads = (d_u, d_r, d_dt_bias.sum(0), d_A_log.sum(0).t(), d_B.sum(0), d_C.sum(0), d_D.sum(0), d_gamma)
    return tuple(grad.to(dtype).contiguous() for grad, dtype in zip(grads, types))


@_backward.register_fake
def _(w, u, r, dt_bias, A_log, B, C, D, gamma, *saved):
    return tuple(t.new_empty(t.shape) for t in (u, r, dt_bias, A_log, B, C, D, gamma))


def _save(ctx, inputs, output):
    *tensors, ctx.bounds = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, w, *states):
    return (*_backward(w, *ctx.saved_tensors, ctx.bounds), None)


_forward.register_autograd(_differentiate, setup_context=_save)


def cycle_scan(u, r, dt_bias, A_log, B, C, D, gamma, layout, across):
    """Shapes as in :func:`hrsam.ops.cycle_scan.cycle_scan`, which checks them; float32, float16 and bfloat16.
    Raises ``ValueError`` for float64."""
    if any(t.dtype == torch.float64 for t in (u, r, dt_bias, A_log, B, C, D, gamma)):
        raise ValueError("the kernel computes in float32 and got float64 tensors; use impl='torch' or 'naive' for them")
    return _forward(u, r, dt_bias, A_log, B, C, D, gamma, layout.boundaries(across))[0]
