"""What refining gains: IoU and boundary IoU after some clicks of the simulated user, as they are and refined, as JSON.

python tools/measure_refine.py --hqseg44k DIR --davis DIR --out tools/reports/refine.json

Each object is clicked on as in the evaluation, on masks that are not refined; after 1, 3 and 5 clicks the mask is refined
once and measured beside the one before.  A refine that is refused leaves the mask as it is, and is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hrsam
from hrsam.bench.timing import machine
from hrsam.clicks import next_click
from hrsam.cutting import Cutting
from hrsam.data.datasets import DATASETS, open_dataset
from hrsam.data.sample import Sample
from hrsam.metrics import boundary_iou, iou
from hrsam.pyramid import InMemory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in DATASETS:
        parser.add_argument(f"--{name}", type=Path, nargs="+", default=[])
    parser.add_argument("--model", default="hrsam_pp_t.starter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=1024, help="of the model's input, in pixels")
    parser.add_argument("--clicks", type=int, nargs="+", default=[1, 3, 5], help="after which to refine")
    parser.add_argument("--share", type=float, default=0.005, help="width of the boundary, of the diagonal")
    parser.add_argument("--most", type=int, help="objects of each set, the first ones; all unless given")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = hrsam.load(args.model, args.device)
    data, rows = [], []
    for name in DATASETS:
        for root in getattr(args, name):
            dataset = open_dataset(name, root)
            items = dataset.items[: args.most]
            data.append({"data": name, "objects": len(items), "of": len(dataset), "sha256": dataset.fingerprint()})
            for item in items:
                rows += measured(model, dataset.load(item), args.side, args.clicks, args.share)
                print(f"{item.name}: {told(rows[-1])}", flush=True)
    if not rows:
        parser.error("name a data set, for instance --hqseg44k DIR")
    names = sorted({row["group"] for row in rows})
    groups = {"all": rows} | {name: [row for row in rows if row["group"] == name] for name in names}
    report = {
        **machine(model.device),
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "model": args.model,
        "side": args.side,
        "boundary_share": args.share,
        "data": data,
        "summary": {group: {str(k): summary(some, k) for k in args.clicks} for group, some in groups.items()},
        "objects": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for clicks, found in report["summary"]["all"].items():
        print(f"after {clicks}: {found}")


def measured(model: hrsam.HRSAM, sample: Sample, side: int, after: Sequence[int], share: float) -> list[dict[str, Any]]:
    """A row for each number of clicks ``after`` which the object is refined; fewer when nothing is left to click on."""
    cutting = Cutting(model, InMemory(sample.pixels), side)
    placed, rows = [], []
    for number in range(1, max(after) + 1):
        click = next_click(sample.mask, cutting.objects[1].mask.array(), placed, ignore=sample.ignore)
        if click is not None:
            placed.append(click)
            cutting.apply({"do": "click", "object": 1, "x": click.x, "y": click.y, "positive": click.positive})
        if number not in after:
            continue
        row = {"name": sample.name, "group": sample.dataset, "clicks": number, "before": scores(cutting, sample, share)}
        started = time.perf_counter()
        try:
            cutting.apply({"do": "refine", "object": 1})
        except ValueError as error:
            rows.append({**row, "after": row["before"], "refused": str(error)})
            continue
        seconds = time.perf_counter() - started
        rows.append({**row, "after": scores(cutting, sample, share), "refused": None, "seconds": round(seconds, 2)})
        cutting.apply({"do": "undo", "object": 1})
    return rows


def scores(cutting: Cutting, sample: Sample, share: float) -> dict[str, float]:
    mask, truth = cutting.objects[1].mask.array(), sample.mask
    if sample.ignore is not None:
        mask, truth = mask & ~sample.ignore, truth & ~sample.ignore
    found = {"iou": float(iou(mask, truth)), "boundary_iou": boundary_iou(mask, truth, share=share)}
    return {name: round(value, 4) for name, value in found.items()}


def summary(rows: Sequence[dict[str, Any]], clicks: int) -> dict[str, Any]:
    """Means over the objects, and how many were refused, became better and worse by more than 0.001 of IoU."""
    rows = [row for row in rows if row["clicks"] == clicks]
    means = {
        f"{name}_{when}": round(float(np.mean([row[when][name] for row in rows])), 4)
        for name in ("iou", "boundary_iou")
        for when in ("before", "after")
    }
    gains = [row["after"]["iou"] - row["before"]["iou"] for row in rows]
    counts = {"refused": sum(row["refused"] is not None for row in rows)}
    counts |= {"better": sum(gain > 1e-3 for gain in gains), "worse": sum(gain < -1e-3 for gain in gains)}
    return {"objects": len(rows), **means, **counts}


def told(row: dict[str, Any]) -> str:
    parts = [f"{name} {row['before'][name]:.3f} -> {row['after'][name]:.3f}" for name in ("iou", "boundary_iou")]
    return f"after {row['clicks']} clicks {', '.join(parts)}{' (refused)' if row['refused'] else ''}"


if __name__ == "__main__":
    main()
