"""``hrsam bench attention``: full and window attention against PyTorch's own kernels.

The baselines of window attention attend inside plain windows that lie ready, without rotary positions, padding, or bringing
tokens into windows and back, all of which ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hrsam.bench import models
from hrsam.bench.record import Record, dtype_of
from hrsam.layout import Layout
from hrsam.ops.rope import Rope
from hrsam.ops.window import window_attention

SIDES = (1024, 2048, 4096)
OURS, FLEX = "ours", "FlexAttention, compiled"
BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
CHECKED = 64  # queries of full attention that are compared
Tensors = list[Tensor]
NOTE = (
    "baselines of window attention get plain windows ready-made, without positions and padding; operations are those of "
    "queries that are tokens"
)


def bench_attention(
    *,
    device: torch.device,
    dtype: str = "bfloat16",
    sides: Sequence[int] = (),
    quick: bool = False,
    seconds: float = 0.3,
    heads: int = 12,
    head_dim: int = 64,
) -> dict[str, Any]:
    """Forward, and forward and backward, for (side / 16)² tokens.  Raises ``BenchError`` for a wrong result."""
    kind, sides = dtype_of(dtype), models.sides_or(sides, SIDES, quick)
    heads, head_dim, window = (2, 8, 4) if quick else (heads, head_dim, 16)
    record = Record("attention", device, quick=quick, seconds=seconds)
    record.notes.append(NOTE)
    if any((side // 16) % window for side in sides):
        raise ValueError(
            f"sides must be multiples of {16 * window} pixels, so that plain windows need no padding; got {sides}"
        )
    for side in sides:
        grid = (side // 16, side // 16)
        for grad in (False, True):
            _full(record, grid, heads, head_dim, kind, grad)
            for shift in (0, window // 2):
                _windows(record, grid, heads, head_dim, kind, grad, window, shift)
    return record.done(dtype=dtype, heads=heads, head_dim=head_dim, window=window)


def _full(record: Record, grid: tuple[int, int], heads: int, head_dim: int, kind: torch.dtype, grad: bool) -> None:
    from hrsam.ops.full import full_attention

    tokens = grid[0] * grid[1]
    x = [_draw(record, i, (tokens, heads, head_dim), kind) for i in range(3)]
    ours = partial(full_attention, layout=Layout((grid,), (0,)))
    one_batch = [t.detach().transpose(0, 1).unsqueeze(0).contiguous().requires_grad_() for t in x]
    runs = {OURS: (ours, x), **{name: (run, one_batch) for name, run in _sdpa(record).items()}}
    if record.device.type == "cuda":
        runs[FLEX] = _flex(), one_batch
    else:
        record.skip(FLEX, "it is timed on a GPU only")
    record.time(
        {"attention": "full", "tokens": tokens, "shift": None, "pass": _pass(grad)},
        {name: _call(run, tensors, grad) for name, (run, tensors) in runs.items()},
        check=partial(_check_full, record, ours, x, grad, f"full {tokens}"),
        baselines=tuple(BACKENDS),
        optional=(*BACKENDS, FLEX),
        flops=_operations(grad) * tokens * tokens * heads * head_dim,
        dtype=kind,
        kernels=True,
    )


def _windows(
    record: Record,
    grid: tuple[int, int],
    heads: int,
    head_dim: int,
    kind: torch.dtype,
    grad: bool,
    window: int,
    shift: int,
) -> None:
    tokens, size = grid[0] * grid[1], window * window
    x = [_draw(record, i, (tokens, heads, head_dim), kind) for i in range(3)]
    x += [_draw(record, 3 + i, (heads, head_dim), kind) for i in range(2)]

    def ours(q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor, pad_v: Tensor, impl: str = "auto") -> Tensor:
        options: dict[str, Any] = {"window": window, "shift": shift, "rope": Rope(), "impl": impl}
        return window_attention(q, k, v, Layout((grid,), (0,)), pad_kv=(pad_k, pad_v), **options)

    plain = [_draw(record, 5 + i, (tokens // size, heads, size, head_dim), kind) for i in range(3)]
    runs = {OURS: (ours, x), **{name: (run, plain) for name, run in _sdpa(record).items()}}
    record.time(
        {"attention": f"windows of {size}", "tokens": tokens, "shift": shift, "pass": _pass(grad)},
        {name: _call(run, tensors, grad) for name, (run, tensors) in runs.items()},
        check=partial(_check_windows, record, ours, x, grad, f"windows {tokens} shift {shift}"),
        baselines=tuple(BACKENDS),
        optional=tuple(BACKENDS),
        flops=_operations(grad) * tokens * size * heads * head_dim,
        dtype=kind,
        kernels=True,
    )


def _pass(grad: bool) -> str:
    return "forward and backward" if grad else "forward"


def _operations(grad: bool) -> float:
    """For each pair of query and key and each channel: two products forward, five backward."""
    return 14 if grad else 4


def _draw(record: Record, index: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    g = torch.Generator(record.device).manual_seed(models.SEED + index)
    return torch.randn(shape, generator=g, device=record.device).to(kind).requires_grad_()


def _sdpa(record: Record) -> dict[str, Callable[..., Tensor]]:
    """PyTorch's kernels, each alone: q, k, v (windows, heads, tokens, D)."""

    def run(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    if record.device.type == "cpu":
        record.skip("SDPA cuDNN", "cuDNN runs on a GPU only")
    on_cpu = record.device.type == "cpu"
    return {n: partial(run, b) for n, b in BACKENDS.items() if not (on_cpu and b == SDPBackend.CUDNN_ATTENTION)}


def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # shapes of an earlier size are not needed again
    return torch.compile(flex_attention, dynamic=False)


def _call(function: Callable[..., Tensor], x: Tensors, grad: bool) -> Callable[[], Any]:
    if grad:
        return partial(_gradients, function, x, torch.randn_like(x[0]).detach())
    return partial(function, *(t.detach() for t in x))


def _gradients(function: Callable[..., Tensor], x: Sequence[Tensor], w: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*x), list(x), w)


