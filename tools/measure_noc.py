"""NoC of a model and its neighbours over folders of pictures, under every protocol, as one JSON of summaries.

python tools/measure_noc.py --davis DIR --hqseg44k DIR --coco DIR --lvis DIR --out tools/reports/starter_noc.json

Reports and traces of the single evaluations lie in --work; what was played there already is not played again, and with
--only-played what was not is left out.  With --keep rows of --out that are not measured now stay in it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from hrsam.data.datasets import DATASETS
from hrsam.evaluate import Evaluation, evaluate
from hrsam.evaluation import PROTOCOLS, summary
from hrsam.report import table
from hrsam.traces import read_traces

JOINT = ("davis", "hqseg44k")  # their pictures together are what the starter's aims are stated on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in DATASETS:
        parser.add_argument(f"--{name}", type=Path, nargs="+", default=[])
    parser.add_argument("--model", default="hrsam_pp_t.starter")
    parser.add_argument("--methods", nargs="+", default=["model", "grabcut"])
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, help="of the model's input; usually 1024")
    parser.add_argument("--only-played", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("out/noc"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sets = [(kind, root) for kind in DATASETS for root in getattr(args, kind)]
    results: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for protocol in args.protocols:
        for method in args.methods:
            joint, whole = [], True
            for name, root in sets:
                folder = args.work / "-".join(
                    (name, root.name, method, protocol, *([str(args.side)] if args.side else ()))
                )
                if args.only_played and not (folder / "report.json").exists():
                    whole &= name not in JOINT
                    continue
                what = Evaluation(
                    name, str(root), str(folder), method=method, model=args.model, side=args.side,
                    device=args.device, protocol=PROTOCOLS[protocol], command=shlex.join(["python", *sys.argv]),
                )  # fmt: skip
                report = evaluate(what, progress=sys.stderr.isatty())
                print(table(report), flush=True)
                machine = report["machine"]
                results.append(
                    {
                        "data": name if root.name in (name, "sam-hq") else f"{name} ({root.name})",
                        "method": report["method"],
                        "protocol": protocol,
                        "summary": {"all": short(report["summary"]["all"])}
                        | {group: short(value) for group, value in report["summary"]["groups"].items()},
                        "data_sha256": report["data"]["sha256"],
                        "trace_sha256": report["trace_sha256"],
                    }
                )
                if name in JOINT:
                    joint += read_traces(folder / "traces.jsonl")[1]
            if joint and whole:
                results.append(
                    {
                        "data": " + ".join(JOINT),
                        "method": results[-1]["method"],
                        "protocol": protocol,
                        "summary": {"all": short(summary(joint))},
                    }
                )
    out = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{machine['device_name']} ({machine['device']})",
        "versions": machine["versions"],
        "processes": machine["processes"],
        "threads": machine["threads"],
        "results": results,
    }
    if args.keep:
        out = kept(json.loads(args.out.read_text()), out)
    args.out.write_text(json.dumps(out, indent=1) + "\n")


def kept(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """``before`` with what was measured ``now``, row by row, each with the command it comes from."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["data"], row["method"]["name"], row["method"]["side"], row["protocol"]

    source = {name: value for name, value in now.items() if name != "results"}
    fresh = {place(row): {**row, "source": source} for row in now["results"]}
    rows = [fresh.pop(place(row), row) for row in before["results"]]
    return {**before, **source, "results": [*rows, *fresh.values()]}


def short(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary with IoU after some clicks, rounded."""
    ious = {f"iou@{k}": round(summary["iou"][k - 1], 4) for k in (1, 3, 5, 10, 20) if k <= len(summary["iou"])}
    nocs = {f"noc@{q}": round(value, 3) for q, value in summary["noc"].items()}
    never = {f"never@{q}": value for q, value in summary["never_reached"].items()}
    return {"samples": summary["samples"], **ious, **nocs, **never}


if __name__ == "__main__":
    main()
