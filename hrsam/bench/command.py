"""``hrsam bench``: run one benchmark, show its report, write it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hrsam.bench.attention import bench_attention
from hrsam.bench.click import bench_click
from hrsam.bench.demo import bench_demo
from hrsam.bench.encoder import bench_encoder
from hrsam.bench.packing import bench_packing
from hrsam.bench.page import bench_page
from hrsam.bench.scan import bench_scan
from hrsam.bench.train_step import bench_train_step
from hrsam.checkpoint import write_atomically
from hrsam.models.presets import suggest

BENCHES: dict[str, Callable[..., dict[str, Any]]] = {
    "encoder": bench_encoder,
    "train-step": bench_train_step,
    "packing": bench_packing,
    "click": bench_click,
    "scan": bench_scan,
    "attention": bench_attention,
    "demo": bench_demo,
    "page": bench_page,
}  # name -> function that returns a report

OPTIONS = {"sides": "--side", "presets": "--preset", "peers": "--peers", "dtype": "--dtype"}

MEASURES = {
    "median_ms": "median ms",
    "quantiles_20_80": "20–80 %",
    "ratio": "× as fast",
    "peak_gib": "peak GiB",
    "tflops": "TFLOP/s",
    "of_ceiling": "of ceiling",
}  # key of a row -> heading


def run(what: str, out: Path | None = None, *, device: str = "cpu", **options: Any) -> dict[str, Any]:
    """Run a benchmark of ``BENCHES`` and write its report to ``out``, JSON.

    ``options`` that are ``None``, empty or false are the benchmark's own choice.  Raises ``ValueError`` for a name or option
    that does not exist or a file that cannot be written, before anything is measured, and ``BenchError`` for a wrong result.
    """
    if what not in BENCHES:
        raise ValueError(f"there is no benchmark {what!r}; {suggest(what, BENCHES)}")
    function, chosen = BENCHES[what], {name: value for name, value in options.items() if value}
    for name in chosen:
        if name not in inspect.signature(function).parameters:
            raise ValueError(f"the benchmark {what} has no {name}; leave {OPTIONS.get(name, name)} out")
    if out is not None:
        _make_folder(out)
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    report = function(device=where, **chosen)
    if out is not None:
        write_atomically(out, lambda file: file.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode()))
    return report


def _make_folder(out: Path) -> None:
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file for the report, for instance {out / 'bench.json'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ValueError(f"the folder {out.parent} cannot be made ({err.strerror}); choose another --out") from None


def show(report: Mapping[str, Any]) -> None:
    """Print a report: where it was measured, a table, what was checked and what was left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items() if found)
    driver = f", driver {report['driver']}" if report["driver"] else ""
    console.print(f"hrsam bench {report['bench']} on {report['device']}{driver}, {versions}", markup=False)
    headings, rows = table(report["rows"])
    shown = Table()
    for heading in headings:
        shown.add_column(heading, justify="left" if heading in ("name", "preset", "pass") else "right")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for line in remarks(report):
        console.print(line, markup=False)


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; measures that no row has are left out."""
    hidden = {*MEASURES, "repeats", "ratio_to"}
    labels = [key for key in rows[0] if key not in hidden] if rows else []
    measures = {key: text for key, text in MEASURES.items() if any(row[key] is not None for row in rows)}
    cells = [[_cell(key, row[key]) for key in (*labels, *measures)] for row in rows]
    return [*labels, *measures.values()], cells


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "quantiles_20_80":
        return "–".join(f"{v:.4g}" for v in value)
    if key == "of_ceiling":
        return f"{100 * value:.0f} %"
    return f"{value:.3g}" if key == "ratio" else f"{value:.4g}" if isinstance(value, float) else str(value)


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Lines below the table."""
    lines = []
    ceiling = report["ceilings"]
    if ceiling["bf16_tflops"] is not None:
        lines.append(f"ceilings: copy {ceiling['copy_tb_s']} TB/s, bfloat16 product {ceiling['bf16_tflops']} TFLOP/s")
    compared = sorted({row["ratio_to"] for row in report["rows"] if row["ratio_to"]})
    if compared:
        lines.append(f"× as fast as: {'; '.join(compared)}")
    if report["errors"]:
        worst = max(report["errors"], key=lambda entry: entry["of_budget"])
        lines.append(
            f"checked before timing: {len(report['errors'])} results within their error budgets, "
            f"nearest {worst['name']} at {100 * worst['of_budget']:.0f} %"
        )
    lines += [f"skipped: {entry['name']}: {entry['why']}" for entry in report["skipped"]]
    return [*lines, *(f"note: {note}" for note in report["notes"])]
