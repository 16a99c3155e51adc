"""``hrsam bench encoder``: picture to features, ours and the reference's data flow with the same random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hrsam.bench import models
from hrsam.bench.flops import flops
from hrsam.bench.record import Record, dtype_of
from hrsam.models.encoder import Encoder, EncoderConfig
from hrsam.models.presets import build

PRESETS, SIDES = ("hrsam_b", "hrsam_pp_b"), (1024, 2048, 4096)
OPTIMIZED, EAGER = "ours optimized", "ours eager"
NOTE = (
    "tflops counts the operations of the cheapest exact form for all rows (hrsam/bench/flops.py), so rows differ by their "
    "time only; peak_gib is beyond weights and input; a triton scan of the reference flow is our own kernel in place of "
    "mamba-ssm's"
)


def bench_encoder(
    *,
    device: torch.device,
    dtype: str = "bfloat16",
    sides: Sequence[int] = (),
    presets: Sequence[str] = (),
    batch: int = 1,
    peers: bool = False,
    quick: bool = False,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Forward time of encoders.  ``peers``: SAM's ViT-B through timm too.  Raises ``BenchError`` for a wrong result."""
    kind, sides = dtype_of(dtype), models.sides_or(sides, SIDES, quick)
    record = Record("encoder", device, quick=quick, seconds=seconds)
    record.notes.append(NOTE)
    for preset in presets or PRESETS:
        model = models.random_model(preset, device, quick)
        encoder, config = model.encoder, model.config.encoder
        assert isinstance(encoder, Encoder)
        assert isinstance(config, EncoderConfig)
        optimized = models.optimized(model, kind, device, quick).encoder
        flows = models.reference_flows(encoder, device, record)
        runs = {OPTIMIZED: optimized, EAGER: encoder, **flows}
        for side in sides:
            x = models.pixels(batch, side, device)
            calls: dict[str, Callable[[], Any]] = {name: partial(run, x) for name, run in runs.items()}
            if device.type == "cuda":
                baseline = next(iter(flows))
                calls[models.GRAPH.format(baseline)] = models.Replayed(calls[baseline])
            record.time(
                {"preset": preset, "side": side, "pass": "forward"},
                {
                    name: models.under(torch.float32 if name == OPTIMIZED else kind, device, call)
                    for name, call in calls.items()
                },
                check=partial(_check, record, encoder, x, tuple(flows), f"{preset} {side}"),
                baselines=tuple(flows),
                optional=tuple(calls)[2:],
                flops=batch * flops(config, side),
                dtype=kind,
            )
            del calls
        del model, optimized, flows, runs  # one at a time on the device
    if peers:
        _peers(record, sides, batch, kind, quick)
    return record.done(dtype=dtype, batch=batch)


def _check(
    record: Record, encoder: Encoder, x: Tensor, flows: Sequence[str], name: str, results: dict[str, Any]
) -> None:
    """Ours against the reference flow in higher precision; the budget is the error of the baseline that is timed."""
    low = models.first_result(results, flows, name)
    plain, kind = models.yardstick(encoder, record.device)
    with models.exactly(), torch.no_grad():
        high = plain(x.to(kind))
    for run in (OPTIMIZED, EAGER, *(graph for graph in map(models.GRAPH.format, flows) if graph in results)):
        record.gate.check(f"{name}: {run}", results[run], high, low)


def _peers(record: Record, sides: Sequence[int], batch: int, kind: torch.dtype, quick: bool) -> None:
    """SAM's own ViT-B, eager and compiled."""
    name = "SAM ViT-B (timm)"
    if quick:
        record.skip(name, "a quick run leaves it out")
        return
    if 1024 not in sides:
        record.skip(name, "it takes 1024 px only")
        return
    try:
        sam = build("sam_b").encoder.to(record.device).eval()
    except ValueError as err:  # timm is missing
        record.skip(name, str(err))
        return
    x, compiled = models.pixels(batch, 1024, record.device), torch.compile(sam, dynamic=False)
    functions = {name: partial(sam, x), f"{name}, compiled": partial(compiled, x)}
    record.time(
        {"preset": "sam_b", "side": 1024, "pass": "forward"},
        {n: models.under(kind, record.device, f) for n, f in functions.items()},
        check=None,
        baselines=(name,),
        optional=tuple(functions),
        dtype=kind,
    )
