"""``hrsam evaluate``: play a whole data set, write traces and report."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hrsam import rle
from hrsam.baselines import BASELINES, build_baseline
from hrsam.checkpoint import write_atomically
from hrsam.data.datasets import DATASETS, Dataset, Problem, check, open_dataset
from hrsam.doctor import versions
from hrsam.evaluation import PROTOCOLS, Protocol, seeded, summary
from hrsam.playing import play_all, rank, world
from hrsam.report import FORMAT, Case, compare, draw_case, markdown, page, read_report, worst
from hrsam.segmenters import ModelSegmenter, Segmenter
from hrsam.traces import Trace, read_traces, traces_hash, write_traces
from hrsam.weightfile import sha256
from hrsam.weights import load, locate

Say = Callable[[str], None]
BATCH_CUDA, MAX_BATCH = 8, 1024
"""Samples played in step on a GPU unless another number is given, and the largest such number."""


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate.

    ``dataset``, ``root``: as in :func:`hrsam.data.datasets.open_dataset`.  ``out``: folder for ``traces.jsonl``,
    ``report.json``, ``report.md``, ``report.html``.  ``method``: ``"model"``, then ``model`` is a tag or weight file, or a
    name of :data:`hrsam.baselines.BASELINES`.  ``side``: longest input side in pixels, None for the method's usual one.
    ``tie_seeds``: play that many more times with ties drawn from seeds 0, 1, …, for the spread.  ``replay``: a
    ``traces.jsonl`` whose clicks are made instead of the simulated user's.  ``on_error``: ``"stop"`` or ``"skip"`` when
    something of the data set cannot be used.  ``limit``: only the first so many objects.  ``processes``: 0 for one a core
    on a CPU and one on a GPU; ``threads`` of each.  ``batch``: samples a process plays in step, None for the usual 8 on a GPU
    and 1 on a CPU; baselines take one at a time.
    """

    dataset: str
    root: str
    out: str
    method: str = "model"
    model: str = "hrsam_pp_t.starter"
    side: int | None = None
    device: str = "cpu"
    protocol: Protocol = field(default_factory=Protocol)
    tie_seeds: int = 0
    replay: str | None = None
    on_error: str = "stop"
    limit: int | None = None
    processes: int = 0
    threads: int = 1
    batch: int | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.method != "model" and self.method not in BASELINES:
            raise ValueError(f"unknown method {self.method!r}; choose one of model, {', '.join(BASELINES)}")
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f"on_error is 'stop' or 'skip'; got {self.on_error!r}")
        if self.replay is not None and self.tie_seeds:
            raise ValueError("a replay has no ties to draw; leave out either replay or tie_seeds")
        if self.batch is not None and not 1 <= self.batch <= MAX_BATCH:
            raise ValueError(f"a batch is 1 to {MAX_BATCH} samples; got {self.batch}")
        if self.method != "model" and self.batch not in (None, 1):
            raise ValueError(
                f"the method {self.method} plays one sample at a time; leave out batch={self.batch}, or use processes"
            )

    @property
    def workers(self) -> int:
        if world() > 1:
            return 1
        return self.processes or (1 if self.device.startswith("cuda") else os.cpu_count() or 1)

    @property
    def at_once(self) -> int:
        """Samples that a process plays in step."""
        if self.batch is not None or self.method != "model":
            return self.batch or 1
        return BATCH_CUDA if self.device.startswith("cuda") else 1

    def segmenter(self) -> Segmenter:
        """What plays, loaded."""
        if self.method != "model":
            return build_baseline(self.method, self.side)
        device = self.device
        if device == "cuda" and world() > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return ModelSegmenter(load(self.model, device=device), self.side or 1024, self.protocol.threshold)

    def described(self) -> dict[str, Any]:
        """The method, for the report."""
        if self.method != "model":
            side = build_baseline(self.method, self.side).side
            return {"name": self.method, "kind": "baseline", "preset": None, "weights_sha256": None, "side": side}
        path = locate(self.model)
        preset = load(path).config.preset  # a bad file is refused here, in one sentence, and not in a worker process
        return {
            "name": self.model if path.name != self.model else path.stem,
            "kind": "model",
            "preset": preset,
            "weights_sha256": sha256(path),
            "side": self.side or 1024,
        }


