"""Launches of the cycle scan's kernels and the operators ``hrsam::cycle_scan`` and ``hrsam::cycle_scan_backward``.

Partial sums of the device code are added here by PyTorch, so results are deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import triton
from torch import Tensor

from hrsam.kernels import cycle_scan_device as programs
from hrsam.kernels import cycle_scan_gradients as gradients
from hrsam.kernels import interpreting
from hrsam.tables import as_table, cached, pieces, to_device

CHUNK = 8  # tokens of a chunk of the backward pass; a lane of B3 keeps 5 values a token and channel in registers
LANES = 64  # channels of a program of B1 and B3, one warp
CHUNKS = 88  # of a long sequence in the forward pass,
SHORTEST = 16  # and tokens of a chunk of a short one
ENTER_LANES, ENTER_WARPS = 32, 2  # channels and warps of a program between F2 and F3
CHAIN_LANES, CHAIN_WARPS = 16, 4  # channels and warps of F2 and B2, whose programs hold all states
CHAIN_AHEAD = 8  # chunks that F2 and B2 load before they use them


def chunk_length(tokens: int) -> int:
    """Tokens of a chunk of the forward pass of a sequence of ``tokens``: many chunks keep a GPU busy, few keep F2 short.
    With 88 of them the programs of 768 channels fill an H100 once.

    It depends on nothing else, so that a result does not depend on what else is packed.
    """
    return max(SHORTEST, -(-tokens // CHUNKS))


@cached(256)
def scan_tables(bounds: tuple[int, ...], chunk: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables for sequences that begin at ``bounds[:-1]``; ``bounds[-1]`` is the number of tokens.

    ``chunks`` int32 (chunks, 3): first token, end, sequence; ``first_chunk`` int32 (sequences + 1,): the first chunk of
    each sequence, with the number of chunks at the end.  ``chunk``: tokens of a chunk, or ``None`` for
    :func:`chunk_length`.
    """
    starts, sizes = as_table(bounds), as_table([chunk or chunk_length(end - start) for start, end in pairwise(bounds)])
    *chunks, first_chunk = pieces(starts[:-1], starts[1:], sizes)
    chunks, first_chunk = to_device((np.stack(chunks, axis=1), first_chunk), device)
    return chunks, first_chunk


