# ruff: noqa: RUF005 (Triton's compiler has no unpacking in tuples)
"""Device code of attention over a plan: ``hrsam.ops.attend`` has the definition, ``kernels/attend.py`` launches it.

Here the forward pass and what tiles are made of; ``attend_gradients.py`` has the backward pass.  A program owns one tile of
queries of one head and walks over the tiles of keys in the plan's lists, FULL tiles in one loop without any mask, then
PARTIAL tiles in a second one, with an online softmax in powers of two.

Rows are fetched by token number, so no order of tokens needs a copy.  With rotary positions a tile is held as its even
and its odd channels: both are rotated where they lie, and a product of rotated rows is the sum of two products of half
the size.  Token numbers below zero: −1 the padding key, −2 nobody.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tokens(table, tile, SIZE: tl.constexpr, RUNS: tl.constexpr, MASKED: tl.constexpr):
    """Token numbers of a tile's slots.  ``RUNS``: the table has (first token, count) a tile."""
    i = tl.arange(0, SIZE)
    if RUNS:
        tokens = tl.load(table + 2 * tile) + i
        if MASKED:
            tokens = tl.where(i < tl.load(table + 2 * tile + 1), tokens, -2)
    else:
        tokens = tl.load(table + tile * SIZE + i)
    return tokens