def evaluate(what: Evaluation, say: Say = lambda line: None, progress: bool = False) -> dict[str, Any]:
    """Play everything, write the files, return the report (``report.json``, see :func:`hrsam.report.read_report`).

    Under ``torchrun`` the first process returns the report, the others an empty one.  Raises ``ValueError`` for problems of
    the data set with ``on_error="stop"`` (``say`` gets one line for each), for a folder that holds another evaluation, and
    for everything wrong with weights or settings.
    """
    started = time.perf_counter()
    out = Path(what.out)
    dataset, problems = _usable(what, say)
    if what.limit is not None:
        dataset = replace(dataset, items=dataset.items[: what.limit])
    if not dataset.items:
        raise ValueError(f"{what.root} has no object that can be used; see the problems above")
    method, data_hash = what.described(), dataset.fingerprint()
    out.mkdir(parents=True, exist_ok=True)
    head = {"protocol": asdict(what.protocol), "method": method, "data": {"name": dataset.name, "sha256": data_hash}}
    given = None
    if what.replay is not None:
        given = _replayed(what.replay, dataset)
        head["replay"] = traces_hash(given.values())

    def played(protocol: Protocol, folder: Path) -> list[Trace]:
        said = {**head, "protocol": asdict(protocol)}
        return play_all(
            dataset, what.segmenter, protocol, said, folder,
            given=given, processes=what.workers, threads=what.threads, batch=what.at_once, progress=progress,
        )  # fmt: skip

    traces = played(what.protocol, out / "parts")
    spread = [played(seeded(what.protocol, seed), out / "parts" / f"ties-{seed}") for seed in range(what.tie_seeds)]
    if rank() != 0:
        return {}
    write_traces(out / "traces.jsonl", head, traces)
    report = {
        "format": FORMAT,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": what.command,
        "method": method,
        "protocol": _protocol(what, head),
        "data": {
            "name": dataset.name,
            "samples": len(traces),
            "expected": dataset.expected,
            "note": dataset.note,
            "sha256": data_hash,
            "problems": [{"where": problem.where, "text": problem.text} for problem in problems],
        },
        "machine": _machine(what),
        "summary": _summaries(traces),
        "seconds": _seconds(traces),
        "tie_spread": _spread(spread),
        "trace_sha256": traces_hash(traces),
        "samples": [_listed(trace) for trace in traces],
    }
    _write(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    _write(out / "report.md", markdown(report))
    _write(out / "report.html", page(report, list(_cases(report, dataset, traces))))
    say(f"{len(traces)} objects in {time.perf_counter() - started:.0f} s")
    return report


def choose_protocol(name: str, *, clicks: int = 20, ties: str | None = None, seed: int | None = None) -> Protocol:
    """A protocol by name, with what a person changed of it, which its name then says."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")
    changes = {"clicks": clicks, "ties": ties, "seed": seed}
    usual = PROTOCOLS[name]
    changed = {key: value for key, value in changes.items() if value not in (None, getattr(usual, key))}
    label = " ".join([name, *(f"{key}={value}" for key, value in changed.items())])
    return replace(usual, name=label, **changed)


def choices() -> list[str]:
    """Data sets, methods and protocols, one a line."""
    counts = {name: "" if kind.expected is None else f"{kind.expected} objects, " for name, kind in DATASETS.items()}
    return [
        "data sets:",
        *(f"  {name:14} {counts[name]}{kind.line}" for name, kind in DATASETS.items()),
        "methods:",
        "  model          --model TAG or FILE",
        *(f"  {name}" for name in BASELINES),
        "protocols:",
        *(f"  {name:14} threshold {p.threshold:g}, ties {p.ties}" for name, p in PROTOCOLS.items()),
    ]


def compare_files(paths: Sequence[Path], out: Path | None, *, strict: bool = True) -> str:
    """Compare two or more ``report.json``; the Markdown, and with ``out`` ``compare.md`` and ``compare.html`` in it."""
    text, html = compare([read_report(path) for path in paths], strict=strict)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "compare.md", text)
        _write(out / "compare.html", html)
    return text


def _usable(what: Evaluation, say: Say) -> tuple[Dataset, tuple[Problem, ...]]:
    """The data set without the items that have problems."""
    dataset = open_dataset(what.dataset, what.root)
    problems = check(dataset, threads=what.workers)
    for problem in problems:
        say(f"{problem.where}: {problem.text}")
    if problems and what.on_error == "stop":
        raise ValueError(
            f"{len(problems)} problems in {what.root} (listed above); repair them, or leave these objects out with "
            "--on-error skip"
        )
    bad = {problem.where for problem in problems}
    items = tuple(item for item in dataset.items if item.name not in bad)
    if dataset.expected is not None and len(items) != dataset.expected:
        say(f"{dataset.name}: {len(items)} objects, the published set has {dataset.expected}; not comparable with it")
    return replace(dataset, items=items), problems


def _replayed(path: str, dataset: Dataset) -> dict[str, Trace]:
    """Traces by name; ``ValueError`` when one of the data set's samples is missing."""
    given = {trace.name: trace for trace in read_traces(path)[1]}
    missing = [item.name for item in dataset.items if item.name not in given]
    if missing:
        raise ValueError(
            f"{path} has no trace of {missing[0]} and {len(missing) - 1} more; give traces of this data set"
        )
    return given


def _protocol(what: Evaluation, head: dict[str, Any]) -> dict[str, Any]:
    protocol = asdict(what.protocol)
    text = what.protocol.text()
    if what.replay is not None:
        protocol["name"] = f"replay {head['replay'][:12]} of {protocol['name']}"
        text = ["The clicks of another evaluation were made again, whatever the masks.", *text[5:]]
    if what.at_once > 1:
        text.append(
            f"Up to {what.at_once} samples were played in step: the seconds of a round are divided among them, and the last "
            "bits of a mask depend on what was played together."
        )
    return {**protocol, "text": text}


def _machine(what: Evaluation) -> dict[str, Any]:
    cuda = what.device.startswith("cuda")
    return {
        "device": what.device,
        "device_name": torch.cuda.get_device_name(what.device) if cuda else platform.processor() or platform.machine(),
        "dtype": "float32" if what.method == "model" else None,
        "processes": max(what.workers, world()),
        "threads": what.threads,
        "batch": what.at_once,
        "versions": {"python": platform.python_version(), **versions()},
    }


def _summaries(traces: Sequence[Trace]) -> dict[str, Any]:
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(trace.group, []).append(trace)
    return {"all": summary(traces), "groups": {name: summary(group) for name, group in groups.items()}}


def _seconds(traces: Sequence[Trace]) -> dict[str, float]:
    """Mean seconds: encode a picture, the rest a click."""
    steps = sum(len(trace.clicks) for trace in traces)
    per_click = {key: sum(t.seconds[key] for t in traces) / steps for key in ("decode", "user", "metric")}
    return {
        "encode": sum(trace.seconds["encode"] for trace in traces) / len(traces),
        **per_click,
        "click": sum(per_click.values()),
    }


def _spread(runs: Sequence[Sequence[Trace]]) -> dict[str, Any] | None:
    if not runs:
        return None
    each = [summary(run) for run in runs]
    return {
        "seeds": list(range(len(runs))),
        "noc": {name: [one["noc"][name] for one in each] for name in each[0]["noc"]},
        "iou@5": [one["iou"][4] if len(one["iou"]) > 4 else None for one in each],
    }


def _listed(trace: Trace) -> dict[str, Any]:
    return {
        "name": trace.name,
        "group": trace.group,
        "size": list(trace.size),
        "object": trace.object,
        "clicks": [None if click is None else list(click) for click in trace.clicks],
        "ious": [round(value, 6) for value in trace.ious],
        "boundary_ious": trace.boundary_ious,
        "thin_recall": trace.thin_recall,
    }


def _cases(report: dict[str, Any], dataset: Dataset, traces: Sequence[Trace]) -> Iterator[Case]:
    known = {trace.name: trace for trace in traces}
    items = {item.name: item for item in dataset.items}
    for sample in worst(report):
        name = sample["name"]
        loaded, mask = dataset.load(items[name]), rle.decode(known[name].final)
        yield Case(name, sample, draw_case(loaded.pixels, loaded.mask, mask, sample["clicks"], ignore=loaded.ignore))


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
