"""Device code of the gradients of attention over a plan, see ``attend_device.py``.

One program a tile of keys walks over the transposed lists (gradients of keys, values and bias), one a tile of queries over
the lists again (gradient of queries); both compute the weights anew from the log-sum-exp.  With ``Δ = Σ ∂ℓ/∂o · o`` the
gradient of a logit is its weight times ``∂ℓ/∂o · v − Δ``.
"""

import triton
import triton.language as tl

from hrsam.kernels.attend_device import (
    LOG2E,
    _allowed,
    _angles,
    _biased,
    _halves,
    _keys,
    _labels,
    _product,
    _rows,
    _tokens,
    _turned_back,
)


@triton.jit
def _query_statistics(lse, delta, tokens, heads: tl.constexpr, head):
    """Log-sum-exp in powers of two, +inf where a slot holds no query or a query has no keys, and Δ."""
    real = tokens >= 0
    at = tokens.to(tl.int64) * heads + head
    found = tl.load(lse + at, real, other=-float("inf"))
    return tl.where(found == -float("inf"), float("inf"), found * LOG2E), tl.load(delta + at, real, other=0.0)


@triton.jit
def _visit_query(
    tile, ka, kb, values, k_tokens, k_label, k_bias, dka, dkb, dv, d_bias,
    q, d_out, lse, delta, turns, q_tokens, q_places, q_labels, q_row, heads: tl.constexpr, head, scale,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, ROPE: tl.constexpr,
    LABELS: tl.constexpr, BIAS: tl.constexpr, RUNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = _tokens(q_tokens, tile, BM, RUNS, True)
    qa, qb = _halves(q, tokens, q_row, q, turns, q_places, tile, BM, D, DP, ROPE, True, False)
    level, shift = _query_statistics(lse, delta, tokens, heads, head)
    scores = _product(ka, kb, qa, qb, ROPE, PRECISION) * scale
    if BIAS:
        scores += k_bias[:, None]
    weights = tl.exp2(scores - level[None, :])
    if MASKED:
        allowed = (k_tokens > -2)[:, None]
        if LABELS:
            allowed = allowed & (k_label[:, None] == _labels(q_labels, tile, BM)[None, :])
        weights = tl.where(allowed, weights, 0.0)
    grad = _rows(d_out, tokens, heads * DV, DV, DVP, True)
    dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ds = weights * (tl.dot(values, tl.trans(grad), input_precision=PRECISION) - shift[None, :])
    if BIAS:
        d_bias += tl.sum(ds, 1)
    ds = ds.to(qa.dtype)
    dka = tl.dot(ds, qa, dka, input_precision=PRECISION)
    if ROPE:
        dkb = tl.dot(ds, qb, dkb, input_precision=PRECISION)
    return dka, dkb, dv, d_bias


@triton.jit
def key_gradients(
    q, k, v, bias, turns, pad_k, pad_v, d_out, lse, delta, d_k, d_v, d_bias, d_pad_k, d_pad_v,
    q_tokens, k_tokens, q_places, k_places, q_labels, k_labels, full_ptr, full_idx, part_ptr, part_idx, scale,
    softmax_scale,
    q_row: tl.constexpr, q_head: tl.constexpr, k_row: tl.constexpr, k_head: tl.constexpr,
    v_row: tl.constexpr, v_head: tl.constexpr, heads: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROPE: tl.constexpr, PAD: tl.constexpr, LABELS: tl.constexpr, BIAS: tl.constexpr, RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_k`` (T, key heads, D), ``d_v``, ``d_bias`` (T, heads) and, a tile and key head, sums over padding slots
    ``d_pad_k``, ``d_pad_v``.  The lists are the transposed ones."""
    tile, key_head = tl.program_id(0), tl.program_id(1)
    key_heads: tl.constexpr = heads // GROUP
    tokens, ka, kb, values = _keys(
        tile, k + key_head * k_head, v + key_head * v_head, turns, pad_k + key_head * D, pad_v + key_head * DV,
        k_tokens, k_places, k_row, v_row, BN, D, DP, DV, DVP, ROPE, True, PAD, RUNS, True,
    )  # fmt: skip
    real = tokens >= 0
    d = tl.arange(0, DP)
    e = tl.arange(0, DVP)
    k_label = _labels(k_labels, tile, BN) if LABELS else tokens
    HALF: tl.constexpr = DP // 2 if ROPE else DP
    dka = tl.zeros((BN, HALF), tl.float32)
    dkb = tl.zeros((BN, HALF), tl.float32)
    dv = tl.zeros((BN, DVP), tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        at_bias = tokens.to(tl.int64) * heads + head
        k_bias = tl.load(bias + at_bias, real, other=0.0) * LOG2E if BIAS else tokens
        d_bias_row = tl.zeros((BN,), tl.float32)
        for at in range(tl.load(full_ptr + tile), tl.load(full_ptr + tile + 1)):
            dka, dkb, dv, d_bias_row = _visit_query(
                tl.load(full_idx + at), ka, kb, values, tokens, k_label, k_bias, dka, dkb, dv, d_bias_row,
                q + head * q_head, d_out + head * DV, lse, delta, turns, q_tokens, q_places, q_labels, q_row,
                heads, head, scale, D, DP, DV, DVP, BM, ROPE, LABELS, BIAS, RUNS, False, PRECISION,
            )  # fmt: skip
        for at in range(tl.load(part_ptr + tile), tl.load(part_ptr + tile + 1)):
            dka, dkb, dv, d_bias_row = _visit_query(
                tl.load(part_idx + at), ka, kb, values, tokens, k_label, k_bias, dka, dkb, dv, d_bias_row,
                q + head * q_head, d_out + head * DV, lse, delta, turns, q_tokens, q_places, q_labels, q_row,
                heads, head, scale, D, DP, DV, DVP, BM, ROPE, LABELS, BIAS, RUNS, True, PRECISION,
            )  # fmt: skip
        if BIAS:
            tl.store(d_bias + at_bias, d_bias_row, real)
    if ROPE:
        c, s = _angles(turns, k_places, tile, BN, D, DP)
        dk = _turned_back(dka, dkb, c, s, BN, DP) * softmax_scale
    else:
        dk = dka * softmax_scale
    row = tokens.to(tl.int64) * key_heads + key_head
    tl.store(d_k + row[:, None] * D + d[None, :], dk.to(d_k.dtype.element_ty), real[:, None] & (d < D)[None, :])
    tl.store(d_v + row[:, None] * DV + e[None, :], dv.to(d_v.dtype.element_ty), real[:, None] & (e < DV)[None, :])
    if PAD:
        on_pad = (tokens == -1)[:, None]
        slot = tile.to(tl.int64) * key_heads + key_head
        tl.store(d_pad_k + slot * D + d, tl.sum(tl.where(on_pad, dk, 0.0), 0), d < D)
        tl.store(d_pad_v + slot * DV + e, tl.sum(tl.where(on_pad, dv, 0.0), 0), e < DV)


@triton.jit
def _visit_key(
    tile, qa, qb, q_label, grad, level, shift, dqa, dqb,
    k, v, bias, turns, pad_k, pad_v, k_tokens, k_places, k_labels, k_row, v_row, bias_row, scale,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, ROPE: tl.constexpr,
    PAD: tl.constexpr, LABELS: tl.constexpr, BIAS: tl.constexpr, RUNS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tokens, ka, kb, values = _keys(
        tile, k, v, turns, pad_k, pad_v, k_tokens, k_places, k_row, v_row,
        BN, D, DP, DV, DVP, ROPE, MASKED, PAD and MASKED, RUNS, MASKED,
    )  # fmt: skip
    scores = _product(qa, qb, ka, kb, ROPE, PRECISION)
    scores = _biased(scores, bias, tokens, bias_row, scale) if BIAS else scores * scale
    weights = tl.exp2(scores - level[:, None])
    if MASKED:
        weights = tl.where(_allowed(tokens, q_label, k_labels, tile, BN, LABELS), weights, 0.0)
    ds = weights * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - shift[:, None])
    ds = ds.to(ka.dtype)
    dqa = tl.dot(ds, ka, dqa, input_precision=PRECISION)
    if ROPE:
        dqb = tl.dot(ds, kb, dqb, input_precision=PRECISION)
    return dqa, dqb


@triton.jit
def query_gradients(
    q, k, v, bias, turns, pad_k, pad_v, d_out, lse, delta, d_q,
    q_tokens, k_tokens, q_places, k_places, q_labels, k_labels, full_ptr, full_idx, part_ptr, part_idx, scale,
    softmax_scale,
    q_row: tl.constexpr, q_head: tl.constexpr, k_row: tl.constexpr, k_head: tl.constexpr,
    v_row: tl.constexpr, v_head: tl.constexpr, heads: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROPE: tl.constexpr, PAD: tl.constexpr, LABELS: tl.constexpr, BIAS: tl.constexpr, RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_q`` (T, heads, D)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    k += head // GROUP * k_head
    v += head // GROUP * v_head
    pad_k += head // GROUP * D
    pad_v += head // GROUP * DV
    bias += head
    tokens = _tokens(q_tokens, tile, BM, RUNS, True)
    qa, qb = _halves(q + head * q_head, tokens, q_row, pad_k, turns, q_places, tile, BM, D, DP, ROPE, True, False)
    q_label = _labels(q_labels, tile, BM) if LABELS else tokens
    grad = _rows(d_out + head * DV, tokens, heads * DV, DV, DVP, True)
    level, shift = _query_statistics(lse, delta, tokens, heads, head)
    HALF: tl.constexpr = DP // 2 if ROPE else DP
    dqa = tl.zeros((BM, HALF), tl.float32)
    dqb = tl.zeros((BM, HALF), tl.float32)
    for at in range(tl.load(full_ptr + tile), tl.load(full_ptr + tile + 1)):
        dqa, dqb = _visit_key(
            tl.load(full_idx + at), qa, qb, q_label, grad, level, shift, dqa, dqb,
            k, v, bias, turns, pad_k, pad_v, k_tokens, k_places, k_labels, k_row, v_row, heads, scale,
            D, DP, DV, DVP, BN, ROPE, PAD, LABELS, BIAS, RUNS, False, PRECISION,
        )  # fmt: skip
    for at in range(tl.load(part_ptr + tile), tl.load(part_ptr + tile + 1)):
        dqa, dqb = _visit_key(
            tl.load(part_idx + at), qa, qb, q_label, grad, level, shift, dqa, dqb,
            k, v, bias, turns, pad_k, pad_v, k_tokens, k_places, k_labels, k_row, v_row, heads, scale,
            D, DP, DV, DVP, BN, ROPE, PAD, LABELS, BIAS, RUNS, True, PRECISION,
        )  # fmt: skip
    if ROPE:
        c, s = _angles(turns, q_places, tile, BM, D, DP)
        dq = _turned_back(dqa, dqb, c, s, BM, DP) * softmax_scale
    else:
        dq = dqa * softmax_scale
    d = tl.arange(0, DP)
    at = (tokens.to(tl.int64) * heads + head)[:, None] * D + d[None, :]
    tl.store(d_q + at, dq.to(d_q.dtype.element_ty), (tokens >= 0)[:, None] & (d < D)[None, :])
