"""How a run says where it is: sums between two lines of its log, the log itself, a live bar, TensorBoard.

All three reports show the same line of plain values.  After a resume the log and the curves go on from the checkpoint's step:
what was written after it is taken back.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hrsam.checkpoint import write_atomically
from hrsam.images import write_png

log = logging.getLogger("hrsam")

LOG = "log.jsonl"
PICTURE = "last.png"
BOARD = "tensorboard"


class Meter:
    """Means and counts since the last line.  They stay on the device; reading them waits for it, so only few calls do.

    Its ``state`` belongs into a checkpoint, so that a line is the same when a run was interrupted before it.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None  # of the curves since the last line, then of the counts since the first step
        self.curves = self.steps = 0
        self.since, self.before = time.monotonic(), {}

    def add(self, curves: Mapping[str, Tensor], counts: Mapping[str, Tensor]) -> None:
        """What one step measured, scalars: ``curves`` are averaged over steps, ``counts`` added up and divided by time."""
        names = (*curves, *counts)
        values = torch.stack([*curves.values(), *counts.values()]).detach().double()
        if self.sums is None:
            self.names, self.curves, self.sums = names, len(curves), torch.zeros_like(values)
        assert names == self.names, "all steps measure the same"
        self.sums = self.sums.to(values.device) + values
        self.steps += 1

    def line(self) -> dict[str, float]:
        """Means, totals and rates (``images`` and ``images_per_s``) since the last line; begins the next one."""
        state, now = self.state(), time.monotonic()
        values = dict(zip(self.names, state["sums"]))
        line = {name: round(values[name] / self.steps, 4) for name in self.names[: self.curves]}
        for name in self.names[self.curves :]:
            line[name] = round(values[name])
            line[f"{name}_per_s"] = round((values[name] - self.before.get(name, 0)) / max(1e-9, now - self.since), 1)
        assert self.sums is not None
        self.sums[: self.curves] = 0
        self.steps, self.since, self.before = 0, now, values
        return line

    def state(self) -> dict[str, Any]:
        sums = [] if self.sums is None else self.sums.tolist()
        return {"names": list(self.names), "curves": self.curves, "steps": self.steps, "sums": sums}

    def load(self, state: Mapping[str, Any]) -> None:
        self.names, self.curves, self.steps = tuple(state["names"]), state["curves"], state["steps"]
        self.sums = torch.tensor(state["sums"], dtype=torch.float64) if self.names else None
        self.since, self.before = time.monotonic(), dict(zip(self.names, state["sums"]))


def used_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a CUDA device, or what this process takes now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil  # accelerate needs it too

    return psutil.Process().memory_info().rss / 2**30


class Reports:
    """``log.jsonl``, ``last.png`` and ``tensorboard/`` in ``out``, and with ``live`` a bar on stderr.

    ``step``: the checkpoint's, later lines are taken back; ``total``: length of the run in the unit of :meth:`advance`.
    Close it in any case, a terminal is left in order then.  Raises ``OSError`` when a file cannot be written.
    """

    def __init__(self, out: Path, step: int, total: float, live: bool):
        self.path = out / LOG
        _cut(self.path, step)
        self.board = _board(out / BOARD, step)
        self.bar = _Bar(total) if live else None

    def advance(self, place: float) -> None:
        """The run is at ``place`` now; nothing is read from the device."""
        if self.bar is not None:
            self.bar.advance(place)

    def write(self, line: Mapping[str, Any]) -> None:
        """One line for the log, with its ``step``."""
        log.info("%s", line)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.board is not None:
            for name in line.keys() - {"step"}:
                self.board.add_scalar(f"train/{name}", line[name], line["step"])
        if self.bar is not None:
            self.bar.tell(line)

    def picture(self, pixels: np.ndarray, step: int) -> None:
        """``pixels`` (H, W, 3) uint8 RGB, for TensorBoard and as a file."""
        write_png(self.path.with_name(PICTURE), pixels)
        if self.board is not None:
            self.board.add_image("train/clicks", pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Before a checkpoint: what it counts as reported must be on the disk."""
        if self.board is not None:
            self.board.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()


def _cut(path: Path, step: int) -> None:
    """Drop lines after ``step``, and one that a killed process left unfinished; ``ValueError`` for a line nobody here wrote."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for n, line in enumerate(lines, 1) if line.endswith(b"\n") and _step_of(line, f"{path}:{n}") <= step]
    if len(kept) < len(lines):
        write_atomically(path, lambda file: file.write(b"".join(kept)))


def _step_of(line: bytes, where: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{where} is no line of a run's log; remove the line, or give another out") from None


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, which hides what earlier files of ``folder`` hold after ``step``; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        log.warning("no curves for TensorBoard (%s); for them run: pip install 'hrsam[train]'", err)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class _Bar:
    """One line: how far, how long still, what the last line of the log said as far as the terminal is wide."""

    def __init__(self, total: float):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column

        words = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        columns = (BarColumn(10), TaskProgressColumn(), TimeRemainingColumn(), words)
        self.progress = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
        self.task = self.progress.add_task("starting", total=total)
        self.progress.start()

    def advance(self, place: float) -> None:
        self.progress.update(self.task, completed=place)

    def tell(self, line: Mapping[str, Any]) -> None:
        self.progress.update(self.task, description=in_words(line))

    def close(self) -> None:
        self.progress.stop()


def in_words(line: Mapping[str, Any]) -> str:
    """The line of the log as a person reads it beside the bar."""
    shown = [f"step {line['step']}", f"{line['side']} px"]
    shown += [f"{name} {line[name]:.3f}" for name in line if name == "loss" or name.startswith("iou")]
    shown += [f"{_short(line[name])} {name[:-6]}/s" for name in line if name.endswith("_per_s")]
    if line.get("waiting", 0) > 0.1:
        shown.append(f"waits {line['waiting']:.0%} for data")
    return " · ".join([*shown, f"{line['memory_gib']:.1f} GiB"])


def _short(rate: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.1f}{letter}"
    return f"{rate:.1f}"
