# ruff: noqa: RUF005 (Triton's compiler has no unpacking in tuples)
"""Device code of the cycle scan: ``hrsam.ops.cycle_scan`` has the definition, ``kernels/cycle_scan.py`` launches it.

Here the forward pass; ``cycle_scan_gradients.py`` has the backward pass.  Every sequence is cut into chunks: (F1) each
chunk's end state from zero, (F2) a recurrence over the chunks of a sequence: the state each chunk is entered with, and the
closing state ``S``; (F3) outputs.  Strides are compile-time constants: addresses then are immediate offsets, where they would
fill the registers otherwise.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
_FETCH = tl.constexpr("prefetch.global.L1 [$1]; mov.b32 $0, 0;")


@triton.jit
def _softplus(x):
    """To 1.4e-7 of its value.  log1p(y) / y on [0, 1] is the minimax polynomial of degree 9: a logarithm that keeps to the
    relative error of a small y takes a division and three times the instructions."""
    y = tl.exp(-tl.abs(x))
    p = 0.019851463 - 0.003244026 * y
    p = p * y - 0.056959536
    p = p * y + 0.10603655
    p = p * y - 0.15305592
    p = p * y + 0.19675939
    p = p * y - 0.24954134
    p = p * y + 0.33329964
    p = p * y - 0.49999902
    p = p * y + 1.0
    return tl.maximum(x, 0.0) + p * y


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
