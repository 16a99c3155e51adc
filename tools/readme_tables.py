"""Write README's tables from tools/reports/*.json, between ``<!-- table: NAME -->`` and ``<!-- end -->``.

python tools/readme_tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    results = [r for r in noc_report()["results"] if r["method"]["kind"] == "model" and r["protocol"] == "frozen"]
    lines = [
        "| pictures | side | n | IoU@1 | IoU@3 | IoU@5 | IoU@10 | IoU@20 | NoC@80 | NoC@85 | NoC@90 | NoC@95 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: r["method"]["side"]):
        side = result["method"]["side"]
        parts = result["summary"] if len(result["summary"]) > 2 else {"all": result["summary"]["all"]}
        for name, row in parts.items():
            label = result["data"] if name == "all" else f"– {name}"
            ious = " | ".join(f"{row[f'iou@{k}']:.3f}" for k in (1, 3, 5, 10, 20))
            clicks = " | ".join(f"{row[f'noc@{q}']:.2f}" for q in (80, 85, 90, 95))
            lines.append(f"| {label} | {side} | {row['samples']} | {ious} | {clicks} |")
    aim = "| aim, davis + hqseg44k | 1024 | | 0.740 | | 0.880 | | 0.910 | | 6.50 | 9.00 | |"
    commands = {json.dumps(r["source"]): made(r["source"]) for r in results}
    lines += [
        aim,
        "",
        "Protocol `frozen`, 20 clicks, never stopped early; an object that never gets there counts 20.",
        *commands.values(),
    ]
    return "\n".join(lines)


def neighbours() -> str:
    """NoC of the starter and of the baselines under every protocol."""
    report = noc_report()
    usual = [r for r in report["results"] if r["method"]["kind"] != "model" or r["method"]["side"] == 1024]
    columns = list(dict.fromkeys((r["protocol"], q) for r in usual for q in (85, 90)))
    lines = [
        "| pictures | method | " + " | ".join(f"{protocol} NoC@{q}" for protocol, q in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    rows: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for result in usual:
        row = rows.setdefault((result["data"], result["method"]["name"]), {})
        for q in (85, 90):
            row[result["protocol"], q] = result["summary"]["all"][f"noc@{q}"]
    for data, method in sorted(rows, key=lambda key: list(dict.fromkeys(d for d, _ in rows)).index(key[0])):
        found = [rows[data, method].get(column) for column in columns]
        cells = " | ".join("not run" if value is None else f"{value:.2f}" for value in found)
        lines.append(f"| {data} | {method} | {cells} |")
    lines += ["", f"20 clicks on every object, never stopped early. {made(usual[0]['source'])}"]
    return "\n".join(lines)


def page() -> str:
    """The click page: speed, load, races, kills, attacks."""
    report = read("demo")
    load, races, kills, attacks = (report[name] for name in ("load", "races", "kills", "attacks"))
    click = next(row for row in report["rows"] if row["name"].startswith("click to mask"))
    (size,) = report["bytes_of_a_mask"].values()
    lines = [
        "| what | found | aim |",
        "|---|---|---|",
        f"| click to mask answer, without a browser | {click['median_ms']:.0f} ms | – |",
        f"| KB of that answer, median and largest | {size['median'] / 1000:.0f}, {size['largest'] / 1000:.0f} | ≤ 50 |",
        f"| 50 sessions, {load['clicks']:,} clicks: errors, wrong masks | {load['errors']}, {load['mismatches']} | 0, 0 |",
        f"| memory for 1,000 clicks more | {load['slope']:.2f} MB | < 1 MB |",
        f"| racing clicks, {races['trials']:,} trials: not equal to one serial order | {races['wrong']} | 0 |",
        f"| kill -9, {kills['rounds']} rounds, {kills['acknowledged']} acknowledged clicks: lost | {kills['lost']} | 0 |",
        f"| scripted attacks, {attacks['tried']}: not refused | {len(attacks['broken'])} | 0 |",
    ]
    seen = read("page")
    times = {row["name"]: row["median_ms"] for row in seen["rows"]}
    (frames,) = seen["frames_per_second"].values()
    opened, encoded, shown = (
        time for name, time in times.items() if name.startswith(("from the address", "from a click"))
    )
    lines[2:2] = [
        f"| in a browser: from the address to a picture of 4096 x 4096 px that can be moved | {opened:.0f} ms | ≤ 1500 ms |",
        f"| to one that is encoded | {encoded / 1000:.1f} s | – |",
        f"| from a click to its mask on the screen | {shown:.0f} ms | ≤ 300 ms |",
        f"| frames a second: {', '.join(frames)} | {', '.join(f'{speed:.0f}' for speed in frames.values())} | ≥ 30 |",
    ]
    told = "; ".join(["Load and drills with a small random model", *report["notes"]])
    cpu = {"device": "a CPU with two cores"}
    return "\n".join([*lines, "", made({**seen, **cpu}), f"{told}. {made({**report, **cpu})}"])


def refined() -> str:
    """What refining gains."""
    report = read("refine")
    lines = [
        "| clicks, then refined | n | IoU | boundary IoU | better, worse, refused |",
        "|---|---|---|---|---|",
    ]
    for clicks, row in report["summary"]["all"].items():
        pairs = [f"{row[f'{name}_before']:.3f} → {row[f'{name}_after']:.3f}" for name in ("iou", "boundary_iou")]
        counts = ", ".join(str(row[name]) for name in ("better", "worse", "refused"))
        lines.append(f"| {clicks} | {row['objects']} | {' | '.join(pairs)} | {counts} |")
    wide = f"Boundaries {100 * report['boundary_share']:.1f} % of the diagonal wide, side {report['side']}."
    return "\n".join([*lines, "", f"{wide} {made(report)}"])


def user() -> str:
    """Time of the simulated user and the metric."""
    report, gpu = read("simulated_user_cpu"), read("simulated_user_h100")
    lines = [
        f"| simulated user and IoU, {report['side']} x {report['side']} px | median | slowest | aim |",
        "|---|---|---|---|",
        f"| hrsam | {report['median_ms']['ours']:.0f} ms | {report['worst_ms']['ours']:.0f} ms | ≤ {report['aim_ms']} ms |",
        f"| OpenCV and NumPy, two transforms of the whole picture | {report['median_ms']['plain']:.0f} ms "
        f"| {report['worst_ms']['plain']:.0f} ms | |",
        f"| hrsam on {gpu['device']}, everything on the card | {gpu['median_ms']['ours']:.1f} ms "
        f"| {gpu['worst_ms']['ours']:.1f} ms | ≤ {gpu['aim_ms']} ms |",
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


def measured(report: dict[str, Any]) -> str:
    versions = [f"{n} {report['versions'][n]}" for n in ("torch", "triton", "mamba-ssm") if report["versions"].get(n)]
    copy, product = report["ceilings"]["copy_tb_s"], report["ceilings"]["bf16_tflops"]
    return (
        f"Measured {report['date']} on {report['device']} (copy {copy:.1f} TB/s, bf16 product {product:.0f} TFLOP/s), "
        f"{', '.join(versions)}, commit {report['commit'][:7]}: `{report['command']}`."
    )


def grouped(report: dict[str, Any], *keys: str) -> dict[tuple, dict[str, dict[str, Any]]]:
    """Rows of a bench by some of their fields, then by what was timed."""
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault(tuple(row.get(key) for key in keys), {})[row["name"]] = row
    return found


def encoder() -> str:
    """Encoder on a GPU beside the reference's data flow."""
    report = read("bench_encoder_gpu")
    lines = [
        "| encoder | picture | optimized | eager | reference's data flow | as a CUDA graph | ratios | aim | TFLOP/s "
        "| peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    peers = []
    for (preset, side), rows in grouped(report, "preset", "side").items():
        if "ours optimized" not in rows:
            peers += [f"{name} takes {row['median_ms']:.1f} ms at {side} px" for name, row in rows.items()]
            continue
        ours = rows["ours optimized"]
        names = "ours optimized", "ours eager", "reference flow, mamba scan", "reference flow, mamba scan, CUDA graph"
        times = [rows[name]["median_ms"] for name in names]
        ratios = ", ".join(f"{ms / times[0]:.1f}" for ms in times[2:])
        lines.append(
            f"| `{preset}` | {side} px | " + " | ".join(f"{ms:.1f} ms" for ms in times) + f" | {ratios} "
            f"| ≥ {ENCODER_AIMS[preset][side]} | {ours['tflops']:.0f} | {ours['peak_gib']:.1f} GiB |"
        )
    told = "; ".join([f"{report['dtype']}, batch 1", *peers])
    return "\n".join([*lines, "", f"{told}. {measured(report)}"])


def share_of_time() -> str:
    """Kernel time of an optimized encoder by kind."""
    report = read("profile_encoder_gpu")
    kinds = list(report["rows"][0]["kinds"])
    lines = [f"| kernels of one forward pass | {' | '.join(kinds)} | all |", "|---|" + "---|" * (len(kinds) + 1)]
    for row in report["rows"]:
        times = [*row["kinds"].values(), row["kernel_ms"]]
        lines.append(f"| `{row['preset']}`, {row['side']} px | {' | '.join(f'{ms:.2f} ms' for ms in times)} |")
    return "\n".join([*lines, "", f"{report['dtype']}, batch 1, commit {report['commit'][:7]}. {made(report)}"])


def click() -> str:
    """One click on a GPU."""
    report = read("bench_click_gpu")
    lines = ["| picture | clicks | optimized | eager | aim |", "|---|---|---|---|---|"]
    for (grid, clicks), rows in grouped(report, "grid", "clicks").items():
        ours, eager = (rows[name]["median_ms"] for name in ("ours optimized", "ours eager"))
        lines.append(f"| {16 * grid} px | {clicks} | {ours:.2f} ms | {eager:.2f} ms | ≤ {CLICK_AIMS[grid]} ms |")
    return "\n".join([*lines, "", f"`hrsam_pp_b`, {report['dtype']}, batch 1. {measured(report)}"])


def operations() -> str:
    """Attention, scan and a training step beside what can be installed."""
    lines = ["| operation | pass | ours | beside | × as fast | aim |", "|---|---|---|---|---|---|"]

    def add(what: str, rows: dict[str, dict[str, Any]], ours: str, others: Sequence[str], aims: Sequence[str]) -> None:
        mine, beside = rows[ours]["median_ms"], [rows[other]["median_ms"] for other in others]
        named = ", ".join(f"{other} {time:.3g} ms" for other, time in zip(others, beside))
        ratios = ", ".join(f"{time / mine:.2f}" for time in beside)
        lines.append(
            f"| {what} | {rows[ours]['pass']} | {mine:.3g} ms | {named} | {ratios} | {', '.join(aims) or '–'} |"
        )

    attention, scan, step = (read(f"bench_{name}_gpu") for name in ("attention", "scan", "train_step"))
    for (kind, tokens, shift, what), rows in grouped(attention, "attention", "tokens", "shift", "pass").items():
        where = f"{kind} attention" if shift is None else f"windows of 256, shift {shift}, positions and padding inside"
        aims = ("≥ 1", "≥ 0.87" if shift is None else "≥ 1") if what == "forward" else ()
        add(f"{where}, {tokens:,} tokens", rows, "ours", ("SDPA flash", "SDPA cuDNN"), aims)
    for (tokens, dtype, what), rows in grouped(scan, "tokens", "dtype", "pass").items():
        aims = ("≥ 6",) if what == "forward" else ()
        add(f"cycle scan, {tokens:,} tokens, {dtype}", rows, "ours", ("mamba-ssm, sequence repeated",), aims)
    for (preset, side), rows in grouped(step, "preset", "side").items():
        flows = "reference flow, mamba scan", "reference flow, mamba scan, CUDA graph"
        add(f"`{preset}`, {side} px", rows, "ours compiled, CUDA graph", flows, ("≥ 4",))
    return "\n".join([*lines, "", *(measured(report) for report in (attention, scan, step))])


def training() -> str:
    """What loading and the simulated user take of a training step, and what packing gains."""
    step, packing = read("profile_train_gpu"), read("bench_packing_gpu")
    share = (step["user_ms"] + step["batch_ms"]) / step["step_ms"]
    lines = [
        "| training | found | aim |",
        "|---|---|---|",
        f"| `{step['preset']}`, {step['batch']} canvases of {step['side']} px, one step | {step['step_ms']:.0f} ms | – |",
        f"| share of canvases and simulated user | {100 * share:.1f} % | ≤ 10 % |",
    ]
    for (preset, pictures), rows in grouped(packing, "preset", "pictures").items():
        same, new, padded = (rows[n] for n in ("packed", "packed, a new layout each step", "padded to the largest"))
        lines.append(
            f"| encoder of `{preset}`, {pictures} packed pictures, × as fast as padded ({padded['pictures_per_s']:.1f} "
            f"pictures/s): the same layout in every step, a new one | {same['ratio']:.2f}, {new['ratio']:.2f} | ≥ 1.6 |"
        )
    found = f"Step measured {step['date']} on {step['device']}, commit {step['commit'][:7]}: `{step['command']}`."
    return "\n".join([*lines, "", found, measured(packing)])


def ablation() -> str:
    """Short trainings that differ in one thing."""
    report = read("starter_ablation")
    lines = [
        "| short run | canvases, pictures | IoU@1 | IoU@5 | IoU@20 | NoC@85 | NoC@90 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["runs"]:
        noc = row["noc"]
        ious, clicks = (f"{noc[f'iou@{k}']:.3f}" for k in (1, 5, 20)), (f"{noc[f'noc@{q}']:.1f}" for q in (85, 90))
        lines.append(f"| {row['name']} | {row['curve'][-1]['images']:,} | {' | '.join((*ious, *clicks))} |")
    samples = {row["noc"]["samples"] for row in report["runs"]}
    (count,) = samples
    sources = {row["source"]["command"]: made(row["source"]) for row in report["runs"]}
    lines += ["", f"Protocol `frozen`, side {report['side']}, {count} objects of all sets together.", *sources.values()]
    return "\n".join(lines)


TABLES = {
    "accuracy": accuracy,
    "neighbours": neighbours,
    "speed": speed,
    "user": user,
    "page": page,
    "refined": refined,
    "encoder": encoder,
    "share_of_time": share_of_time,
    "click": click,
    "operations": operations,
    "training": training,
    "ablation": ablation,
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
