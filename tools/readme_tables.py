"""Write README's tables from tools/reports/*.json, between ``<!-- table: NAME -->`` and ``<!-- end -->``.

python tools/readme_tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "tools" / "reports"


def read(name: str) -> dict:
    return json.loads((REPORTS / f"{name}.json").read_text())


def made(report: dict) -> str:
    """When, where and how a report was made."""
    device, torch = report["device"], report["versions"]["torch"]
    return f"Measured {report['date']} on {device}, torch {torch}: `{report['command']}`."


def accuracy() -> str:
    """Starter against its aims, one row a data set."""
    report = read("starter_accuracy")
    protocol = report["protocol"]
    lines = [
        "| pictures | n | IoU@1 | IoU@3 | IoU@5 | IoU@10 | IoU@20 | NoC@80 | NoC@85 | NoC@90 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {"**all**": report["all"], **report["groups"]}
    for name, row in rows.items():
        ious = " | ".join(f"{row[f'iou@{k}']:.3f}" for k in (1, 3, 5, 10, 20))
        clicks = " | ".join(f"{row[f'noc@{q}']:.2f}" for q in (80, 85, 90))
        lines.append(f"| {name} | {row['samples']} | {ious} | {clicks} |")
    lines.append("| aim, all | | 0.670 | | 0.840 | | 0.880 | | | |")
    lines += [
        "",
        f"Protocol `{protocol['rule']}`, side {protocol['side']}, {protocol['clicks']} clicks, never stopped early; a sample",
        f"that never reaches the threshold counts {protocol['clicks']}. {made(report)}",
    ]
    return "\n".join(lines)


def speed() -> str:
    """Encode and click times on the CPU."""
    report = read("starter_cpu")
    lines = ["| `hrsam_pp_t`, side 1024 | median | 20–80 % | aim |", "|---|---|---|---|"]
    for name, row in report["times"].items():
        low, high = row["quantiles_20_80"]
        lines.append(f"| {name} | {row['median_ms']:.0f} ms | {low:.0f}–{high:.0f} ms | ≤ {row['aim_ms']:.0f} ms |")
    lines += [
        "",
        f"{report['cores']} cores, float32. {made(report)}",
    ]
    return "\n".join(lines)


TABLES = {"accuracy": accuracy, "speed": speed}


def render(text: str) -> str:
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.S)
        text, count = pattern.subn(lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md must hold the table {name} once; found {count}")
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = render(text)
    if "--check" in sys.argv:
        raise SystemExit(0 if new == text else "README.md is out of date; run python tools/readme_tables.py")
    readme.write_text(new)


if __name__ == "__main__":
    main()
