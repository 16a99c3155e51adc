"""Where an optimized encoder's time goes on a CUDA device: kernel time of one forward pass by kind, as JSON.

python tools/profile_encoder.py --out tools/reports/profile_encoder_gpu.json
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hrsam.bench import models
from hrsam.bench.timing import machine
from hrsam.checkpoint import write_atomically

KINDS = {  # the first that matches a kernel's name
    "matrix products": r"nvjet|gemm|cutlass|conv2d",
    "cycle scans": r"^(scan_chunks|chain_states|enter_chunks)$",
    "window attention": r"^attend",
    "norms, residual sums, gates": r"^triton_",
    "copies": r"",
}
PASSES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["hrsam_b", "hrsam_pp_b"])
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, rows = torch.device("cuda"), []
    for preset in args.presets:
        model = models.random_model(preset, device, quick=False)
        encoder = models.optimized(model, torch.bfloat16, device, quick=False).encoder
        for side in args.sides:
            rows.append({"preset": preset, "side": side, **kernel_times(encoder, models.pixels(1, side, device))})
            print(json.dumps(rows[-1]), flush=True)
        del model, encoder
    if args.out:
        report = {**machine(device), "command": shlex.join(["python", *sys.argv]), "dtype": "bfloat16", "rows": rows}
        write_atomically(args.out, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))


def kernel_times(encoder: Callable[[torch.Tensor], object], pixels: torch.Tensor) -> dict[str, Any]:
    """Milliseconds on the device of one call, by kind, and the costliest kernels."""
    with torch.no_grad():
        for _ in range(4):
            encoder(pixels)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PASSES):
                encoder(pixels)
            torch.cuda.synchronize()
    times = {
        event.key: (event.device_time_total / 1000 / PASSES, event.count / PASSES) for event in profiler.key_averages()
    }
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, (ms, _) in times.items():
        kinds[kind_of(name)] += ms
    costliest = sorted((name for name, (ms, _) in times.items() if ms), key=lambda name: -times[name][0])[:12]
    return {
        "kernel_ms": round(sum(kinds.values()), 3),
        "kinds": {kind: round(ms, 3) for kind, ms in kinds.items()},
        "costliest": [
            {"name": n[:100], "ms": round(times[n][0], 3), "calls": round(times[n][1], 1)} for n in costliest
        ],
    }


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel))


if __name__ == "__main__":
    main()
