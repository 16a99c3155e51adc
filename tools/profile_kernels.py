"""What attention's and the scan's kernels wait for, by Nsight Compute: busy pipes, memory, warps, reasons of stalls, as JSON.

    python tools/profile_kernels.py --out tools/reports/profile_kernels_gpu.json

Sizes are those of a picture of 4096 px in `hrsam_b` (full attention: of 2048 px), bfloat16.  Without ``--out``: only run them.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hrsam.bench.timing import machine
from hrsam.checkpoint import write_atomically
from hrsam.layout import Layout
from hrsam.ops.cycle_scan import cycle_scan
from hrsam.ops.full import full_attention
from hrsam.ops.rope import Rope
from hrsam.ops.window import window_attention

KERNELS = {  # in the order in which they run
    "windows of 256, shift 0": "attend_groups",
    "windows of 256, shift 8": "attend_groups",
    "full attention": "attend",
    "cycle scan, F1": "scan_chunks",
    "cycle scan, F3": "scan_chunks",
}
TIMES = 2  # the first call of each is left out
SECTIONS = "SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "LaunchStats", "Occupancy"
MEASURED = {
    "us": "gpu__time_duration.sum",
    "clock_ghz": "smsp__cycles_elapsed.avg.per_second",
    "issue_slots": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps_a_scheduler": "smsp__warps_active.avg.per_cycle_active",
    "registers": "launch__registers_per_thread",
}
NUMBER = re.compile(r"^\d[\d,]*(\.\d+)?$")
PIPE = re.compile(r"^sm__inst_executed_pipe_(\w+)\.avg\.pct_of_peak_sustained_active$")
STALL = re.compile(r"^smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio$")
TO_GHZ, TO_US = {"Ghz": 1.0, "Mhz": 1e-3, "hz": 1e-9}, {"us": 1.0, "ns": 1e-3, "ms": 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--out", type=Path, help="report, JSON")
    out = parser.parse_args().out
    if out is None:
        run_kernels()
        return
    command = ["ncu", "--csv", "--page", "raw", "--clock-control", "none"]
    command += [*(word for section in SECTIONS for word in ("--section", section))]
    command += ["--kernel-name", f"regex:^({'|'.join(sorted(set(KERNELS.values())))})$", sys.executable, __file__]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ncu failed; its output ends with: {(done.stdout + done.stderr)[-2000:]}")
    rows = list(zip(KERNELS, kernels_of(done.stdout.splitlines())))
    found = [{"operation": operation, **row} for operation, row in rows]
    for row in found:
        print(json.dumps(row))
    if [row["kernel"] for row in found] != list(KERNELS.values()):
        sys.exit(f"expected the kernels {', '.join(KERNELS.values())}; ncu saw {[row['kernel'] for row in found]}")
    device = torch.device("cuda")
    report = {**machine(device), "command": shlex.join(["python", *sys.argv]), "dtype": "bfloat16", "rows": found}
    write_atomically(out, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))


def run_kernels() -> None:
    """Every operation ``TIMES`` times."""
    torch.manual_seed(0)
    device, dtype = torch.device("cuda"), torch.bfloat16
    layout, small = Layout(((256, 256),), (0,)), Layout(((128, 128),), (0,))
    qkv = torch.randn(layout.tokens, 3, 12, 64, device=device, dtype=dtype)
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
    pad = torch.randn(2, 12, 64, device=device, dtype=dtype)
    u = torch.randn(layout.tokens, 768, device=device).to(dtype)
    r, b, c = (torch.randn(layout.tokens, 768 + 2 * 32, device=device) / 2).to(dtype).split((768, 32, 32), 1)
    one = torch.ones(768, device=device)
    a_log = torch.arange(1.0, 33, device=device).log().repeat(768, 1)

    def windows(shift: int) -> object:
        return window_attention(
            q, k, v, layout, window=16, shift=shift, rope=Rope(), pad_kv=(pad[0], pad[1]), impl="triton"
        )

    def full() -> object:
        n = small.tokens
        return full_attention(q[:n], k[:n], v[:n], small, impl="triton")

    def scan() -> object:
        return cycle_scan(u, r, -4 * one, a_log, b, c, one, one[:, None].expand(-1, 3), layout, impl="triton")

    operations: list[Callable[[], object]] = [lambda: windows(0), lambda: windows(8), full, scan]
    with torch.no_grad():
        for operation in operations:
            for _ in range(TIMES):
                operation()
    torch.cuda.synchronize()


def kernels_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Of ncu's table: the launches of :func:`run_kernels` in its order, without the first call of each operation."""
    names, units, *launches = csv.reader(line for line in lines if line.startswith('"'))
    unit = dict(zip(names, units))
    rows = [measures(dict(zip(names, launch)), unit) for launch in launches]
    kept: list[dict[str, Any]] = []
    while rows:
        together = 2 * TIMES if rows[0]["kernel"] == "scan_chunks" else TIMES  # F1, F3, F1, F3
        kept += rows[together - together // TIMES : together]
        rows = rows[together:]
    return kept


def measures(launch: dict[str, str], unit: dict[str, str]) -> dict[str, Any]:
    """One launch: :data:`MEASURED`, pipes by their share of what they can take, and the reasons that warps wait for by their
    share of a warp's time."""
    number = {name: float(value.replace(",", "")) for name, value in launch.items() if NUMBER.match(value)}
    row: dict[str, Any] = {"kernel": launch["Kernel Name"].split("(")[0].strip()}
    for label, metric in MEASURED.items():
        scale = {"us": TO_US, "clock_ghz": TO_GHZ}.get(label, {}).get(unit.get(metric, ""), 1.0)
        row[label] = round(number[metric] * scale, 2) if metric in number else None
    pipes = {m[1]: number[name] for name in number if (m := PIPE.match(name))}
    stalls = {m[1]: number[name] for name in number if (m := STALL.match(name))}
    whole = sum(stalls.values()) or 1.0
    row["pipes"] = {name: round(value, 1) for name, value in sorted(pipes.items(), key=lambda item: -item[1])[:5]}
    shares = sorted(((name, 100 * value / whole) for name, value in stalls.items()), key=lambda item: -item[1])
    row["waits"] = {name: round(share, 1) for name, share in shares[:7]}
    return row


if __name__ == "__main__":
    main()
