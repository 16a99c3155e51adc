"""What each part of a training is worth: runs that differ in one thing, and the NoC of each, as one JSON.

python tools/ablate.py tools/ablation_starter.yaml --davis DIR --hqseg44k DIR --out tools/reports/starter_ablation.json

The file names a ``base`` config, ``overrides`` that all runs share, and ``runs`` by name, each with its own ``overrides``.
``stage: distill`` makes a run a distillation (of another ``config``), ``after`` names the run whose weights it begins from,
``of`` one that is measured again, with ``weights: last`` instead of the averaged ones.  A series that was stopped goes on;
runs that the report holds already and that are not asked for again stay in it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from hrsam.config import read_settings
from hrsam.data.datasets import DATASETS
from hrsam.distill import DistillSettings, distill
from hrsam.evaluate import Evaluation, evaluate
from hrsam.evaluation import summary
from hrsam.release import release
from hrsam.traces import read_traces
from hrsam.train import TrainSettings, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    for name in DATASETS:
        parser.add_argument(f"--{name}", type=Path, nargs="+", default=[])
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--work", type=Path, default=Path("out/ablation"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    plan = yaml.safe_load(args.plan.read_text("utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sets = [(kind, root) for kind in DATASETS for root in getattr(args, kind)]
    rows = kept(args.out, args.side)
    source = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__},
    }
    for name in args.only or plan["runs"]:
        run = plan["runs"][name]
        home, weights = args.work / slug(run.get("of", name)), args.work / f"{slug(name)}.safetensors"
        run = {**plan["runs"][run["of"]], **run} if "of" in run else run
        changes = {**plan["overrides"], **run.get("overrides", {}), "out": str(home)}
        if "after" in run:
            changes["start"] = str(args.work / f"{slug(run['after'])}.safetensors")
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        began = time.monotonic()
        make(args.plan.parent / run.get("config", plan["base"]), run.get("stage", "train"), overrides)
        release(home, weights, weights=run.get("weights", "average"), dtype="float16")
        seconds = round(time.monotonic() - began, 1)
        curve = [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]
        rows[name] = {
            "name": name,
            "overrides": overrides,
            "seconds": seconds,
            "curve": curve[:: max(1, len(curve) // 40)],
            "noc": measured(weights, sets, args.side, device),
            "source": source,
        }
        print(name, json.dumps(rows[name]["noc"]), flush=True)
        in_order = sorted(rows.values(), key=lambda row: [*plan["runs"]].index(row["name"]))
        args.out.write_text(json.dumps({"side": args.side, "runs": in_order}, indent=1) + "\n")


def kept(report: Path, side: int) -> dict[str, dict[str, Any]]:
    """Runs of an earlier call by name; ``ValueError`` if they were measured at another side."""
    if not report.exists():
        return {}
    old = json.loads(report.read_text("utf-8"))
    if old["side"] != side:
        raise ValueError(f"{report} was measured at side {old['side']}, not {side}; give another --out")
    return {row["name"]: row for row in old["runs"]}


def make(config: Path, stage: str, overrides: list[str]) -> None:
    if stage == "distill":
        distill(read_settings(DistillSettings, config, overrides), say=print)
    else:
        train(read_settings(TrainSettings, config, overrides))


def slug(name: str) -> str:
    return name.replace(" ", "_")


def measured(weights: Path, sets: list[tuple[str, Path]], side: int, device: str) -> dict[str, Any]:
    """IoU after some clicks and NoC over all sets together, protocol ``frozen``."""
    traces = []
    for kind, root in sets:
        out = weights.with_suffix("") / "noc" / f"{kind}-{root.name}-{side}"
        evaluate(Evaluation(kind, str(root), str(out), model=str(weights), side=side, device=device))
        traces += read_traces(out / "traces.jsonl")[1]
    if not traces:
        return {}
    whole = summary(traces)
    ious = {f"iou@{k}": round(whole["iou"][k - 1], 4) for k in (1, 3, 5, 10, 20)}
    return {"samples": whole["samples"], **ious, **{f"noc@{q}": round(v, 3) for q, v in whole["noc"].items()}}


if __name__ == "__main__":
    main()
