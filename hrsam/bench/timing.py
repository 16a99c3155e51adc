"""Honest timing: a check of the results first, then all functions in turn in one process.

Every timed call begins on an idle device, so that what the host does before the device has work is part of it, as it is for
a person who waits for one picture.  With ``flush`` caches are emptied before each call; that keeps the device busy for
some tenths of a millisecond, in which the host gets ahead: it shows the time of the kernels alone.
"""

from __future__ import annotations

import gc
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hrsam.bench.gate import BenchError

WARM_UP = 3
FEWEST, MOST = 5, 1000  # rounds
FLUSH_BYTES, FLUSHES = 1 << 28, 4
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF",)  # of the environment, told with the command


@dataclass(frozen=True)
class Times:
    """Of one function: median, 20 % and 80 % quantile in milliseconds over ``repeats`` calls.

    ``peak_gib``: most memory allocated on the device during its first calls beyond what was allocated before them (the
    first ones, because a CUDA graph allocates what it needs when it is captured); ``None`` on a CPU.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    peak_gib: float | None


class _Clock:
    """Milliseconds of one call, by events on a GPU."""

    def __init__(self, device: torch.device, flush: bool):
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.cuda and flush else None

    def __call__(self, function: Callable[[], Any]) -> float:
        if not self.cuda:
            started = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if self.flush is not None:
            for _ in range(FLUSHES):
                self.flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def _first_calls(function: Callable[[], Any], cuda: bool) -> tuple[Any, float | None]:
    """Result of the last of the first few calls, and their peak memory in GiB."""
    before = 0
    if cuda:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    result = None
    for _ in range(WARM_UP):
        result = None  # one alive at a time
        result = function()
    if not cuda:
        return result, None
    torch.cuda.synchronize()
    return result, (torch.cuda.max_memory_allocated() - before) / 2**30


def graphed(function: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """``function`` as a CUDA graph, and what a replay of it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's streams and workspaces must be there before the capture
        function()
    torch.cuda.current_stream().wait_stream(side)
    torch.clear_autocast_cache()  # whose copies of weights do not live as long as the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    graph.replay()
    return graph.replay, result


def compare(
    functions: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    device: torch.device | str | None = None,
    flush: bool = False,
    graphs: bool = False,
    check: Callable[[dict[str, Any]], None] | None = None,
    optional: Collection[str] = (),
    skipped: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Time each function, called in turn, for about ``seconds`` each and at least 5 times.

    ``device``: the current CUDA device when there is one, unless given.  ``check`` gets a result of each function by
    name before anything is timed, and raises when one is wrong.  ``optional``: names that may fail (no kernel for a size, no
    memory); they are left out and ``skipped`` gets the reason.  ``graphs``: time CUDA graphs of the functions, on a GPU; the
    checked results are then those that the graphs wrote.
    """
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    clock = _Clock(where, flush)
    running, results, peaks = dict(functions), {}, {}
    for name, function in functions.items():
        try:
            with warnings.catch_warnings():
                if name in optional:
                    warnings.simplefilter("ignore")
                results[name], peaks[name] = _first_calls(function, clock.cuda)
                if graphs and clock.cuda:
                    results[name] = None
                    running[name], results[name] = graphed(function)
        except RuntimeError as err:
            if name not in optional:
                if isinstance(err, torch.OutOfMemoryError):
                    raise BenchError(f"{name} ran out of memory; use a smaller --side") from None
                raise
            running.pop(name)
            if skipped is not None:
                skipped[name] = (str(err).strip() or type(err).__name__).splitlines()[0]
        if clock.cuda and name not in running:
            torch.cuda.empty_cache()
    if check is not None:
        check(results)
    results.clear()
    rough = sum(min(clock(function) for _ in range(2)) for function in running.values())
    rounds = min(MOST, max(FEWEST, int(1000 * seconds * len(running) / max(rough, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, function in running.items():
            samples[name].append(clock(function))
    return {name: summary(values, peaks[name]) for name, values in samples.items()}


def summary(samples: Sequence[float], peak: float | None = None) -> Times:
    """Of milliseconds that were measured."""
    low, _, _, high = statistics.quantiles(samples, n=5, method="inclusive")
    return Times(statistics.median(samples), low, high, len(samples), peak)


def ceilings(device: torch.device) -> dict[str, float | None]:
    """What the device does at best: copy within its memory in TB/s, read and written bytes counted, and bfloat16 products
    of 8192² matrices in TFLOP/s; ``None`` on a CPU."""
    if device.type != "cuda":
        return {"copy_tb_s": None, "bf16_tflops": None}
    side, size = 8192, 1 << 30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = compare({"copy": lambda: target.copy_(source)}, seconds=0.3, device=device)["copy"]
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = compare({"product": lambda: a @ b}, seconds=0.5, device=device)["product"]
    return {
        "copy_tb_s": round(2 * size / copy.median_ms / 1e9, 3),
        "bf16_tflops": round(2 * side**3 / product.median_ms / 1e9, 1),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured where, when and by which command."""
    cuda = device.type == "cuda"
    versions: dict[str, str | None] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "mamba-ssm", "timm"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    drivers = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda else None
    told = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return {
        "command": shlex.join([*told, "hrsam", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "driver": drivers.splitlines()[0] if drivers else None,
        "versions": {**versions, "python": platform.python_version()},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The checkout's commit, with ``-dirty`` for files changed since, but for reports, which a run of several benchmarks
    writes one after the other; ``None`` for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "--no-optional-locks", "-C", str(root)]
    commit = _output([*git, "rev-parse", "HEAD"])
    changed = _output(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)tools/reports"]
    )
    return f"{commit}-dirty" if commit and changed else commit


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
