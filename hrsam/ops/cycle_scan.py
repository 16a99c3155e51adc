"""The cycle scan: a selective state-space scan over a sequence that is repeated R times, in closed form.

Definition, for each sequence, channel c and state n, with ``Δ = softplus(r + dt_bias)`` and ``A = −exp(A_log)``::

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t        h = 0 before the first token of the first cycle
    y_t = Σ_n C_t h_t + D u_t                     t runs over the sequence R times; y = Σ_r γ_r y_r

* Who sees whom: in cycle 1 a token sees itself and the tokens before it, later cycles add the whole sequence::

      cycle 1: x . . .     cycle 2 …: x x x x
               x x . .                x x x x
               x x x .                x x x x
               x x x x                x x x x

* Exact.  Token order matters: it is the raster order of each grid.
* There are no queries without keys, as a sequence has at least one token.
* Gradients for all eight tensors.
* Source: HRSAM (arXiv 2407.02109), "cycle scan"; the recurrence is Mamba's (arXiv 2312.00752, §3.2).

Closed form.  Let ``g_t`` be the state when started from zero, ``P = exp(A Σ_t Δ_t)`` the decay of one cycle and
``s_r`` the state at the start of cycle r: ``s_1 = 0``, ``s_{r+1} = P s_r + g_L``.  The recurrence is linear, hence with
``Γ = Σ_r γ_r`` and ``S = Σ_r γ_r s_r``::

    y_t = Σ_n C_t H_t + D Γ u_t,   H_t = exp(Δ_t A) H_{t−1} + Γ Δ_t B_t u_t,   H_0 = S

one scan whatever R is.  ``S = Q(P) g_L`` with ``Q(P) = Σ_{k=0}^{R−2} κ_k P^k``, ``κ_k = γ_{k+2} + … + γ_R``.

Chunks run side by side: (1) every chunk's end state from zero, (2) a recurrence over chunks gives ``g_L``, ``S`` and
the state at which each chunk is entered, (3) every chunk's outputs.  Chunks begin at the sequence's own first token,
so a result does not depend on what else is packed.
"""

from __future__ import annotations

from itertools import pairwise
from math import e, isqrt, log2

import torch
import torch.nn.functional as F
from torch import Tensor

from hrsam.kernels import resolve_impl
from hrsam.layout import Layout

# (chunks, N, Ch) elements of the fast path's states: they stay in a CPU's cache, and torch works on tensors of this size
# in one thread.  With larger ones its threads meet after every step, which on busy cores takes seconds instead of 0.1 s.
STATE_ELEMENTS = 1 << 15


def naive_cycle_scan(u, r, dt_bias, A_log, B, C, D, gamma, layout, across):
    """The definition: the sequence is repeated R times and scanned once."""
    work = torch.promote_types(u.dtype, torch.float32)
    dtype = u.dtype
    u, r, dt_bias, A_log, B, C, D, gamma = (t.to(work) for t in (u, r, dt_bias, A_log, B, C, D, gamma))
    delta = F.softplus(r + dt_bias, threshold=20)
    A = -torch.exp(A_log)
    bounds = layout.boundaries(across)
    out = []
    for start, end in pairwise(bounds):
        h = torch.zeros_like(A)
        cycles = []
        for _ in range(gamma.shape[1]):
            y = []
            for t in range(start, end):
                h = torch.exp(delta[t, :, None] * A) * h + (delta[t] * u[t])[:, None] * B[t]
                y.append(h @ C[t] + D * u[t])
            cycles.append(torch.stack(y))
        out.append(sum(gamma[:, i] * y for i, y in enumerate(cycles)))
    return torch.cat(out).to(dtype)


def _run(delta, x, B, C, A2, h):
    """Scan J tokens of K chunks side by side -> outputs (K, J, Ch), or ``None`` without ``C``, and the last states.

    ``delta``, ``x`` (J, K, 1, Ch); ``B`` (J, K, N, 1); ``C`` (J, K, 1, N) or ``None``; ``A2`` (N, Ch); ``h``
    (K, N, Ch).
    """
    outputs = []
    for j in range(delta.shape[0]):
        h = (torch.mul(delta[j], A2).exp2_() * h).addcmul_(x[j], B[j])
        if C is not None:
            outputs.append(torch.bmm(C[j], h))
    return torch.cat(outputs, dim=1) if outputs else None, h


def _chain(decay, drive, h):
    """``h_{k+1} = decay_k h_k + drive_k`` over chunks -> the states before each chunk, stacked, and the last one."""
    entries = []
    for a, b in zip(decay, drive):
        entries.append(h)
        h = torch.addcmul(b, a, h)
    return torch.stack(entries), h


def wrap_factor(P: Tensor, gamma: Tensor) -> Tensor:
    """``Q(P)``, by Horner's rule.  ``P`` (N, Ch), ``gamma`` (Ch, R) -> (N, Ch)."""
    Q, kappa = torch.zeros_like(P), torch.zeros_like(gamma[:, 0])
    for i in range(gamma.shape[1] - 1, 0, -1):
        kappa = kappa + gamma[:, i]
        Q = Q * P + kappa
    return Q


