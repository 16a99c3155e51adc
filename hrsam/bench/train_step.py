"""``hrsam bench train-step``: forward and backward of the encoder, ours and the reference's data flow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hrsam.bench import models
from hrsam.bench.flops import flops
from hrsam.bench.record import Record, dtype_of
from hrsam.models.block import Block, CycleScan
from hrsam.models.encoder import Encoder, EncoderConfig

PRESETS, SIDES = ("hrsam_b", "hrsam_pp_b"), (1024, 2048)
EAGER, COMPILED, GRAPHED = "ours eager", "ours compiled", "ours compiled, CUDA graph"
NOTE = (
    "gradients of all weights for a given gradient of the features; no loss, no optimiser; operations are three times "
    "those of the forward pass"
)


def bench_train_step(
    *,
    device: torch.device,
    dtype: str = "bfloat16",
    sides: Sequence[int] = (),
    presets: Sequence[str] = (),
    batch: int = 1,
    quick: bool = False,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Forward and backward time of encoders.  Raises ``BenchError`` for a wrong result."""
    kind, sides = dtype_of(dtype), models.sides_or(sides, SIDES, quick)
    record = Record("train-step", device, quick=quick, seconds=seconds)
    record.notes.append(NOTE)
    for preset in presets or PRESETS:
        model = models.random_model(preset, device, quick).train()
        encoder, config = model.encoder, model.config.encoder
        assert isinstance(encoder, Encoder)
        assert isinstance(config, EncoderConfig)
        flows = models.reference_flows(encoder, device, record)
        for side in sides:
            x = models.pixels(batch, side, device)
            g = torch.Generator(device).manual_seed(models.SEED)
            grid = (side // config.patch, side // config.patch)
            w = torch.randn(batch, config.out_channels, *grid, generator=g, device=device)
            runs: dict[str, Callable[[], Any]] = {EAGER: partial(step, encoder, x, w)}
            if quick:
                record.skip(COMPILED, "a quick run leaves it out")
            else:
                torch._dynamo.reset()  # shapes of an earlier size are not needed again
                runs[COMPILED] = partial(step, compiled(encoder), x, w)
                if device.type == "cuda":
                    runs[GRAPHED] = Graphed(compiled(encoder), x, w, kind)
            ours = tuple(runs)
            runs |= {name: partial(step, flow, x, w) for name, flow in flows.items()}
            if device.type == "cuda":
                baseline = next(iter(flows))
                runs[models.GRAPH.format(baseline)] = Graphed(copy.deepcopy(flows[baseline]), x, w, kind)
            record.time(
                {"preset": preset, "side": side, "pass": "forward and backward"},
                {name: models.under(kind, device, run, grad=True) for name, run in runs.items()},
                check=partial(_check, record, encoder, x, w, ours, tuple(flows), f"{preset} {side}"),
                baselines=tuple(flows),
                optional=(*flows, GRAPHED, *map(models.GRAPH.format, flows)),
                flops=3 * batch * flops(config, side),
                dtype=kind,
            )
            del runs
        del model, encoder, flows  # one at a time on the device
    return record.done(dtype=dtype, batch=batch)


def step(encoder: nn.Module, x: Tensor, w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of ``x`` and the gradient of Σ features · ``w`` for each weight, by the names of :class:`Encoder`."""
    named = {name.removeprefix("encoder."): p for name, p in encoder.named_parameters()}  # a flow holds an encoder
    features = encoder(x)
    grads = torch.autograd.grad(features, list(named.values()), w.to(features.dtype), materialize_grads=True)
    return features.detach(), dict(zip(named, grads))


def compiled(encoder: Encoder) -> Encoder:
    """A copy whose blocks and scans are compiled around the attention and the scan kernel."""
    torch._dynamo.config.recompile_limit = 64  # beyond its limit the compiler would silently do nothing
    twin = copy.deepcopy(encoder)
    for module in twin.modules():
        if isinstance(module, (Block, CycleScan)):
            for part in ("before", "after"):
                setattr(module, part, torch.compile(getattr(module, part), dynamic=False))
    return twin


class Graphed:
    """:func:`step` of one encoder for one input as two CUDA graphs, captured in the first call."""

    def __init__(self, encoder: nn.Module, x: Tensor, w: Tensor, dtype: torch.dtype):
        self.encoder, self.x, self.w, self.dtype = encoder, x, w, dtype
        self.captured = False

    def __call__(self) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.captured:
            sixteen = self.dtype != torch.float32
            with torch.autocast("cuda", self.dtype if sixteen else None, enabled=sixteen, cache_enabled=False):
                torch.cuda.make_graphed_callables(self.encoder, (self.x,), allow_unused_input=True)
            self.captured = True
        return step(self.encoder, self.x, self.w)


def _check(
    record: Record,
    encoder: Encoder,
    x: Tensor,
    w: Tensor,
    ours: Sequence[str],
    flows: Sequence[str],
    name: str,
    results: dict[str, Any],
) -> None:
    """Ours against the reference flow in higher precision; the budget is the error of the baseline that is timed."""
    low = models.first_result(results, flows, name)
    plain, kind = models.yardstick(encoder, record.device)
    with models.exactly():
        high = step(plain, x.to(kind), w.to(kind))
    for run in (*ours, *map(models.GRAPH.format, flows)):
        if run in results:
            record.gate.check(f"{name}: {run}, features", results[run][0], high[0], low[0])
            record.gate.check_all(f"{name}: {run}, gradients", results[run][1], high[1], low[1], factor=3.0)