def _plain_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of some queries: ``q`` (Q, N, D), ``k``, ``v`` (T, N, D) -> (Q, N, D), in float32 at least."""
    work = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("qnd,knd->nqk", q.to(work), k.to(work)) * q.shape[2] ** -0.5
    return torch.einsum("nqk,knd->qnd", logits.softmax(-1), v.to(work)).to(q.dtype)


def _check_full(
    record: Record, ours: Callable[..., Tensor], x: Tensors, grad: bool, name: str, results: Mapping[str, Any]
) -> None:
    """Some queries and, when only they get a gradient, what they send to all keys and values."""
    g = torch.Generator().manual_seed(models.SEED)
    rows = torch.randperm(len(x[0]), generator=g)[:CHECKED].to(record.device)
    with models.exactly():
        few = [x[0].detach()[rows], x[1].detach(), x[2].detach()]
        if not grad:
            high, low = _plain_full(*(t.double() for t in few)), _plain_full(*few)
            record.gate.check(name, results[OURS][rows], high, low)
            return
        w = torch.zeros_like(x[0])
        w[rows] = torch.randn_like(w[rows])
        got = _gradients(ours, x, w)
        high, low = _both_gradients(_plain_full, few, w[rows])
    for part, a, b, c in zip(("q", "k", "v"), (got[0][rows], *got[1:]), high, low):
        record.gate.check(f"{name}: gradient of {part}", a, b, c, factor=3.0)


def _check_windows(
    record: Record, ours: Callable[..., Tensor], x: Tensors, grad: bool, name: str, results: Mapping[str, Any]
) -> None:
    """Everything, against the plain PyTorch path."""
    twin, few = partial(ours, impl="torch"), [t.detach() for t in x]
    with models.exactly():
        if not grad:
            record.gate.check(name, results[OURS], twin(*(t.double() for t in few)), twin(*few))
            return
        w = torch.randn_like(x[0])
        got = _gradients(ours, x, w)
        high, low = _both_gradients(twin, few, w)
    for part, a, b, c in zip(("q", "k", "v", "padding key", "padding value"), got, high, low):
        record.gate.check(f"{name}: gradient of {part}", a, b, c, factor=3.0)


def _both_gradients(
    twin: Callable[..., Tensor], few: Tensors, w: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of the plain path, in float64 and in the type of ``few``."""
    high = _gradients(twin, [t.double().requires_grad_() for t in few], w.double())
    return high, _gradients(twin, [t.clone().requires_grad_() for t in few], w)
