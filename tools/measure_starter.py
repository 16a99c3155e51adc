"""Accuracy of a model on folders of pictures with masks, as JSON: IoU after k clicks and NoC, with the protocol.

python tools/measure_starter.py --model hrsam_pp_t.starter --davis DIR --hqseg44k DIR --out tools/reports/starter.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import hrsam
from hrsam.data.datasets import open_dataset
from hrsam.evaluation import Played, Protocol, play, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="hrsam_pp_t.starter")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rule", default="frozen")
    parser.add_argument("--davis", type=Path)
    parser.add_argument("--hqseg44k", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = hrsam.load(args.model, device=args.device)
    protocol = Protocol(rule=args.rule, side=args.side)
    groups: dict[str, list[Played]] = {}
    for name in ("davis", "hqseg44k"):
        if (root := getattr(args, name)) is not None:
            dataset = open_dataset(name, root)
            if dataset.problems:
                raise SystemExit("\n".join(f"{problem.where}: {problem.text}" for problem in dataset.problems))
            for item in dataset.items:
                sample = dataset.load(item)
                played = play(model, sample, protocol)
                groups.setdefault(sample.dataset, []).append(played)
                print(f"{played.name}: " + " ".join(f"{v:.3f}" for v in played.ious[:5]), f"… {played.ious[-1]:.3f}")
    everything = [p for group in groups.values() for p in group]
    report = {
        "command": "python " + " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "model": args.model,
        "protocol": asdict(protocol),
        "all": summary(everything),
        "groups": {name: summary(group) for name, group in groups.items()},
        "samples": [{"name": p.name, "ious": [round(v, 4) for v in p.ious]} for p in everything],
        "seconds": {k: round(sum(p.seconds[k] for p in everything), 2) for k in ("encode", "decode", "user")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["all"]))


if __name__ == "__main__":
    main()