def _rows(x: Tensor) -> Tensor:
    """Any row stride will do, channels must be neighbours."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _parameters(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float().contiguous() for t in tensors)


def _sizes(channels: int, states: int, cycles: int) -> dict[str, int]:
    return {"channels": channels, "N": states, "R": cycles}


def _states(inputs, first_chunk, sizes):
    """F1 and F2: end states of chunks, ``entry``, ``prefix``, ``elapsed`` and ``closing`` for the chunks of a table."""
    A_log, gamma, chunks, device = inputs[5], inputs[7], inputs[8], inputs[0].device
    channels, states, sequences = sizes["channels"], sizes["N"], len(first_chunk) - 1
    slots = len(chunks) + sequences
    shapes = (len(chunks), states, channels), (slots, states, channels), (slots, channels), (len(chunks), channels)
    local, entry, prefix, elapsed, closing = (
        torch.empty(s, dtype=torch.float32, device=device) for s in (*shapes, (sequences, states, channels))
    )
    _scan_chunks(inputs, local, elapsed, inputs[0], sizes, False)
    programs.chain_states[sequences, triton.cdiv(channels, CHAIN_LANES)](
        local, elapsed, A_log, gamma, first_chunk, entry, prefix, closing, **sizes, **_chain(states)
    )
    return local, entry, prefix, elapsed, closing


def _scan_chunks(inputs, states, elapsed, y, sizes, outputs):
    u, r, B, C = inputs[:4]
    lanes, registers = one_warp(outputs, B.element_size())
    nvidia = torch.version.cuda is not None and not interpreting()
    programs.scan_chunks[triton.cdiv(sizes["channels"], lanes), len(inputs[8])](
        *inputs, states, elapsed, y, u_row=u.stride(0), r_row=r.stride(0), B_row=B.stride(0), C_row=C.stride(0), **sizes,
        BC=lanes, PACK=_pack(sizes["N"], B, C), OUTPUTS=outputs, FETCH=outputs and nvidia, num_warps=1,
        maxnreg=registers if nvidia else None,
    )  # fmt: skip


def one_warp(outputs: bool, element_size: int) -> tuple[int, int | None]:
    """Channels of a program of F1, or with ``outputs`` of F3, and the most registers that a thread of it may have.

    16 warps to a multiprocessor of one channel a lane, or 8 of two channels, which share what they load; the compiler would
    take fewer registers for those and load a row's elements just before it uses them.  Found with ``tools/tune_scan.py``.
    """
    return (64, 254) if outputs or element_size == 4 else (32, None)


def _pack(states: int, *rows: Tensor) -> int:
    """How many elements of a row of B and C one load of 64 bits can bring; 1 if they do not lie so."""
    pack = 8 // rows[0].element_size()
    fits = all(x.data_ptr() % 8 == 0 and x.stride(0) % pack == 0 for x in rows) and states % pack == 0
    return pack if fits and len({x.dtype for x in rows}) == 1 else 1


def _chain(states: int) -> dict[str, int]:
    padded = triton.next_power_of_2(states)
    return {"NP": padded, "AHEAD": CHAIN_AHEAD, "BC": CHAIN_LANES, "num_warps": CHAIN_WARPS}


@torch.library.custom_op("hrsam::cycle_scan", mutates_args=())
def _forward(
    u: Tensor, r: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, gamma: Tensor,
    bounds: Sequence[int],
) -> Tensor:  # fmt: skip
    chunks, first_chunk = scan_tables(tuple(bounds), None, u.device)
    u, r, B, C = (_rows(t) for t in (u, r, B, C))
    dt_bias, A_log, D, gamma = _parameters(dt_bias, A_log, D, gamma)
    sizes = _sizes(*A_log.shape, gamma.shape[1])
    inputs = u, r, B, C, dt_bias, A_log, D, gamma, chunks
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    with torch.cuda.device_of(u):
        states, entry, prefix, elapsed, closing = _states(inputs, first_chunk, sizes)
        programs.enter_chunks[triton.cdiv(A_log.shape[0], ENTER_LANES), len(chunks)](
            A_log, gamma, chunks, entry, prefix, closing, states, **sizes, NP=triton.next_power_of_2(A_log.shape[1]),
            BC=ENTER_LANES, num_warps=ENTER_WARPS,
        )  # fmt: skip
        _scan_chunks(inputs, states, elapsed, y, sizes, True)
    return y


@_forward.register_fake
def _(u, r, dt_bias, A_log, B, C, D, gamma, bounds):
    return u.new_empty(u.shape)


@torch.library.custom_op("hrsam::cycle_scan_backward", mutates_args=())
def _backward(
    w: Tensor, u: Tensor, r: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor, gamma: Tensor,
    bounds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    types = [t.dtype for t in (u, r, dt_bias, A_log, B, C, D, gamma)]
    chunks, first_chunk = scan_tables(tuple(bounds), CHUNK, u.device)
    (channels, states), cycles, sequences = A_log.shape, gamma.shape[1], len(bounds) - 1
    blocks, shared = triton.cdiv(channels, LANES), _sizes(channels, states, cycles)
    w, u, r, B, C = (_rows(t) for t in (w, u, r, B, C))
    dt_bias, A_log, D, gamma = _parameters(dt_bias, A_log, D, gamma)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=u.device)

    rows = {"w_row": w.stride(0), "r_row": r.stride(0), "C_row": C.stride(0)}
    sizes = {"channels": channels, "N": states, "CHUNK": CHUNK, "BC": LANES, "num_warps": 1}
    grid, chain_grid = (len(chunks), blocks), (sequences, triton.cdiv(channels, CHAIN_LANES))
    with torch.cuda.device_of(u):
        inputs = u, r, B, C, dt_bias, A_log, D, gamma, chunks
        _, entry, prefix, elapsed, closing = _states(inputs, first_chunk, shared)
        local, leave = empty(len(chunks), states, channels), empty(len(chunks), states, channels)
        suffix, d_last = torch.empty_like(elapsed), torch.empty_like(closing)
        d_delta, d_gamma = empty(sequences, channels), empty(sequences, cycles, channels)
        d_u, d_r = empty(*u.shape, dtype=u.dtype), empty(*r.shape, dtype=r.dtype)
        d_B, d_C, d_A_log = empty(blocks, *B.shape), empty(blocks, *C.shape), torch.empty_like(entry)
        d_dt_bias, d_D, d_total = (torch.empty_like(elapsed) for _ in range(3))
        gradients.local_adjoints[grid](w, r, C, dt_bias, A_log, chunks, local, **rows, **sizes)
        gradients.chain_adjoints[chain_grid](
            local, elapsed, A_log, gamma, first_chunk, entry, prefix,
            leave, suffix, d_last, d_A_log, d_gamma, d_delta, **shared, **_chain(states),
        )  # fmt: skip
        gradients.gradients[grid](
            w, u, r, B, C, dt_bias, A_log, D, gamma, chunks, entry, prefix, closing, leave, suffix, d_last, d_delta,
            d_u, d_r, d_B, d_C, d_dt_bias, d_A_log, d_D, d_total, u.shape[0],
            **rows, u_row=u.stride(0), B_row=B.stride(0), R=cycles, **sizes,
        )  # fmt: skip
    d_gamma = (d_gamma.sum(0) + d_total.sum(0, dtype=torch.float64)).t()
    grads = (d_u, d_r, d_dt_bias.sum(0), d_A_log.sum(0).t(), d_B.sum(0), d_C.sum(0), d_D.sum(0), d_gamma)
    return tuple(grad.to(dtype).contiguous() for grad, dtype in zip(grads, types))


@_backward.register_fake
def _(w, u, r, dt_bias, A_log, B, C, D, gamma, bounds):
    return tuple(t.new_empty(t.shape) for t in (u, r, dt_bias, A_log, B, C, D, gamma))


def _save(ctx, inputs, output):
    *tensors, ctx.bounds = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, w):
    return (*_backward(w, *ctx.saved_tensors, ctx.bounds), None)


_forward.register_autograd(_differentiate, setup_context=_save)


def cycle_scan(u, r, dt_bias, A_log, B, C, D, gamma, layout, across):
    """Shapes as in :func:`hrsam.ops.cycle_scan.cycle_scan`, which checks them; float32, float16 and bfloat16.
    Raises ``ValueError`` for float64."""
    if any(t.dtype == torch.float64 for t in (u, r, dt_bias, A_log, B, C, D, gamma)):
        raise ValueError("the kernel computes in float32 and got float64 tensors; use impl='torch' or 'naive' for them")
    return _forward(u, r, dt_bias, A_log, B, C, D, gamma, layout.boundaries(across))