def _scan_sequence(u, r, A2, B, C, D, gamma):
    length, channels = u.shape
    states = A2.shape[0]
    steps = max(-(-length * channels * states // STATE_ELEMENTS), isqrt(length))
    chunks = -(-length // steps)

    def chunked(x):  # added tokens are zeros, and Δ = 0 leaves the state as it is
        x = F.pad(x, (0, 0, 0, chunks * steps - length))
        return x.view(chunks, steps, -1).transpose(0, 1).contiguous()

    delta = chunked(F.softplus(r, threshold=20)).unsqueeze(2)
    x = delta * chunked(u).unsqueeze(2)
    B, C = chunked(B).unsqueeze(3), chunked(C).unsqueeze(2)
    total = gamma.sum(1)

    _, g = _run(delta, x, B, None, A2, u.new_zeros(chunks, states, channels))
    elapsed = delta.sum(0)
    decay = torch.exp2(elapsed * A2)
    _, g_last = _chain(decay, g, torch.zeros_like(A2))
    S = wrap_factor(torch.exp2(elapsed.sum(0) * A2), gamma) * g_last
    entries, _ = _chain(decay, total * g, S)
    y, _ = _run(delta, total * x, B, C, A2, entries)
    assert y is not None
    return y.reshape(chunks * steps, channels)[:length] + total * D * u


def torch_cycle_scan(u, r, dt_bias, A_log, B, C, D, gamma, layout, across):
    work = torch.promote_types(u.dtype, torch.float32)
    dtype = u.dtype
    u, r, dt_bias, A_log, B, C, D, gamma = (t.to(work) for t in (u, r, dt_bias, A_log, B, C, D, gamma))
    r = r + dt_bias
    A2 = -log2(e) * torch.exp(A_log).t().contiguous()  # exp(Δ A) = 2^(Δ A2), and exp2 is the cheaper one
    bounds = layout.boundaries(across)
    out = []
    for start, end in pairwise(bounds):  # one by one: even rounding must not depend on what else is packed
        out.append(_scan_sequence(u[start:end], r[start:end], A2, B[start:end], C[start:end], D, gamma))
    return torch.cat(out).to(dtype)


def triton_cycle_scan(u, r, dt_bias, A_log, B, C, D, gamma, layout, across):
    from hrsam.kernels import cycle_scan as kernel  # late: needs Triton

    return kernel.cycle_scan(u, r, dt_bias, A_log, B, C, D, gamma, layout, across)


FUNCTIONS = {"naive": naive_cycle_scan, "torch": torch_cycle_scan, "triton": triton_cycle_scan}


def cycle_scan(
    u: Tensor,
    r: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    gamma: Tensor,
    layout: Layout,
    *,
    across: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Scan each sequence R times and add the outputs with weights ``gamma``; the formulas are at the top of this file.

    ``u`` input and ``r`` step size before softplus, both (T, Ch); ``dt_bias`` (Ch,); ``A_log`` (Ch, N), state decay
    ``A = −exp(A_log)``; ``B``, ``C`` (T, N), shared by all channels; ``D`` (Ch,); ``gamma`` (Ch, R), R at least 1
    -> ``y`` (T, Ch) in u's dtype.  States are float32, or float64 for float64 inputs (not with ``"triton"``).
    ``across``: a sequence is all grids of an image in packed order; otherwise every grid is a sequence of its own.
    ``impl``: ``"naive"`` (definition), ``"torch"``, ``"triton"`` (kernel) or ``"auto"``.
    Raises ``ValueError`` for shapes that do not fit, or an implementation that does not exist or cannot run here.
    """
    if u.ndim != 2 or u.shape != r.shape or u.shape[0] != layout.tokens:
        raise ValueError(
            f"the layout has {layout.tokens} tokens, so u and r must be ({layout.tokens}, channels); "
            f"got u {tuple(u.shape)}, r {tuple(r.shape)}"
        )
    if B.ndim != 2 or B.shape != C.shape or B.shape[0] != layout.tokens:
        raise ValueError(
            f"the layout has {layout.tokens} tokens, so B and C must be ({layout.tokens}, states); "
            f"got B {tuple(B.shape)}, C {tuple(C.shape)}"
        )
    channels, states = u.shape[1], B.shape[1]
    if dt_bias.shape != (channels,) or D.shape != (channels,) or A_log.shape != (channels, states):
        raise ValueError(
            f"with {channels} channels and {states} states dt_bias and D must be ({channels},) and A_log "
            f"({channels}, {states}); got {tuple(dt_bias.shape)}, {tuple(D.shape)} and {tuple(A_log.shape)}"
        )
    if gamma.ndim != 2 or gamma.shape[0] != channels or gamma.shape[1] < 1:
        raise ValueError(f"gamma must be ({channels}, cycles) with at least one cycle; got {tuple(gamma.shape)}")
    with torch.autocast(u.device.type, enabled=False):  # products with the states would become 16-bit
        return FUNCTIONS[resolve_impl(impl, u)](u, r, dt_bias, A_log, B, C, D, gamma, layout, across)
