# ruff: noqa: RUF005 (Triton's compiler has no unpacking in tuples)
"""Device code of the cycle scan: ``hrsam.ops.cycle_scan`` has the definition, ``kernels/cycle_scan.py`` launches it.

Every sequence is cut into chunks.  Forward: (F1) each chunk's end state from zero, (F2) a recurrence over the chunks of a
sequence: the state each chunk is entered with, and the closing state ``S``; (F3) outputs.  Backward, from right to left
with ``w = ∂ℓ/∂y``: F1 and F2 again with chunks of ``CHUNK`` tokens, then (B1) each chunk's adjoint from zero, (B2) the
recurrence over chunks, (B3) gradients.

Adjoints.  The closed form's state is ``H = Γ g + z`` with ``z_t = a_t z_{t−1}``, ``z_0 = S``, ``a_t = exp(Δ_t A)``.
Its adjoint is ``λ_t = C_t w_t + a_{t+1} λ_{t+1}``, and ``dS = a_1 λ_1``.  ``S = Q(P) g_L`` sends ``μ_L = Q dS`` back
into ``g_L`` and ``Q' g_L dS`` into ``P = exp(A Σ Δ)``.  With ``μ_t = a_{t+1} μ_{t+1}`` and ``ν = Γ λ + μ`` the adjoint
of ``Δ B u`` is ``ν`` and that of ``log a_t`` is ``a_t (ν_t g_{t−1} + λ_t z_{t−1})``.

In B1 and B3 a lane is a channel: what a token needs is loaded once and kept in registers, as tuples of (BC,) vectors, and
the loop over states is outside the loop over tokens.  Tokens past a sequence's end have Δ = 0, u = 0 and w = 0, which leaves
states and adjoints as they are.  Sums over tokens and over blocks of channels are written as partial sums: no atomics.
Strides are compile-time constants: addresses then are immediate offsets, where they would fill the registers otherwise.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_FETCH = tl.constexpr("prefetch.global.L1 [$1]; mov.b32 $0, 0;")


@triton.jit
def _vectors(x, first, end, row: tl.constexpr, c, live, CHUNK: tl.constexpr):
    """Rows of a chunk's tokens, 0 past the end."""
    found = ()
    for j in tl.static_range(CHUNK):
        t = first + j
        found = found + (tl.load(x + t * row + c, live & (t < end), other=0.0).to(tl.float32),)
    return found


@triton.jit
def _softplus(x):
    y = tl.exp(-tl.abs(x))
    up = 1.0 + y  # log1p(y): the quotient repairs the rounding of 1 + y
    log1p = tl.where(up == 1.0, y, tl.log(up) * (y / tl.where(up == 1.0, 1.0, up - 1.0)))
    return tl.maximum(x, 0.0) + log1p


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
def _words(x, at, PACK: tl.constexpr):
    """``PACK`` neighbouring elements of ``x`` by one load of 64 bits, or a single element."""
    if PACK > 1:
        x = x.to(tl.pointer_type(tl.int64), bitcast=True)
    return tl.load(x + at)


