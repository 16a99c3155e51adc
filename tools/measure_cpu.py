"""Encode and click times of the starter on the CPU, as JSON.

python tools/measure_cpu.py --photo FILE --out tools/reports/starter_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

import hrsam


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def quantiles(seconds: list[float], aim_ms: float) -> dict:
    low, median, high = (1000 * float(np.quantile(seconds, q)) for q in (0.2, 0.5, 0.8))
    return {"median_ms": round(median, 1), "quantiles_20_80": [round(low, 1), round(high, 1)], "aim_ms": aim_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="hrsam_pp_t.starter")
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = hrsam.load(args.model)
    pixels = hrsam.read_image(args.photo).pixels
    height, width = pixels.shape[:2]
    session = hrsam.Session(model, side=1024)
    encodes, clicks = [], []
    for _ in range(8):
        encodes.append(session.set_image(pixels).seconds)
    for index in range(24):
        started = time.perf_counter()
        x, y = (0.3 + 0.02 * index) * width, 0.5 * height
        session.click(int(x), int(y), index % 3 != 2).mask  # noqa: B018 - the mask at full size is part of a click
        clicks.append(time.perf_counter() - started)
    report = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "photo": f"{width}x{height}",
        "times": {
            "encode, picture to embedding": quantiles(encodes[1:], 2000),
            "click, prompt to mask at full size": quantiles(clicks[2:], 150),
        },
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["times"]))


if __name__ == "__main__":
    main()
