"""Simulated user and metric of one click on a large picture, ours against plain OpenCV and NumPy, as JSON.

python tools/bench_user.py --side 2048 --out tools/reports/simulated_user_cpu.json

With --device cuda ours works on tensors that lie there already, as in an evaluation; the plain one stays on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from hrsam.clicks import Click, next_click
from hrsam.metrics import iou


def plain_click(truth: np.ndarray, mask: np.ndarray, clicks: list[Click]) -> Click | None:
    """What most repositories do: two exact transforms of the whole picture, the first maximum."""
    best: list[tuple[float, tuple[int, int]]] = []
    for wrong in (truth & ~mask, mask & ~truth):
        for click in clicks:
            wrong[int(click.y), int(click.x)] = False
        framed = np.pad(wrong, 1).astype(np.uint8)
        distance = cv2.distanceTransform(framed, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
        row, col = np.unravel_index(distance.argmax(), distance.shape)
        best.append((float(distance[row, col]), (int(col), int(row))))
    if best[0][0] == best[1][0] == 0:
        return None
    positive = best[0][0] > best[1][0]
    return Click(*best[0 if positive else 1][1], positive)


def plain_iou(mask: np.ndarray, truth: np.ndarray) -> float:
    return np.logical_and(mask, truth).sum() / np.logical_or(mask, truth).sum()


def game(side: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A true object with a smooth, random outline and masks that come nearer to it."""
    rng = np.random.default_rng(seed)

    def smooth(cells: int) -> np.ndarray:
        return cv2.resize(
            rng.standard_normal((cells, cells)).astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC
        )

    y, x = np.mgrid[:side, :side] / side - 0.5
    shape = 0.35 - np.hypot(x, y) + 0.06 * smooth(6)
    truth = shape > 0
    masks = [np.zeros_like(truth)]
    for strength in (0.12, 0.08, 0.05, 0.03, 0.02, 0.015, 0.01):
        masks.append(shape + strength * smooth(12) + strength / 3 * smooth(120) > 0)
    return truth, masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--games", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    same = total = 0
    on_cpu = args.device == "cpu"
    for seed in range(-1, args.games):  # the first game warms up
        truth, masks = game(args.side, max(seed, 0))
        clicks: list[Click] = []
        for mask in masks:
            ours = (
                (truth, mask) if on_cpu else tuple(torch.from_numpy(array).to(args.device) for array in (truth, mask))
            )
            answers = {}
            for name, click, score, (true, now) in (
                ("ours", next_click, iou, ours),
                ("plain", plain_click, plain_iou, (truth, mask)),
            ):
                if not on_cpu:
                    torch.cuda.synchronize()
                started = time.perf_counter()
                answers[name] = click(true, now, clicks), float(score(now, true))
                if seed >= 0:
                    times[name].append(1000 * (time.perf_counter() - started))
            assert abs(answers["ours"][1] - answers["plain"][1]) < 1e-6
            if seed < 0:
                continue
            same += answers["ours"][0] == answers["plain"][0]
            total += 1
            if answers["ours"][0] is not None:
                clicks.append(answers["ours"][0])
    if same < 0.9 * total:  # single-precision ties may differ, more than that would be an error
        raise SystemExit(f"only {same} of {total} clicks agree; the numbers would compare different things")
    medians = {name: statistics.median(values) for name, values in times.items()}
    report = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "device": platform.processor() or platform.machine() if on_cpu else torch.cuda.get_device_name(args.device),
        "cores": os.cpu_count(),
        "versions": {
            "torch": torch.__version__,
            "opencv": cv2.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "side": args.side,
        "clicks": total,
        "same_click": same,
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "worst_ms": {name: round(max(values), 2) for name, values in times.items()},
        "ratio": round(medians["plain"] / medians["ours"], 2),
        "aim_ms": 60 if on_cpu else 3,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
