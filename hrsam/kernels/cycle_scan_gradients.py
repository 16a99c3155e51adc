# ruff: noqa: RUF005 (Triton's compiler has no unpacking in tuples)
"""Device code of the gradients of the cycle scan, see ``cycle_scan_device.py``.

From right to left with ``w = ∂ℓ/∂y``: F1 and F2 again with chunks of ``CHUNK`` tokens, then (B1) each chunk's adjoint from
zero, (B2) the recurrence over chunks, (B3) gradients.

Adjoints.  The closed form's state is ``H = Γ g + z`` with ``z_t = a_t z_{t−1}``, ``z_0 = S``, ``a_t = exp(Δ_t A)``.
Its adjoint is ``λ_t = C_t w_t + a_{t+1} λ_{t+1}``, and ``dS = a_1 λ_1``.  ``S = Q(P) g_L`` sends ``μ_L = Q dS`` back
into ``g_L`` and ``Q' g_L dS`` into ``P = exp(A Σ Δ)``.  With ``μ_t = a_{t+1} μ_{t+1}`` and ``ν = Γ λ + μ`` the adjoint
of ``Δ B u`` is ``ν`` and that of ``log a_t`` is ``a_t (ν_t g_{t−1} + λ_t z_{t−1})``.

In B1 and B3 a lane is a channel: what a token needs is loaded once and kept in registers, as tuples of (BC,) vectors, and
the loop over states is outside the loop over tokens.  Tokens past a sequence's end have Δ = 0, u = 0 and w = 0, which leaves
states and adjoints as they are.  Sums over tokens and over blocks of channels are written as partial sums: no atomics.
"""

import triton
import triton.language as tl

from hrsam.kernels.cycle_scan_device import _decay, _softplus, _total

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _vectors(x, first, end, row: tl.constexpr, c, live, CHUNK: tl.constexpr):
    """Rows of a chunk's tokens, 0 past the end."""
    found = ()
    for j in tl.static_range(CHUNK):
        t = first + j
        found = found + (tl.load(x + t * row + c, live & (t < end), other=0.0).to(tl.float32),)
    return found


@triton.jit
def _steps(r, dt_bias, first, end, row: tl.constexpr, c, live, CHUNK: tl.constexpr):
    """Δ of a chunk's tokens, 0 past the end."""
    bias = tl.load(dt_bias + c, live, other=0.0)
    found = ()
    for j in tl.static_range(CHUNK):
        t = first + j
        on = live & (t < end)
        delta = _softplus(tl.load(r + t * row + c, on, other=0.0).to(tl.float32) + bias)
        found = found + (tl.where(on, delta, 0.0),)
    return found


@triton.jit
def _scalar(x, t, end, row: tl.constexpr, n):
    return tl.load(x + t * row + n, t < end, other=0.0).to(tl.float32)


@triton.jit
def _place(chunks, channels: tl.constexpr, BC: tl.constexpr):
    """The program's chunk, its first token, its end, its sequence; channels and which of them exist."""
    chunk = tl.program_id(0).to(tl.int64)
    first = tl.load(chunks + 3 * chunk).to(tl.int64)
    end = tl.load(chunks + 3 * chunk + 1).to(tl.int64)
    sequence = tl.load(chunks + 3 * chunk + 2).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    return chunk, first, end, sequence, c, c < channels


