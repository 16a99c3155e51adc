"""``hrsam bench click``: prompt to mask logits on a picture that is encoded already."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hrsam.bench import models
from hrsam.bench.record import Record, dtype_of
from hrsam.models.model import HRSAM, Decoded, Embedding

PRESETS, SIDES, CLICKS = ("hrsam_pp_b",), (1024, 2048, 4096), (1, 5, 20)
OPTIMIZED, EAGER = "ours optimized", "ours eager"


def bench_click(
    *,
    device: torch.device,
    dtype: str = "bfloat16",
    sides: Sequence[int] = (),
    presets: Sequence[str] = (),
    quick: bool = False,
    seconds: float = 0.5,
) -> dict[str, Any]:
    """Latency of one decode with the logits of the round before.  Raises ``BenchError`` for a wrong result."""
    kind, sides = dtype_of(dtype), models.sides_or(sides, SIDES, quick)
    record = Record("click", device, quick=quick, seconds=seconds)
    for preset in presets or PRESETS:
        model = models.random_model(preset, device, quick)
        optimized = models.optimized(model, kind, device, quick)
        for side in sides:
            embedding = _embedding(model, side // 16, device)
            for clicks in CLICKS:
                prompt = _prompt(side, clicks, device)
                fast, eager = partial(optimized.decode, embedding, **prompt), partial(model.decode, embedding, **prompt)
                record.time(
                    {"preset": preset, "grid": side // 16, "clicks": clicks},
                    {
                        OPTIMIZED: models.under(torch.float32, device, partial(_values, fast)),
                        EAGER: models.under(kind, device, partial(_values, eager)),
                    },
                    check=partial(_check, record, model, embedding, prompt, f"{preset} {side} {clicks}"),
                    baselines=(EAGER,),
                    dtype=kind,
                )
    return record.done(dtype=dtype)


def _values(decode: partial[Decoded]) -> tuple[Tensor, Tensor]:
    decoded = decode()
    return decoded.logits, decoded.iou


def _embedding(model: HRSAM, grid: int, device: torch.device) -> Embedding:
    """Random features of unit variance, as those of the encoder's last norm."""
    features = torch.randn(1, 256, grid, grid, generator=torch.Generator().manual_seed(models.SEED))
    with torch.no_grad():
        return Embedding(features.to(device), model.prompt_encoder.dense_positions((grid, grid)))


def _prompt(side: int, clicks: int, device: torch.device) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(models.SEED + clicks)
    prompt = {
        "points": side * torch.rand(1, clicks, 2, generator=g),
        "labels": torch.randint(0, 2, (1, clicks), generator=g),
        "previous": 5 * torch.randn(1, 1, side // 4, side // 4, generator=g),
    }
    return {name: value.to(device) for name, value in prompt.items()}


def _check(
    record: Record,
    model: HRSAM,
    given: Embedding,
    prompt: dict[str, Tensor],
    name: str,
    results: dict[str, Any],
) -> None:
    """Optimised against the plain decoder in higher precision; the budget is the plain one's error in the precision timed.

    Logits, in units of the largest one, and the predicted IoU are checked together: the plain error of one number alone may
    be nothing by chance and would be no budget.
    """
    exact, kind = model, torch.float32
    if record.device.type == "cpu":
        exact, kind = copy.deepcopy(model).double(), torch.float64
    embedding = Embedding(given.features.to(kind), given.positions.to(kind))
    with models.exactly(), torch.no_grad():
        high = _values(partial(exact.decode, embedding, **{**prompt, "previous": prompt["previous"].to(kind)}))
    unit = float(high[0].abs().max())
    got, want, low = (
        torch.cat(((logits / unit).flatten(), iou.flatten()))
        for logits, iou in (results[OPTIMIZED], high, results[EAGER])
    )
    record.gate.check(f"{name}: {OPTIMIZED}, logits and predicted IoU", got, want, low)
