"""Run every kernel on small odd shapes under compute-sanitizer's four tools and record what they say.

    python tools/sanitize.py --out tools/reports/sanitizer_gpu.json

Fails when a tool reports anything in a kernel of ours, or did not run.  Without ``--out``: only run the kernels.

racecheck also names pairs of writes by one and the same instruction.  They are no races: where warps hold the same elements of
a tile, Triton lets each of them store the same values to the same place of shared memory when the tile changes its layout
(seen in ``key_gradients`` where the bias's gradient is stored).  They are counted apart.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from hrsam.bench.timing import machine
from hrsam.checkpoint import write_atomically
from hrsam.layout import Layout
from hrsam.ops.attend import NOBODY, attend, lists_of, make_plan
from hrsam.ops.cross import cross_attention
from hrsam.ops.cycle_scan import cycle_scan
from hrsam.ops.distance import squared_distance
from hrsam.ops.full import full_attention
from hrsam.ops.rope import Rope
from hrsam.ops.window import window_attention

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LAYOUT = Layout(((13, 9), (5, 5), (20, 17), (1, 1)), (0, 0, 1, 2))
DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_()


def attention_cases(dtype: torch.dtype) -> None:
    """Windows with and without shift and padding, grouped and listed; full and cross attention; a plan with everything."""
    heads, dim = 3, 64
    q, k, v = (drawn(LAYOUT.tokens, heads, dim, dtype=dtype) for _ in range(3))
    pad = drawn(heads, dim, dtype=dtype), drawn(heads, dim, dtype=dtype)
    rope = Rope()
    for window, shift in ((16, 0), (16, 8), (4, 2)):
        y = window_attention(q, k, v, LAYOUT, window=window, shift=shift, rope=rope, pad_kv=pad, impl="triton")
        y.float().square().sum().backward()
    full_attention(q, k, v, LAYOUT, rope=rope, impl="triton").float().square().sum().backward()
    with torch.no_grad():
        cross_attention(*(torch.randn(2, heads, n, dim, device=DEVICE, dtype=dtype) for n in (9, 300, 300)))
    tokens = torch.tensor([*range(40), *[NOBODY] * 8]).view(3, 16)
    for size in (24, 80, 200):
        labels = tokens // 7, tokens // 7
        plan = make_plan(
            tokens, tokens, lists_of([[], [0], []]), lists_of([[0, 1], [1], []]), tiles=(16, 16), tokens=40, device=DEVICE,
            labels=labels,
        )  # fmt: skip
        q, k, v = (drawn(40, 2, channels, dtype=dtype) for channels in (size, size, 20))
        out, lse = attend(q, k, v, plan, bias=drawn(40, 2, dtype=torch.float32), impl="triton")
        (out.float().square().sum() + lse.masked_fill(lse.isinf(), 0).sum()).backward()


def scan_cases(dtype: torch.dtype) -> None:
    """One sequence a grid and one an image; states that fill loads of 64 bits and states that do not."""
    for channels, states in ((192, 32), (40, 6)):
        u, r = (drawn(LAYOUT.tokens, channels, dtype=dtype) for _ in range(2))
        b, c = (drawn(LAYOUT.tokens, states, dtype=dtype) for _ in range(2))
        dt_bias, skip = (drawn(channels, dtype=torch.float32) for _ in range(2))
        a_log, gamma = drawn(channels, states, dtype=torch.float32), drawn(channels, 3, dtype=torch.float32)
        for across in (False, True):
            y = cycle_scan(u, r, dt_bias, a_log, b, c, skip, gamma, LAYOUT, across=across, impl="triton")
            y.float().square().sum().backward()


def run_kernels() -> None:
    torch.manual_seed(0)
    for dtype in DTYPES:
        attention_cases(dtype)
        scan_cases(dtype)
    squared_distance(torch.rand(2, 70, 131, device=DEVICE) < 0.9, impl="triton")
    torch.cuda.synchronize()


def kernel_names() -> list[str]:
    """Every kernel that :mod:`hrsam.kernels` launches."""
    from hrsam.kernels import attend_device, attend_gradients, cycle_scan_device, cycle_scan_gradients, distance

    found = set()
    for module in (attend_device, attend_gradients, cycle_scan_device, cycle_scan_gradients, distance):
        for name, value in vars(module).items():
            if hasattr(value, "arg_names") and not name.startswith("_") and value.__module__ == module.__name__:
                found.add(name)
    return sorted(found)


def start(tool: str) -> subprocess.Popen[str]:
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "1000", sys.executable, __file__]
    # every tensor its own allocation, so that a step past its end is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def findings(output: str, names: list[str]) -> tuple[list[str], int]:
    """Lines of the tool that speak of a kernel of ours, and how many pairs of one instruction's writes were left out."""
    ours = re.compile(rf"\b({'|'.join(names)})\b")
    access = re.compile(r"(Read|Write) access at (\S+)")
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    found, same = [], 0
    while lines:
        line = lines.pop(0)
        pair = access.findall(line) + (access.findall(lines[0]) if lines else [])
        if "Race reported" in line and len(pair) == 2 and pair[0] == pair[1] and pair[0][0] == "Write":
            same += 1
            lines.pop(0)
        elif ours.search(line):
            found.append(line)
    return found, same


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--out", type=Path, help="report, JSON")
    out = parser.parse_args().out
    run_kernels()  # also compiles them, so that the tools do not look at that
    if out is None:
        return
    names, results = kernel_names(), []
    for tool, process in [(tool, start(tool)) for tool in TOOLS]:
        output = process.communicate()[0]
        summary = next((line for line in reversed(output.splitlines()) if "SUMMARY" in line), "")
        found, same = findings(output, names)
        ran = process.returncode == 0 and bool(summary)
        results.append({
            "tool": tool, "ran": ran, "summary": summary.strip("= "), "findings_in_our_kernels": len(found),
            "writes_of_one_instruction": same, "lines": found[:50],
        })  # fmt: skip
        print(results[-1], flush=True)
        if not ran:
            print(output[-3000:])
    report = {"bench": "sanitizer", **machine(DEVICE), "kernels": names, "results": results}
    write_atomically(out, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
    if any(not result["ran"] or result["findings_in_our_kernels"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
