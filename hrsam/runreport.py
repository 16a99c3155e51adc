"""The page of a training: curves of its log, its settings, and how many clicks a mask takes with its weights."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hrsam.checkpoint import load_state, newest_checkpoint, step_of, write_atomically
from hrsam.data.stream import Source
from hrsam.evaluate import Evaluation, evaluate
from hrsam.loop import FOLDER
from hrsam.playing import rank
from hrsam.progress import LOG, PICTURE
from hrsam.release import how_trained, release
from hrsam.report import figures as fig
from hrsam.report import read_report
from hrsam.report.text import safe
from hrsam.report.values import duration
from hrsam.report.webpage import document, figure, html_table
from hrsam.run import RunSettings

Line = Mapping[str, Any]
WEIGHTS, PAGE, NOC = "weights.safetensors", "report.html", "noc"
GROUPS = {  # figures, their curves, and each one's name beside it
    "Loss": {"loss": "loss", "embedding": "embedding", "decoder": "decoder"},
    "IoU with the object, after the first and the last click": {"iou_first": "first", "iou_last": "last"},
    "Cosine between the embeddings of student and teacher": {"cosine": "cosine"},
    "Gradient norm": {"grad_norm": "norm"},
    "Learning rate, millionths": {"lr": "rate"},
    "Pictures and clicks a second": {"images_per_s": "pictures", "clicks_per_s": "clicks"},
}


def write_run_report(
    run: str | Path,
    sets: Sequence[Source] = (),
    *,
    side: int = 1024,
    device: str = "cpu",
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Path | None:
    """Write ``report.html`` into the folder ``run`` of a training and return its path; None in all processes but the first.

    Evaluations of the last checkpoint that were made before are on the page too.  ``sets``: play the clicks of the protocol
    ``frozen`` on them, with the averaged weights, which are left in ``weights.safetensors``, and put the numbers on the page;
    each evaluation has its own report below ``noc/``.  ``limit``: only the first so many objects.
    Raises ``ValueError`` for a folder without a run and for sets that cannot be used.
    """
    run = Path(run)
    folder = run / FOLDER
    path = newest_checkpoint(folder) if folder.is_dir() else None
    if path is None:
        raise ValueError(f"{run} holds no checkpoint; give the folder that was a training's out")
    state = load_state(path)
    if sets and rank() == 0:
        release(run, run / WEIGHTS)
    for one in sets:
        out = (
            run
            / NOC
            / path.stem
            / f"{one.name}-{hashlib.sha256(f'{one.root} {side} {limit}'.encode()).hexdigest()[:8]}"
        )
        what = Evaluation(
            one.name, one.root, str(out), model=str(run / WEIGHTS), side=side, device=device, limit=limit,
            command=shlex.join(["hrsam", "report", str(run)]),
        )  # fmt: skip
        evaluate(what, say=say, progress=progress)
    if rank() != 0:
        return None
    reports = [read_report(found) for found in sorted((run / NOC / path.stem).glob("*/report.json"))]
    log = run / LOG
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    picture = run / PICTURE
    text = page(state, lines, reports, picture.read_bytes() if picture.exists() else None)
    return write_atomically(run / PAGE, lambda file: file.write(text.encode()))


def has_arrived(settings: RunSettings) -> bool:
    """Whether a run made all its steps, or spent its time."""
    path = newest_checkpoint(Path(settings.out) / FOLDER)
    if path is None:
        return False
    if settings.budget is None:
        return step_of(path) >= settings.steps
    return load_state(path)["spent"] >= settings.budget


def page(state: dict[str, Any], lines: Sequence[Line], reports: Sequence[dict[str, Any]], picture: bytes | None) -> str:
    """The page.  ``state`` of the last checkpoint, ``lines`` of the log, ``reports`` of evaluations, ``picture`` PNG."""
    settings = state["settings"]
    name = Path(settings["out"]).name
    tiles = [(f"{state['step']:,}", "steps"), (duration(state["spent"]), "of training")]
    if lines:
        tiles.append((f"{lines[-1]['images']:,}", "pictures"))
    for report in reports:
        tiles.append((f"{report['summary']['all']['noc']['90']:.2f}", f"NoC@90 on {report['data']['name']}"))
    body = [
        f'<header><h1>{safe(name)}</h1><p class="soft small">{safe(how_trained(state, "average"))}</p><div class="tiles">'
        + "".join(f"<div class=tile><b>{safe(n)}</b><span>{safe(t)}</span></div>" for n, t in tiles)
        + "</div></header>"
    ]
    if reports:
        body += ["<h2>Clicks to a mask</h2>", html_table(noc_table(reports))]
        body += ["<p class='soft small'>Averaged weights, protocol frozen, 20 clicks, never stopped early.</p>"]
    body += ["<h2>Curves</h2>", '<section class="figures">', *curves(lines), "</section>"]
    if picture is not None:
        data = base64.b64encode(picture).decode()
        body += ["<h2>What the last steps looked like</h2>"]
        body += [
            f'<img style="max-width:100%" alt="pictures of the last saved step" src="data:image/png;base64,{data}">'
        ]
    written = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    body += ["<h2>Settings</h2>", f'<pre class="wide small">{safe(written)}</pre>']
    return document(name, body)


def noc_table(reports: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["data", "objects", "IoU@1", "IoU@5", "IoU@20", "NoC@80", "NoC@85", "NoC@90", "NoC@95"]
    rows = []
    for report in reports:
        part = report["summary"]["all"]
        ious = [f"{part['iou'][k - 1]:.3f}" for k in (1, 5, 20)]
        clicks = [f"{part['noc'][q]:.2f}" for q in ("80", "85", "90", "95")]
        rows.append([report["data"]["name"], str(part["samples"]), *ious, *clicks])
    return header, rows


def curves(lines: Sequence[Line]) -> list[str]:
    """A figure for each group of the log's curves that the run has."""
    drawn = []
    for caption, names in GROUPS.items():
        known = {name: label for name, label in names.items() if lines and name in lines[0]}
        if known and len(lines) > 1:
            drawn.append(curve(caption, known, lines))
    return drawn or ["<p>The run is too short for curves.</p>"]


def curve(caption: str, names: Mapping[str, str], lines: Sequence[Line]) -> str:
    """One figure; ``names``: curves of the log, and what stands beside them."""
    steps = [line["step"] for line in lines]
    values = [[(1e6 if name == "lr" else 1) * float(line.get(name, "nan")) for line in lines] for name in names]
    every = [v for ys in values for v in ys if math.isfinite(v)]
    low, high = min(0.0, *every), max(0.0, *every)
    axes = fig.Axes((steps[0], steps[-1]), (low, high if high > low else low + 1), right=92)
    drawn = [fig.frame(axes, fig.ticks(*axes.x), fig.ticks(*axes.y), "step", "")]
    styles = [f"c{index}" for index in range(len(values))]
    drawn += [fig.line(axes, steps, ys, style) for ys, style in zip(values, styles)]
    drawn.append(
        fig.end_labels(axes, [(ys[-1], label, style) for ys, label, style in zip(values, names.values(), styles)])
    )
    said = "; ".join(f"{label} {ys[0]:.4g} to {ys[-1]:.4g}" for ys, label in zip(values, names.values()))
    return figure(caption, said, fig.svg(axes, drawn, f"{caption}: {said}"))
