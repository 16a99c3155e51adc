"""``hrsam bench scan``: the cycle scan in closed form against scans of the repeated sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hrsam.bench import models
from hrsam.bench.record import Record, dtype_of
from hrsam.bench.reference_flow import mamba_missing, mamba_scan
from hrsam.layout import Layout
from hrsam.ops.cycle_scan import cycle_scan

SIDES, CYCLES = (1024, 2048, 4096), 3
OURS, REPEATED, MAMBA = "ours", "ours with one cycle, sequence repeated", "mamba-ssm, sequence repeated"
NAMES = ("u", "r", "dt_bias", "A_log", "B", "C", "D", "gamma")
NOTE = "baselines are given their copies ready-made and do not add up the cycles: their scan alone is timed"
CHECKED = 32  # channels that are compared: those of the yardstick are slow
Tensors = list[Tensor]


def bench_scan(
    *,
    device: torch.device,
    dtype: str | None = None,
    sides: Sequence[int] = (),
    quick: bool = False,
    seconds: float = 0.5,
    channels: int = 768,
    states: int = 32,
) -> dict[str, Any]:
    """Forward, and forward and backward; float32 and bfloat16 unless ``dtype`` is given.

    A sequence has (side / 16)² tokens.  Raises ``BenchError`` for a wrong result.
    """
    sides = models.sides_or(sides, SIDES, quick)
    channels, states = (8, 4) if quick else (channels, states)
    record = Record("scan", device, quick=quick, seconds=seconds)
    record.notes.append(NOTE)
    missing = mamba_missing() if device.type == "cuda" else "mamba-ssm runs on a GPU only"
    if missing:
        record.skip(MAMBA, missing)
    for name in (dtype,) if dtype else ("float32", "bfloat16"):
        kind = dtype_of(name)
        for side in sides:
            tokens = (side // 16) ** 2
            layout = Layout(((1, tokens),), (0,))
            x = _inputs(tokens, channels, states, kind, device)
            runs: dict[str, tuple[Callable[..., Tensor], Tensors]] = {OURS: (partial(_scan, layout), x)}
            long = _repeated(x)
            runs[REPEATED] = partial(_scan, Layout(((1, CYCLES * tokens),), (0,))), long
            if not missing:
                runs[MAMBA] = _mamba, _channels_first(long)
            for grad in (False, True):
                what = "forward and backward" if grad else "forward"
                check = _check_gradients if grad else _check_output
                record.time(
                    {"tokens": tokens, "dtype": name, "pass": what},
                    {run: _call(function, tensors, grad) for run, (function, tensors) in runs.items()},
                    check=partial(check, record, layout, x, f"{tokens} {name}"),
                    baselines=(MAMBA, REPEATED),
                    optional=(REPEATED, MAMBA),
                    dtype=kind,
                    kernels=True,
                )
    return record.done(dtype=dtype, channels=channels, states=states, cycles=CYCLES)


def _inputs(tokens: int, channels: int, states: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    """u, r, dt_bias, A_log, B, C, D, gamma; parameters are float32."""
    g = torch.Generator(device).manual_seed(models.SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    u, r, B, C = (draw(tokens, n).to(dtype) for n in (channels, channels, states, states))
    A_log = torch.log(torch.arange(1.0, states + 1, device=device)).repeat(channels, 1)
    tensors = [u, r, draw(channels) - 4, A_log, B, C, draw(channels), 1 + 0.3 * draw(channels, CYCLES)]
    return [t.requires_grad_() for t in tensors]


def _repeated(x: Tensors) -> Tensors:
    """The sequence R times with one cycle of weight 1."""
    u, r, dt_bias, A_log, B, C, D, gamma = (t.detach() for t in x)
    u, r, B, C = (t.repeat(CYCLES, 1) for t in (u, r, B, C))
    tensors = [u, r, dt_bias.clone(), A_log.clone(), B, C, D.clone(), torch.ones_like(gamma[:, :1])]
    return [t.requires_grad_() for t in tensors]


def _channels_first(long: Tensors) -> Tensors:
    """What mamba-ssm takes: u, r (1, Ch, L), B, C (1, N, L), and no weights of cycles."""
    u, r, dt_bias, A_log, B, C, D, _ = (t.detach() for t in long)
    u, r, B, C = (t.t().contiguous().unsqueeze(0) for t in (u, r, B, C))
    return [t.clone().requires_grad_() for t in (u, r, dt_bias, A_log, B, C, D)]


def _scan(layout: Layout, *x: Tensor, impl: str = "auto") -> Tensor:
    u, r, dt_bias, A_log, B, C, D, gamma = x
    return cycle_scan(u, r, dt_bias, A_log, B, C, D, gamma, layout, impl=impl)


def _mamba(u: Tensor, r: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return mamba_scan(u, r, dt_bias, A_log, B, C, D)


def _call(function: Callable[..., Tensor], x: Tensors, grad: bool) -> Callable[[], Any]:
    if grad:
        return partial(gradients, function, x, torch.randn_like(x[0]).detach())
    return partial(function, *(t.detach() for t in x))


def gradients(function: Callable[..., Tensor], x: Tensors, w: Tensor) -> tuple[Tensor, ...]:
    """Of Σ function(x) · ``w`` for each of ``x``."""
    return torch.autograd.grad(function(*x), x, w)


def _some(x: Sequence[Tensor], which: Tensor) -> list[Tensor]:
    """A few channels of u, r, dt_bias, A_log, D and gamma."""
    u, r, dt_bias, A_log, B, C, D, gamma = (t.detach() for t in x)
    return [u[:, which], r[:, which], dt_bias[which], A_log[which], B, C, D[which], gamma[which]]


def _channels(x: Tensors) -> Tensor:
    channels = x[0].shape[1]
    return torch.arange(0, channels, max(1, channels // CHECKED), device=x[0].device)


def _check_output(record: Record, layout: Layout, x: Tensors, name: str, results: dict[str, Any]) -> None:
    which = _channels(x)
    few = _some(x, which)
    with torch.no_grad():
        low = _scan(layout, *few, impl="torch")
        high = _scan(layout, *(t.double() for t in few), impl="torch")
    record.gate.check(f"{name}: y", results[OURS][:, which], high, low)


def _check_gradients(record: Record, layout: Layout, x: Tensors, name: str, results: dict[str, Any]) -> None:
    """Only the channels that are compared get a gradient, so that those of B and C, sums over channels, compare too."""
    which = _channels(x)
    w = torch.zeros_like(x[0])
    w[:, which] = torch.randn_like(x[0][:, which])
    got = _some(gradients(partial(_scan, layout), x, w), which)
    twin = partial(_scan, layout, impl="torch")
    few = _some(x, which)
    low = gradients(twin, [t.clone().requires_grad_() for t in few], w[:, which])
    high = gradients(twin, [t.double().requires_grad_() for t in few], w[:, which].double())
    for part, a, b, c in zip(NAMES, got, high, low):
        record.gate.check(f"{name}: gradient of {part}", a, b, c, factor=3.0)
