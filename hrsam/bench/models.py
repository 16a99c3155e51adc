"""Models to measure: random weights, the precision of a run, and results to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hrsam.bench.gate import BenchError
from hrsam.bench.record import Record
from hrsam.bench.reference_flow import ReferenceFlow, mamba_missing
from hrsam.bench.timing import graphed
from hrsam.models.encoder import Encoder, EncoderConfig
from hrsam.models.model import HRSAM, ModelConfig
from hrsam.models.presets import PRESETS, suggest

TINY = {"width": 48, "heads": 3, "depth": 4, "scan_at": (1, 3), "state": 4}  # of a quick run
SEED = 0
YARDSTICK = "yardstick"
GRAPH = "{}, CUDA graph"  # a baseline that does not wait for Python


def random_model(preset: str, device: torch.device, quick: bool) -> HRSAM:
    """An HRSAM model of a preset with :func:`redraw`-n weights, in evaluation mode; ``quick``: a tiny one of its kind.

    Raises ``ValueError`` for a preset that does not exist or is not HRSAM.
    """
    known = [name for name, make in PRESETS.items() if isinstance(make().encoder, EncoderConfig)]
    if preset not in known:
        raise ValueError(f"the benchmark has no preset {preset!r}; {suggest(preset, known)}")
    config = PRESETS[preset]()
    assert isinstance(config.encoder, EncoderConfig)
    if quick:
        anchor = None if config.encoder.anchor_side is None else 64
        config = ModelConfig(preset, replace(config.encoder, anchor_side=anchor, **TINY))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return redraw(HRSAM(config), SEED).to(device).eval()


def optimized(model: HRSAM, dtype: torch.dtype, device: torch.device, quick: bool) -> Any:
    """``model.optimize`` with all it can do here; a quick run compiles nothing.

    Call what it returns in :func:`under` float32: it has its own precision and needs no autocast.
    """
    fast: Any = model
    return fast.optimize(dtype=dtype, compile=not quick, graphs=not quick and device.type == "cuda")


def redraw(model: HRSAM, seed: int) -> HRSAM:
    """Redraw all parameters, those too that begin at 0 or 1, so that every part of the model counts in a result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            kind = name.rsplit(".", 1)[-1]
            if kind in ("A_log", "dt_bias"):  # decay and step stay in their usual range
                parameter.add_(0.1 * noise)
            elif kind in ("D", "gamma"):
                parameter.copy_(1 + 0.3 * noise)
            elif kind == "padding":
                parameter.copy_(noise)
            elif kind == "pos_embed":
                parameter.copy_(0.2 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_((kind == "weight") + 0.1 * noise)
    return model


@contextmanager
def precision(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """How a run computes: autocast for a 16-bit type, TF32 products otherwise (only GPUs have them)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def under(dtype: torch.dtype, device: torch.device, function: Callable[[], object], grad: bool = False):
    """A function without arguments that calls ``function`` in :func:`precision`, as a person would call it: 16-bit copies
    of the weights are made in each call."""

    def call():
        with precision(dtype, device), torch.set_grad_enabled(grad):
            return function()

    return call


class Replayed:
    """``function``, which takes no arguments, as a CUDA graph that is captured in the first call."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.replay: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self.replay is None:
            self.replay, self.result = graphed(self.function)
        else:
            self.replay()
        return self.result


@contextmanager
def exactly() -> Iterator[None]:
    """Float32 products in full, for results to compare with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def yardstick(encoder: Encoder, device: torch.device) -> tuple[nn.Module, torch.dtype]:
    """The reference flow in higher precision, to be called in :func:`exactly`, and the type of its input: float64 on a CPU,
    where only small sizes are run, float32 without TF32 on a GPU."""
    if device.type == "cpu":
        return ReferenceFlow(copy.deepcopy(encoder).double(), "torch"), torch.float64
    return ReferenceFlow(encoder, "triton"), torch.float32


def reference_flows(encoder: Encoder, device: torch.device, record: Record) -> dict[str, ReferenceFlow]:
    """The baselines by name; a scan that cannot be used is noted in the record."""
    missing = mamba_missing() if device.type == "cuda" else "mamba-ssm runs on a GPU only"
    if missing:
        record.skip("reference flow, mamba scan", missing)
    scans = [*([] if missing else ["mamba"]), "triton" if device.type == "cuda" else "torch"]
    return {f"reference flow, {scan} scan": ReferenceFlow(encoder, scan) for scan in scans}


def first_result(results: dict[str, Any], flows: Sequence[str], name: str) -> Any:
    """What the first baseline that ran returned; ``BenchError`` when none did."""
    for flow in flows:
        if flow in results:
            return results[flow]
    raise BenchError(f"the reference flow could not run for {name}, so nothing can be checked; use a smaller --side")


def pixels(batch: int, side: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randn(batch, 3, side, side, generator=generator).to(device)


def sides_or(sides: Sequence[int], usual: Sequence[int], quick: bool) -> tuple[int, ...]:
    """The sides that were asked for, or the usual ones; multiples of 16.  ``ValueError`` for others."""
    if any(side % 16 or side < 16 for side in sides):
        raise ValueError(f"sides must be multiples of 16 pixels; got {', '.join(map(str, sides))}")
    return tuple(sides) or ((64,) if quick else tuple(usual))