@triton.jit
def _elements(words, TYPE: tl.constexpr, PACK: tl.constexpr):
    """What :func:`_words` loaded, element by element in float32."""
    if PACK == 1:
        found = (words.to(tl.float32),)
    elif PACK == 2:
        found = (
            words.to(tl.int32).to(tl.float32, bitcast=True),
            (words >> 32).to(tl.int32).to(tl.float32, bitcast=True),
        )
    else:
        found = ()
        for half in tl.static_range(2):
            pair = (words >> (32 * half)).to(tl.int32)
            if TYPE.is_bf16():  # the upper half of a float32
                low = (pair << 16).to(tl.float32, bitcast=True)
                high = (pair & -65536).to(tl.float32, bitcast=True)
            else:
                low = pair.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
                high = (pair >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
            found = found + (low, high)
    return found


@triton.jit
def _decay(A_log, at, live):
    """A / ln 2, so that exp(Δ A) = exp2(Δ A2)."""
    return -LOG2E * tl.exp(tl.load(A_log + at, live, other=0.0))


@triton.jit
def _total(gamma, c, live, R: tl.constexpr):
    total = tl.load(gamma + c * R, live, other=0.0)
    for i in tl.static_range(1, R):
        total += tl.load(gamma + c * R + i, live, other=0.0)
    return total


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
def scan_chunks(
    u, r, B, C, dt_bias, A_log, D, gamma, chunks, states, elapsed, y,
    u_row: tl.constexpr, r_row: tl.constexpr, B_row: tl.constexpr, C_row: tl.constexpr, channels: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, PACK: tl.constexpr, OUTPUTS: tl.constexpr, FETCH: tl.constexpr,
):  # fmt: skip
    """F1, chunks of any length: ``states`` (chunks, N, Ch) gets the end state from zero, ``elapsed`` (chunks, Ch) the sum of
    Δ.  With ``OUTPUTS`` F3: from the states that chunks are entered with to ``y`` (T, Ch).

    A lane is two channels and holds their states in registers, tokens follow one another.  One power a state and token is
    what takes time here; nothing crosses lanes, and what a state needs of B and C serves both channels.  ``PACK``: how many
    of a row's elements of B and C are loaded at once.  ``FETCH``: the next token's rows of both are brought into the cache.
    """
    chunk = tl.program_id(1).to(tl.int64)
    first = tl.load(chunks + 3 * chunk)
    count = tl.load(chunks + 3 * chunk + 1) - first
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    live = c < channels
    row = first.to(tl.int64)
    u += row * u_row
    r += row * r_row
    B += row * B_row
    C += row * C_row
    y += row * channels
    bias = tl.load(dt_bias + c, live, other=0.0)
    if OUTPUTS:
        gain = _total(gamma, c, live, R)
        skip = tl.load(D + c, live, other=0.0)
    total = tl.zeros((BC,), tl.float32)
    rates = ()
    hs = ()
    for n in tl.static_range(N):
        rates = rates + (_decay(A_log, c * N + n, live),)
        if OUTPUTS:
            hs = hs + (tl.load(states + (chunk * N + n) * channels + c, live, other=0.0),)
        else:
            hs = hs + (tl.zeros((BC,), tl.float32),)
    if FETCH:  # lanes share the sectors of a row of B and one of C
        size: tl.constexpr = B.dtype.element_ty.primitive_bitwidth // 8
        lane = tl.arange(0, 32)
        sector = lane * (32 // size) % N
        ahead = tl.where(lane < 16, (B + sector).to(tl.int64), (C + sector).to(tl.int64))
        step = tl.where(lane < 16, B_row * size, C_row * size)
    u_next = tl.load(u + c, live, other=0.0)  # one token ahead
    r_next = tl.load(r + c, live, other=0.0)
    for t in range(0, count):
        if FETCH:
            ahead += tl.where(t + 1 < count, step, 0)
            tl.inline_asm_elementwise(_FETCH, "=r,l", [ahead], dtype=tl.int32, is_pure=False, pack=1)
        value = u_next.to(tl.float32)
        if OUTPUTS:
            value = value * gain
        delta = tl.where(live, _softplus(r_next.to(tl.float32) + bias), 0.0)
        more = live & (t + 1 < count)
        u_next = tl.load(u + (t + 1) * u_row + c, more, other=0.0)
        r_next = tl.load(r + (t + 1) * r_row + c, more, other=0.0)
        x = delta * value
        total += delta
        out = skip * value if OUTPUTS else x
        new = ()
        for k in tl.static_range(N // PACK):
            bs = _elements(_words(B, t * (B_row // PACK) + k, PACK), B.dtype.element_ty, PACK)
            if OUTPUTS:
                cs = _elements(_words(C, t * (C_row // PACK) + k, PACK), C.dtype.element_ty, PACK)
            for j in tl.static_range(PACK):
                h = tl.exp2(delta * rates[k * PACK + j]) * hs[k * PACK + j] + x * bs[j]
                if OUTPUTS:
                    out += cs[j] * h
                new = new + (h,)
        hs = new
        if OUTPUTS:
            tl.store(y + t * channels + c, out.to(y.dtype.element_ty), live)
    if not OUTPUTS:
        for n in tl.static_range(N):
            tl.store(states + (chunk * N + n) * channels + c, hs[n], live)
        tl.store(elapsed + chunk * channels + c, total, live)


@triton.jit
def enter_chunks(
    A_log, gamma, chunks, entry, prefix, closing, states,
    channels: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Between F2 and F3: ``states`` (chunks, N, Ch) gets the state ``H`` that each chunk is entered with."""
    chunk = tl.program_id(1).to(tl.int64)
    sequence = tl.load(chunks + 3 * chunk + 2).to(tl.int64)
    slot = chunk + sequence
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    n = tl.arange(0, NP)
    live = c < channels
    tile = (n < N)[:, None] & live[None, :]
    at = n[:, None] * channels + c[None, :]
    A2 = _decay(A_log, n[:, None] + c[None, :] * N, tile)
    gain = _total(gamma, c, live, R)
    before = tl.load(prefix + slot * channels + c, live, other=0.0)
    S = tl.load(closing + sequence * N * channels + at, tile, other=0.0)
    g = tl.load(entry + slot * N * channels + at, tile, other=0.0)
    tl.store(states + chunk * N * channels + at, gain[None, :] * g + tl.exp2(before[None, :] * A2) * S, tile)


@triton.jit
def chain_states(
    local, elapsed, A_log, gamma, first_chunk, entry, prefix, closing,
    channels: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """F2.  A sequence of K chunks has K + 1 slots: ``entry`` (slots, N, Ch) holds g before each chunk and ``g_L``,
    ``prefix`` (slots, Ch) the sum of Δ before each chunk and of all; ``closing`` (sequences, N, Ch) is S."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n = tl.arange(0, NP)
    live = c < channels
    tile = (n < N)[:, None] & live[None, :]
    at = n[:, None] * channels + c[None, :]
    begin = tl.load(first_chunk + sequence).to(tl.int64)
    stop = tl.load(first_chunk + sequence + 1).to(tl.int64)
    A2 = _decay(A_log, n[:, None] + c[None, :] * N, tile)
    g = tl.zeros((NP, BC), tl.float32)
    total = tl.zeros((BC,), tl.float32)
    for step in range(0, stop - begin, AHEAD):
        drives = ()
        deltas = ()
        for j in tl.static_range(AHEAD):
            k = begin + step + j
            drives = drives + (tl.load(local + k * N * channels + at, tile & (k < stop), other=0.0),)
            deltas = deltas + (tl.load(elapsed + k * channels + c, live & (k < stop), other=0.0),)
        for j in tl.static_range(AHEAD):
            k = begin + step + j
            slot = k + sequence
            tl.store(entry + slot * N * channels + at, g, tile & (k < stop))
            tl.store(prefix + slot * channels + c, total, live & (k < stop))
            g = tl.exp2(deltas[j][None, :] * A2) * g + drives[j]
            total += deltas[j]
    slot = stop + sequence
    tl.store(entry + slot * N * channels + at, g, tile)
    tl.store(prefix + slot * channels + c, total, live)
    P = tl.exp2(total[None, :] * A2)
    Q = tl.zeros((NP, BC), tl.float32)
    kappa = tl.zeros((BC,), tl.float32)
    for i in tl.static_range(R - 1):
        kappa += tl.load(gamma + c * R + (R - 1 - i), live, other=0.0)
        Q = Q * P + kappa[None, :]
    tl.store(closing + sequence * N * channels + at, Q * g, tile)


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