@triton.jit
def _rows(x, tokens, row, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """(slots, DP) rows of ``x``, 0 for slots without a token and for channels from D on."""
    d = tl.arange(0, DP)
    at = tokens.to(tl.int64)[:, None] * row + d[None, :]
    if MASKED:
        rows = tl.load(x + at, (tokens >= 0)[:, None] & (d < D)[None, :], other=0.0)
    elif D != DP:
        rows = tl.load(x + at, (d < D)[None, :], other=0.0)
    else:
        rows = tl.load(x + at)
    return rows


@triton.jit
def _with_padding(rows, tokens, pad, D: tl.constexpr, DP: tl.constexpr):
    """The padding row in slots of the padding key."""
    d = tl.arange(0, DP)
    row = tl.load(pad + d, d < D, other=0.0).to(rows.dtype)
    return tl.where((tokens == -1)[:, None], row[None, :], rows)


@triton.jit
def _angles(turns, places, tile, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """cos and sin (slots, DP / 2) of a tile's places.  The table holds them in pairs, so that a lane finds them beside the
    pair of channels that it turns."""
    d = tl.arange(0, DP)
    at = tl.load(places + tile * SIZE + tl.arange(0, SIZE))[:, None] * D + d[None, :]
    pairs = tl.load(turns + at, (d < D)[None, :], other=0.0) if D != DP else tl.load(turns + at)
    c, s = tl.split(tl.reshape(pairs, (SIZE, DP // 2, 2)))
    return c.to(tl.float32), s.to(tl.float32)


@triton.jit
def _turned(x, c, s, SIZE: tl.constexpr, DP: tl.constexpr):
    """Even and odd channels after the rotation by minus the angle."""
    even, odd = tl.split(tl.reshape(x, (SIZE, DP // 2, 2)))
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    return (even * c + odd * s).to(x.dtype), (odd * c - even * s).to(x.dtype)


@triton.jit
def _turned_back(even, odd, c, s, SIZE: tl.constexpr, DP: tl.constexpr):
    """The transpose of :func:`_turned`, for gradients: (slots, DP)."""
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (SIZE, DP))


@triton.jit
def _halves(
    x, tokens, row, pad, turns, places, tile,
    SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROPE: tl.constexpr, MASKED: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """Rows of a tile, rotated: even and odd channels, or without ``ROPE`` the same rows twice."""
    if ROPE:  # first, so that the table is on its way with the rows
        c, s = _angles(turns, places, tile, SIZE, D, DP)
    rows = _rows(x, tokens, row, D, DP, MASKED)
    if PAD:
        rows = _with_padding(rows, tokens, pad, D, DP)
    if ROPE:
        a, b = _turned(rows, c, s, SIZE, DP)
    else:
        a, b = rows, rows
    return a, b


@triton.jit
def _product(a, b, c, d, ROPE: tl.constexpr, PRECISION: tl.constexpr):
    """``[a b] [c d]ᵀ``; only ``a cᵀ`` without ``ROPE``."""
    scores = tl.dot(a, tl.trans(c), input_precision=PRECISION)
    if ROPE:
        scores = tl.dot(b, tl.trans(d), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _labels(table, tile, SIZE: tl.constexpr):
    return tl.load(table + tile * SIZE + tl.arange(0, SIZE))


@triton.jit
def _keys(
    tile, k, v, turns, pad_k, pad_v, k_tokens, k_places, k_row, v_row,
    BN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, ROPE: tl.constexpr,
    MASKED: tl.constexpr, PAD: tl.constexpr, RUNS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Tokens, keys (both halves) and values of a tile."""
    tokens = _tokens(k_tokens, tile, BN, RUNS, RAGGED)
    ka, kb = _halves(k, tokens, k_row, pad_k, turns, k_places, tile, BN, D, DP, ROPE, MASKED, PAD)
    values = _rows(v, tokens, v_row, DV, DVP, MASKED)
    if PAD:
        values = _with_padding(values, tokens, pad_v, DV, DVP)
    return tokens, ka, kb, values


@triton.jit
def _biased(scores, bias, tokens, bias_row, scale):
    """Scaled scores and each key's bias, in powers of two."""
    added = tl.load(bias + tokens.to(tl.int64) * bias_row, tokens >= 0, other=0.0) * LOG2E
    return scores * scale + added[None, :]


@triton.jit
def _allowed(tokens, q_label, k_labels, tile, BN: tl.constexpr, LABELS: tl.constexpr):
    """Which keys of a PARTIAL tile each query reads."""
    allowed = (tokens > -2)[None, :]
    if LABELS:
        allowed = allowed & (q_label[:, None] == _labels(k_labels, tile, BN)[None, :])
    return allowed


@triton.jit
def _join(scores, values, m, total, acc, scale, FIRST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile's scores and values join the running maximum, sum and output, or begin them."""
    higher = tl.max(scores, 1) * scale  # which is positive
    if not FIRST:
        higher = tl.maximum(m, higher)
    safe = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
    weights = tl.exp2(scores * scale - safe[:, None])
    if not FIRST:
        shrink = tl.exp2(m - safe)
        total *= shrink
        acc *= shrink[:, None]
    total += tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def _finish(
    out, lse, tokens, m, total, acc, heads: tl.constexpr, head, BM: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr
):
    empty = total == 0.0
    acc = acc * (1.0 / tl.where(empty, 1.0, total))[:, None]
    real = tokens >= 0
    row = tokens.to(tl.int64) * heads + head
    d = tl.arange(0, DVP)
    tl.store(out + row[:, None] * DV + d[None, :], acc.to(out.dtype.element_ty), real[:, None] & (d < DV)[None, :])
    tl.store(lse + row, tl.where(empty, -float("inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * LN2), real)


@triton.jit
def _visit(
    tile, qa, qb, q_label, m, total, acc,
    k, v, bias, turns, pad_k, pad_v, k_tokens, k_places, k_labels, k_row, v_row, bias_row, scale,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, ROPE: tl.constexpr,
    PAD: tl.constexpr, LABELS: tl.constexpr, BIAS: tl.constexpr, RUNS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys joins the running maximum, sum and output."""
    tokens, ka, kb, values = _keys(
        tile, k, v, turns, pad_k, pad_v, k_tokens, k_places, k_row, v_row,
        BN, D, DP, DV, DVP, ROPE, MASKED, PAD and MASKED, RUNS, MASKED,
    )  # fmt: skip
    scores = _product(qa, qb, ka, kb, ROPE, PRECISION)
    if BIAS:
        scores = _biased(scores, bias, tokens, bias_row, scale)
        scale = 1.0
    if MASKED:
        scores = tl.where(_allowed(tokens, q_label, k_labels, tile, BN, LABELS), scores, -float("inf"))
    return _join(scores, values, m, total, acc, scale, False, MASKED, PRECISION)


@triton.jit
def attend(
    q, k, v, bias, turns, pad_k, pad_v, out, lse,
    q_tokens, k_tokens, q_places, k_places, q_labels, k_labels, full_ptr, full_idx, part_ptr, part_idx, scale,
    q_row: tl.constexpr, q_head: tl.constexpr, k_row: tl.constexpr, k_head: tl.constexpr,
    v_row: tl.constexpr, v_head: tl.constexpr, heads: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROPE: tl.constexpr, PAD: tl.constexpr, LABELS: tl.constexpr, BIAS: tl.constexpr, RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``out`` (T, heads, DV), ``lse`` (T, heads): natural logarithm, −inf for a query without keys.  ``scale`` · log2 e."""
    tile, head = tl.program_id(0), tl.program_id(1)
    q += head * q_head
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    pad_k += head // GROUP * D
    pad_v += head // GROUP * DV
    bias += head
    tokens = _tokens(q_tokens, tile, BM, RUNS, True)
    qa, qb = _halves(q, tokens, q_row, pad_k, turns, q_places, tile, BM, D, DP, ROPE, True, False)
    q_label = _labels(q_labels, tile, BM) if LABELS else tokens
    m = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DVP), tl.float32)
    for at in range(tl.load(full_ptr + tile), tl.load(full_ptr + tile + 1)):
        m, total, acc = _visit(
            tl.load(full_idx + at), qa, qb, q_label, m, total, acc,
            k, v, bias, turns, pad_k, pad_v, k_tokens, k_places, k_labels, k_row, v_row, heads, scale,
            D, DP, DV, DVP, BN, ROPE, PAD, LABELS, BIAS, RUNS, False, PRECISION,
        )  # fmt: skip
    for at in range(tl.load(part_ptr + tile), tl.load(part_ptr + tile + 1)):
        m, total, acc = _visit(
            tl.load(part_idx + at), qa, qb, q_label, m, total, acc,
            k, v, bias, turns, pad_k, pad_v, k_tokens, k_places, k_labels, k_row, v_row, heads, scale,
            D, DP, DV, DVP, BN, ROPE, PAD, LABELS, BIAS, RUNS, True, PRECISION,
        )  # fmt: skip
    _finish(out, lse, tokens, m, total, acc, heads, head, BM, DV, DVP)


@triton.jit
def attend_groups(
    q, k, v, turns, pad_k, pad_v, out, lse,
    q_tokens, k_tokens, q_places, k_places, q_labels, k_labels, groups, scale,
    q_row: tl.constexpr, q_head: tl.constexpr, k_row: tl.constexpr, k_head: tl.constexpr,
    v_row: tl.constexpr, v_head: tl.constexpr, heads: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROPE: tl.constexpr, PAD: tl.constexpr, LABELS: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As :func:`attend` where neighbouring query tiles read the same ``KEYS`` key tiles, which nothing else reads: keys are
    fetched and rotated once and stay in shared memory."""
    head, group = tl.program_id(0), tl.program_id(1)  # heads of a row lie side by side in memory
    first, count = tl.load(groups + 3 * group), tl.load(groups + 3 * group + 1)
    key_tile = tl.load(groups + 3 * group + 2)
    q += head * q_head
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    pad_k += head // GROUP * D
    pad_v += head // GROUP * DV
    GAPS: tl.constexpr = PAD or MASKED
    kas = ()
    kbs = ()
    all_values = ()
    for j in tl.static_range(KEYS):
        _, ka, kb, values = _keys(
            key_tile + j, k, v, turns, pad_k, pad_v, k_tokens, k_places, k_row, v_row,
            BN, D, DP, DV, DVP, ROPE, GAPS, PAD, False, False,
        )  # fmt: skip
        kas = kas + (ka,)
        kbs = kbs + (kb,)
        all_values = all_values + (values,)
    for tile in range(first, first + count):
        tokens = _tokens(q_tokens, tile, BM, False, False)
        qa, qb = _halves(q, tokens, q_row, pad_k, turns, q_places, tile, BM, D, DP, ROPE, True, False)
        q_label = _labels(q_labels, tile, BM) if LABELS else tokens
        m = tl.full((BM,), -float("inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, DVP), tl.float32)
        for j in tl.static_range(KEYS):
            scores = _product(qa, qb, kas[j], kbs[j], ROPE, PRECISION)
            if MASKED:
                allowed = _allowed(
                    _tokens(k_tokens, key_tile + j, BN, False, False), q_label, k_labels, key_tile + j, BN, LABELS
                )
                scores = tl.where(allowed, scores, -float("inf"))
            m, total, acc = _join(scores, all_values[j], m, total, acc, scale, j == 0, MASKED, PRECISION)
        _finish(out, lse, tokens, m, total, acc, heads, head, BM, DV, DVP)
