"""``hrsam bench packing``: encoder training on pictures of different sizes, packed and padded to the largest."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrsam.bench import models
from hrsam.bench.record import Record, dtype_of
from hrsam.models.cost import encode_cost
from hrsam.models.encoder import Encoder, EncoderConfig
from hrsam.tables import forget

PRESETS, BATCHES = ("hrsam_b", "hrsam_pp_b"), (4, 8)
# Batches of each size, one after the other: what padding wastes differs much between single ones.
DRAWS, QUICK_DRAWS = 6, 2
SIDES, QUICK_SIDES, ASPECTS = (640, 2048), (32, 96), (0.5, 1.0)
Result = tuple[list[Tensor], dict[str, Tensor]]
PACKED, NEW, PADDED = "packed", "packed, a new layout each step", "padded to the largest"
NOTE = (
    "forward and backward of the encoder for a given gradient of the features; long sides uniform in 640…2048 pixels (32…96 in "
    "a quick run), short sides ½ to 1 of them, upright or lying; times are of several batches, one after the other, the "
    "first of which is checked; useful: share of the padded batches that is picture; 'a new layout' lets every call make its "
    "index tables, as the steps of a training do; padded pictures are another function of the same weights, which sees the "
    "padding, so only packed results are checked; operations are three times those of the forward "
    "pass without padding, for all rows"
)


def bench_packing(
    *,
    device: torch.device,
    dtype: str = "bfloat16",
    presets: Sequence[str] = (),
    batches: Sequence[int] = (),
    quick: bool = False,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Images a second at equal pictures a step, over several steps.  Raises ``BenchError`` for a wrong result."""
    kind, batches = dtype_of(dtype), tuple(batches) or ((3,) if quick else BATCHES)
    record = Record("packing", device, quick=quick, seconds=seconds)
    record.notes.append(NOTE)
    for preset in presets or (PRESETS[:1] if quick else PRESETS):  # an anchor map is most of a small picture's work
        model = models.random_model(preset, device, quick).train()
        encoder, config = model.encoder, model.config.encoder
        assert isinstance(encoder, Encoder)
        assert isinstance(config, EncoderConfig)
        for batch in batches:
            drawn = [
                picture_sizes(batch, QUICK_SIDES if quick else SIDES, config.patch, draw)
                for draw in range(QUICK_DRAWS if quick else DRAWS)
            ]
            work = [_inputs(sizes, config, device) for sizes in drawn]
            runs = {
                name: partial(_one_after_the_other, one, encoder, work)
                for name, one in ((PACKED, step), (NEW, new_layout), (PADDED, padded_step))
            }
            cells = sum(h * w for sizes in drawn for h, w in sizes)
            useful = cells / sum(batch * math.prod(map(max, zip(*sizes))) for sizes in drawn)
            first = len(record.rows)
            record.time(
                {"preset": preset, "pictures": batch, "batches": len(drawn), "useful": round(useful, 3)},
                {name: models.under(kind, device, run, grad=True) for name, run in runs.items()},
                check=partial(_check, record, encoder, *work[0], kind, f"{preset} {batch}"),
                baselines=(PADDED,),
                optional=(PADDED,),
                flops=3 * sum(encode_cost(config, *size).flops for sizes in drawn for size in sizes),
                dtype=kind,
            )
            for row in record.rows[first:]:
                row["pictures_per_s"] = float(f"{1000 * batch * len(drawn) / row['median_ms']:.4g}")
        del model, encoder  # one at a time on the device
    return record.done(dtype=dtype, batches=list(batches))


def picture_sizes(count: int, sides: tuple[int, int], patch: int, draw: int = 0) -> list[tuple[int, int]]:
    """(height, width) in whole patches, the same for every machine; ``draw``: which batch of such pictures."""
    rng = random.Random(models.SEED + draw)
    sizes = []
    for _ in range(count):
        long = rng.uniform(*sides)
        size = [patch * max(1, round(side / patch)) for side in (long, long * rng.uniform(*ASPECTS))]
        sizes.append((size[0], size[1]) if rng.random() < 0.5 else (size[1], size[0]))
    return sizes


def _inputs(
    sizes: Sequence[tuple[int, int]], config: EncoderConfig, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Random pictures of these sizes, and gradients for their features."""
    g = torch.Generator().manual_seed(models.SEED)
    xs = [torch.randn(3, *size, generator=g).to(device) for size in sizes]
    grids = [(height // config.patch, width // config.patch) for height, width in sizes]
    return xs, [torch.randn(config.out_channels, *grid, generator=g).to(device) for grid in grids]


def _one_after_the_other(
    one: Callable[[Encoder, Sequence[Tensor], Sequence[Tensor]], Result],
    encoder: Encoder,
    work: Sequence[tuple[list[Tensor], list[Tensor]]],
) -> Result:
    """All batches; what is found for the first."""
    found = one(encoder, *work[0])
    for batch in work[1:]:
        one(encoder, *batch)
    return found


def step(encoder: Encoder, xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Result:
    """Features of each picture and the gradient of Σ features · ``ws`` for each weight."""
    return _gradients(encoder, encoder.forward_packed(xs), ws)


def new_layout(encoder: Encoder, xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Result:
    """:func:`step` as if no such pictures had been seen before."""
    forget()
    return step(encoder, xs, ws)


def padded_step(encoder: Encoder, xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Result:
    """One batch of the largest height and width; gradients come from the same cells."""
    height, width = (max(x.shape[axis] for x in xs) for axis in (1, 2))
    whole = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in xs])
    features = [f[:, : w.shape[1], : w.shape[2]] for f, w in zip(encoder(whole), ws)]
    return _gradients(encoder, features, ws)


def _gradients(encoder: Encoder, features: Sequence[Tensor], ws: Sequence[Tensor]) -> Result:
    named = dict(encoder.named_parameters())
    given = [w.to(f.dtype) for f, w in zip(features, ws)]
    grads = torch.autograd.grad(features, list(named.values()), given, materialize_grads=True)
    return [f.detach() for f in features], dict(zip(named, grads))


def _check(
    record: Record,
    encoder: Encoder,
    xs: Sequence[Tensor],
    ws: Sequence[Tensor],
    kind: torch.dtype,
    name: str,
    results: dict[str, Any],
) -> None:
    """Packed against one picture after the other, in higher precision; the budget is the error of that in the timed one."""
    with models.precision(kind, record.device):
        low = _one_by_one(encoder, xs, ws)
    plain, high_kind = models.yardstick(encoder, record.device)
    with models.exactly():
        high = _one_by_one(plain, [x.to(high_kind) for x in xs], [w.to(high_kind) for w in ws])
    for run in (PACKED, NEW):
        features, grads = results[run]
        for index in range(len(xs)):
            part = f"{name}: {run}, features of picture {index}"
            record.gate.check(part, features[index], high[0][index], low[0][index])
        record.gate.check_all(f"{name}: {run}, gradients", grads, high[1], low[1], factor=3.0)


def _one_by_one(encoder: nn.Module, xs: Sequence[Tensor], ws: Sequence[Tensor]) -> Result:
    named = {name.removeprefix("encoder."): p for name, p in encoder.named_parameters()}  # a flow holds an encoder
    maps, total = [], {name: torch.zeros_like(p) for name, p in named.items()}
    for x, w in zip(xs, ws):
        features = encoder(x.unsqueeze(0))[0]
        grads = torch.autograd.grad(features, list(named.values()), w.to(features.dtype), materialize_grads=True)
        maps.append(features.detach())
        for into, grad in zip(total.values(), grads):
            into += grad
    return maps, total
