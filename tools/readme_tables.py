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


def noc_report() -> dict:
    return read("starter_noc")


def accuracy() -> str:
    """Starter against its aims under the frozen protocol, one row a data set."""
    report = noc_report()
    lines = [
        "| pictures | n | IoU@1 | IoU@3 | IoU@5 | IoU@10 | IoU@20 | NoC@80 | NoC@85 | NoC@90 | NoC@95 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        if result["method"]["kind"] != "model" or result["protocol"] != "frozen":
            continue
        parts = result["summary"] if len(result["summary"]) > 2 else {"all": result["summary"]["all"]}
        for name, row in parts.items():
            label = result["data"] if name == "all" else f"– {name}"
            ious = " | ".join(f"{row[f'iou@{k}']:.3f}" for k in (1, 3, 5, 10, 20))
            clicks = " | ".join(f"{row[f'noc@{q}']:.2f}" for q in (80, 85, 90, 95))
            lines.append(f"| {label} | {row['samples']} | {ious} | {clicks} |")
    lines.append("| aim, davis + hqseg44k | | 0.670 | | 0.840 | | 0.880 | | | | |")
    side = report["results"][0]["method"]["side"]
    lines += [
        "",
        f"Protocol `frozen`, side {side}, 20 clicks, never stopped early; an object that never gets there counts 20.",
        made(report),
    ]
    return "\n".join(lines)


def neighbours() -> str:
    """NoC of the starter and of the baselines under every protocol."""
    report = noc_report()
    columns = list(dict.fromkeys((r["protocol"], q) for r in report["results"] for q in (85, 90)))
    lines = [
        "| pictures | method | " + " | ".join(f"{protocol} NoC@{q}" for protocol, q in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    rows: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for result in report["results"]:
        row = rows.setdefault((result["data"], result["method"]["name"]), {})
        for q in (85, 90):
            row[result["protocol"], q] = result["summary"]["all"][f"noc@{q}"]
    for data, method in sorted(rows, key=lambda key: list(dict.fromkeys(d for d, _ in rows)).index(key[0])):
        found = [rows[data, method].get(column) for column in columns]
        cells = " | ".join("not run" if value is None else f"{value:.2f}" for value in found)
        lines.append(f"| {data} | {method} | {cells} |")
    lines += ["", f"20 clicks on every object, never stopped early. {made(report)}"]
    return "\n".join(lines)


def user() -> str:
    """Time of the simulated user and the metric."""
    report, gpu = read("simulated_user_cpu"), read("simulated_user_h100")
    lines = [
        f"| simulated user and IoU, {report['side']} x {report['side']} px | median | slowest | aim |",
        "|---|---|---|---|",
        f"| hrsam | {report['median_ms']['ours']:.0f} ms | {report['worst_ms']['ours']:.0f} ms | ≤ {report['aim_ms']} ms |",
        f"| OpenCV and NumPy, two transforms of the whole picture | {report['median_ms']['plain']:.0f} ms "
        f"| {report['worst_ms']['plain']:.0f} ms | |",
        f"| hrsam on {gpu['device']}, everything on the card | {gpu['median_ms']['ours']:.1f} ms | {gpu['worst_ms']['ours']:.1f} ms "
        f"| ≤ {gpu['aim_ms']} ms |",
        "",
        f"{report['cores']} cores; {report['same_click']} of {report['clicks']} clicks the same, ratio {report['ratio']} "
        f"(GPU: {gpu['same_click']} of {gpu['clicks']}, ratio {gpu['ratio']} to the same on its {gpu['cores']} cores). "
        f"Measured {report['date']} and {gpu['date']}: `{report['command']}` and with `--device cuda`.",
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


ENCODER_AIMS = {"hrsam_b": {1024: 5, 2048: 5, 4096: 5}, "hrsam_pp_b": {1024: 5, 2048: 6, 4096: 6.5}}
CLICK_AIMS = {64: 1.0, 128: 1.5, 256: 3.0}


def measured(report: dict) -> str:
    versions = ", ".join(
        f"{name} {report['versions'][name]}" for name in ("torch", "triton", "mamba-ssm") if name in report["versions"]
    )
    ceilings = report["ceilings"]
    return (
        f"{report['dtype']}, batch 1. Measured {report['date']} on {report['device']} (copy {ceilings['copy_tbs']:.1f} TB/s, "
        f"bf16 product {ceilings['matmul_tflops']:.0f} TFLOP/s), {versions}: `{report['command']}`."
    )


def encoder_gpu() -> str:
    """Encoder on a GPU beside the reference's data flow."""
    report = read("bench_encoder_gpu")
    lines = [
        "| encoder | picture | optimized | eager | reference's data flow | ratio | aim | TFLOP/s | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, int], dict[str, dict]] = {}
    for row in report["rows"]:
        found.setdefault((row["preset"], row["side"]), {})[row["name"]] = row
    for (preset, side), rows in found.items():
        ours, eager, reference = rows["ours optimized"], rows["ours eager"], rows["reference flow, mamba scan"]
        lines.append(
            f"| `{preset}` | {side} px | {ours['median_ms']:.1f} ms | {eager['median_ms']:.1f} ms | {reference['median_ms']:.1f} ms "
            f"| {ours['ratio']:.1f} | ≥ {ENCODER_AIMS[preset][side]} | {ours['tflops']:.0f} | {ours['peak_gib']:.1f} GiB |"
        )
    return "\n".join([*lines, "", measured(report)])


def click_gpu() -> str:
    """One click on a GPU."""
    report = read("bench_click_gpu")
    lines = ["| picture | clicks so far | optimized | eager | aim |", "|---|---|---|---|---|"]
    found: dict[tuple[int, int], dict[str, dict]] = {}
    for row in report["rows"]:
        found.setdefault((row["grid"], row["clicks"]), {})[row["name"]] = row
    for (grid, clicks), rows in found.items():
        ours, eager = (rows[name]["median_ms"] for name in ("ours optimized", "ours eager"))
        lines.append(f"| {16 * grid} px | {clicks} | {ours:.2f} ms | {eager:.2f} ms | ≤ {CLICK_AIMS[grid]} ms |")
    return "\n".join([*lines, "", measured(report)])


TABLES = {
    "accuracy": accuracy,
    "neighbours": neighbours,
    "speed": speed,
    "user": user,
    "encoder": encoder_gpu,
    "click": click_gpu,
}


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