@triton.jit
def local_adjoints(
    w, r, C, dt_bias, A_log, chunks, local,
    w_row: tl.constexpr, r_row: tl.constexpr, C_row: tl.constexpr, channels: tl.constexpr,
    N: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """B1.  ``local`` (chunks, N, Ch): adjoint of the state before the chunk if nothing came after it."""
    chunk, first, end, _, c, live = _place(chunks, channels, BC)
    deltas = _steps(r, dt_bias, first, end, r_row, c, live, CHUNK)
    ws = _vectors(w, first, end, w_row, c, live, CHUNK)
    for n in range(N):
        A2 = _decay(A_log, c * N + n, live)
        rho = tl.zeros((BC,), tl.float32)
        for i in tl.static_range(CHUNK):
            lam = rho + _scalar(C, first + (CHUNK - 1 - i), end, C_row, n) * ws[CHUNK - 1 - i]
            rho = tl.exp2(deltas[CHUNK - 1 - i] * A2) * lam
        tl.store(local + (chunk * N + n) * channels + c, rho, live)


@triton.jit
def chain_adjoints(
    local, elapsed, A_log, gamma, first_chunk, entry, prefix,
    leave, suffix, d_last, d_A_log, d_gamma, d_delta,
    channels: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """B2.  ``leave`` (chunks, N, Ch): adjoint of the state after each chunk, by way of later tokens; ``suffix``
    (chunks, Ch): sum of Δ after each chunk; ``d_last`` (sequences, N, Ch): μ_L.  By way of P and S: ``d_A_log`` in the
    sequence's last slot, ``d_gamma`` (sequences, R, Ch), ``d_delta`` (sequences, Ch), the same for all tokens."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n = tl.arange(0, NP)
    live = c < channels
    tile = (n < N)[:, None] & live[None, :]
    at = n[:, None] * channels + c[None, :]
    begin = tl.load(first_chunk + sequence).to(tl.int64)
    stop = tl.load(first_chunk + sequence + 1).to(tl.int64)
    A2 = _decay(A_log, n[:, None] + c[None, :] * N, tile)
    rho = tl.zeros((NP, BC), tl.float32)
    after = tl.zeros((BC,), tl.float32)
    for step in range(0, stop - begin, AHEAD):
        drives = ()
        deltas = ()
        for j in tl.static_range(AHEAD):
            k = stop - 1 - step - j
            drives = drives + (tl.load(local + k * N * channels + at, tile & (k >= begin), other=0.0),)
            deltas = deltas + (tl.load(elapsed + k * channels + c, live & (k >= begin), other=0.0),)
        for j in tl.static_range(AHEAD):
            k = stop - 1 - step - j
            tl.store(leave + k * N * channels + at, rho, tile & (k >= begin))
            tl.store(suffix + k * channels + c, after, live & (k >= begin))
            rho = tl.exp2(deltas[j][None, :] * A2) * rho + drives[j]
            after += deltas[j]
    slot = stop + sequence
    g = tl.load(entry + slot * N * channels + at, tile, other=0.0)
    total = tl.load(prefix + slot * channels + c, live, other=0.0)
    P = tl.exp2(total[None, :] * A2)
    Q = tl.zeros((NP, BC), tl.float32)
    slope = tl.zeros((NP, BC), tl.float32)
    kappa = tl.zeros((BC,), tl.float32)
    for i in tl.static_range(R - 1):
        kappa += tl.load(gamma + c * R + (R - 1 - i), live, other=0.0)
        slope = slope * P + Q
        Q = Q * P + kappa[None, :]
    tl.store(d_last + sequence * N * channels + at, Q * rho, tile)
    d_log_P = P * slope * g * rho * (A2 * LN2)
    tl.store(d_A_log + slot * N * channels + at, d_log_P * total[None, :], tile)
    tl.store(d_delta + sequence * channels + c, tl.sum(d_log_P, 0), live)
    s = tl.zeros((NP, BC), tl.float32)
    for i in tl.static_range(R):
        tl.store(d_gamma + (sequence * R + i) * channels + c, tl.sum(s * rho, 0), live)
        s = P * s + g


@triton.jit(do_not_specialize=["tokens"])  # which packs have any number of
def gradients(
    w, u, r, B, C, dt_bias, A_log, D, gamma, chunks, entry, prefix, closing, leave, suffix, d_last, d_delta,
    d_u, d_r, d_B, d_C, d_dt_bias, d_A_log, d_D, d_total, tokens,
    w_row: tl.constexpr, u_row: tl.constexpr, r_row: tl.constexpr, B_row: tl.constexpr, C_row: tl.constexpr,
    channels: tl.constexpr, N: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """B3.  ``d_u``, ``d_r`` (T, Ch); ``d_B``, ``d_C`` (blocks, T, N); ``d_A_log`` (slots, N, Ch) but for last slots;
    ``d_dt_bias``, ``d_D``, ``d_total`` (chunks, Ch), the last for Γ, which every γ has a share in."""
    chunk, first, end, sequence, c, live = _place(chunks, channels, BC)
    slot = chunk + sequence
    block = tl.program_id(1).to(tl.int64)
    before = tl.load(prefix + slot * channels + c, live, other=0.0)
    after = tl.load(suffix + chunk * channels + c, live, other=0.0)
    total = _total(gamma, c, live, R)
    deltas = _steps(r, dt_bias, first, end, r_row, c, live, CHUNK)
    us = _vectors(u, first, end, u_row, c, live, CHUNK)
    ws = _vectors(w, first, end, w_row, c, live, CHUNK)
    xs = ()
    d_logs = ()  # Σ_n (A / ln 2) ∂ℓ/∂(log a)
    d_xs = ()  # Σ_n B ν
    for j in tl.static_range(CHUNK):
        xs = xs + (deltas[j] * us[j],)
        d_logs = d_logs + (tl.zeros((BC,), tl.float32),)
        d_xs = d_xs + (tl.zeros((BC,), tl.float32),)
    d_gain = tl.zeros((BC,), tl.float32)
    lost = tl.zeros((BC,), tl.float32)
    for n in range(N):
        A2 = _decay(A_log, c * N + n, live)
        g = tl.load(entry + (slot * N + n) * channels + c, live, other=0.0)
        z = tl.exp2(before * A2) * tl.load(closing + (sequence * N + n) * channels + c, live, other=0.0)
        rho = tl.load(leave + (chunk * N + n) * channels + c, live, other=0.0)
        mu = tl.exp2(after * A2) * tl.load(d_last + (sequence * N + n) * channels + c, live, other=0.0)
        decays = ()
        gs = ()
        zs = ()
        for j in tl.static_range(CHUNK):
            t = first + j
            a = tl.exp2(deltas[j] * A2)
            decays = decays + (a,)
            gs = gs + (g,)
            zs = zs + (z,)
            g = a * g + xs[j] * _scalar(B, t, end, B_row, n)
            z = a * z
            tl.store(d_C + (block * tokens + t) * N + n, tl.sum((total * g + z) * ws[j], 0), t < end)
        d_A = tl.zeros((BC,), tl.float32)
        share = tl.zeros((BC,), tl.float32)
        new_logs = ()
        new_xs = ()
        for i in tl.static_range(CHUNK):
            t = first + (CHUNK - 1 - i)
            x = xs[CHUNK - 1 - i]
            a = decays[CHUNK - 1 - i]
            b = _scalar(B, t, end, B_row, n)
            lam = rho + _scalar(C, t, end, C_row, n) * ws[CHUNK - 1 - i]
            nu = total * lam + mu
            tl.store(d_B + (block * tokens + t) * N + n, tl.sum(nu * x, 0), t < end)
            d_log = a * (nu * gs[CHUNK - 1 - i] + lam * zs[CHUNK - 1 - i])
            d_A += deltas[CHUNK - 1 - i] * d_log
            new_logs = (d_logs[CHUNK - 1 - i] + A2 * d_log,) + new_logs
            new_xs = (d_xs[CHUNK - 1 - i] + b * nu,) + new_xs
            share += lam * (x * b)
            rho = a * lam
            mu = a * mu
        d_logs = new_logs
        d_xs = new_xs
        share -= lost  # compensated: a sum of many large terms of both signs
        sum_ = d_gain + share
        lost = (sum_ - d_gain) - share
        d_gain = sum_
        tl.store(d_A_log + (slot * N + n) * channels + c, d_A * (A2 * LN2), live)
    skip = tl.load(D + c, live, other=0.0)
    bias = tl.load(dt_bias + c, live, other=0.0)
    constant = tl.load(d_delta + sequence * channels + c, live, other=0.0)
    d_bias = tl.zeros((BC,), tl.float32)
    d_skip = tl.zeros((BC,), tl.float32)
    for j in tl.static_range(CHUNK):
        t = first + j
        on = live & (t < end)
        u_t = tl.load(u + t * u_row + c, on, other=0.0).to(tl.float32)  # again: u and r need not stay in registers
        r_t = tl.load(r + t * r_row + c, on, other=0.0).to(tl.float32) + bias
        d_r_t = (d_logs[j] * LN2 + d_xs[j] * u_t + constant) * tl.sigmoid(r_t)
        d_bias += tl.where(on, d_r_t, 0.0)
        d_skip += u_t * ws[j]
        tl.store(d_r + t * channels + c, d_r_t.to(d_r.dtype.element_ty), on)
        d_u_t = d_xs[j] * deltas[j] + total * skip * ws[j]
        tl.store(d_u + t * channels + c, d_u_t.to(d_u.dtype.element_ty), on)
    tl.store(d_dt_bias + chunk * channels + c, d_bias, live)
    tl.store(d_D + chunk * channels + c, total * d_skip, live)
    tl.store(d_total + chunk * channels + c, d_gain + skip * d_skip, live)
