"""Playing all samples of a data set, in one process or many.

With a batch of 1 each sample is played alone and the same way wherever and whenever that happens: on a CPU the traces of
1, 2 or 4 processes are equal to the bit, because every process uses the same number of threads.  In larger batches, meant
for a GPU, the last bits depend on what is played together.  Several processes: ``processes`` on this machine, or
``torchrun``/``accelerate launch``, where each process takes every n-th sample.  What was played lies in a folder, one file
a process, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hrsam.data.index import Dataset, Item
from hrsam.data.workers import WorkerError, ahead
from hrsam.evaluation import Protocol, play_together, summary
from hrsam.segmenters import Segmenter
from hrsam.traces import Trace, head_line, in_order, read_traces, write_traces

logger = logging.getLogger("hrsam")

PATIENCE = 3600.0  # seconds for one sample in another process

Given = dict[str, Trace] | None
Work = tuple[Dataset, Segmenter, Protocol, Given]


def play_all(
    dataset: Dataset,
    make: Callable[[], Segmenter],
    protocol: Protocol,
    head: dict[str, Any],
    folder: Path,
    *,
    given: Given = None,
    processes: int = 1,
    threads: int = 1,
    batch: int = 1,
    progress: bool = False,
) -> list[Trace]:
    """All traces in the order of the data set; those in ``folder`` are not played again, new ones are added to it.

    ``make`` (picklable) loads what plays, once a process.  ``head`` says what is played; a folder whose files have another
    one is refused.  ``given``: traces by sample name whose clicks are made instead.  ``batch``: samples a process plays in
    step, halved when its memory does not suffice.  ``progress``: show a bar.
    Raises ``ValueError`` for that, for samples that cannot be read, when a process died, and when memory does not suffice
    for one sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [item.name for item in dataset.items]
    traces = _kept(folder, head)
    todo = [item for item in dataset.items[rank() :: world()] if item.name not in traces]
    own = folder / f"{rank()}.jsonl"
    if not own.exists():
        write_traces(own, head, [])
    work = (dataset, make, protocol, given, threads, batch)
    batches = [todo[start : start + batch] for start in range(0, len(todo), batch)]
    count = min(processes, len(batches))
    results = _in_processes(work, batches, count) if count > 1 else _here(work, batches)
    with own.open("a", encoding="utf-8") as file, _bar(progress and rank() == 0, len(names)) as show:
        for trace in results:
            file.write(trace.line() + "\n")
            file.flush()
            traces[trace.name] = trace
            show(traces)
    if world() > 1:
        _wait_for_all()
        traces = _kept(folder, head)
    missing = [name for name in names if name not in traces]
    if missing and rank() == 0:
        raise ValueError(f"{len(missing)} samples were not played, {missing[0]} first; run the same command again")
    return in_order(list(traces.values()), names)


def rank() -> int:
    """Number of this process among those that a launcher started."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes a launcher started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _here(work: tuple[Any, ...], batches: Sequence[Sequence[Item]]) -> Iterator[Trace]:
    if not batches:
        return
    before = torch.get_num_threads()
    try:
        _start(*work)
        for items in batches:
            yield from _play(items)
    finally:
        _use_threads(before)


def _in_processes(work: tuple[Any, ...], batches: Sequence[Sequence[Item]], count: int) -> Iterator[Trace]:
    patience = PATIENCE * max(map(len, batches))
    results = ahead(
        _Playing(work), batches, workers=count, most=2 * count, patience=patience, name=lambda items: items[0].name
    )
    try:
        with closing(results):
            for traces in results:
                yield from traces
    except WorkerError as err:
        raise ValueError(
            f"{err}, perhaps for lack of memory; run the same command again, with fewer --processes"
        ) from None


@dataclass(frozen=True)
class _Playing:
    """What a process does with each batch; it makes its segmenter with the first."""

    work: tuple[Any, ...]

    def __call__(self, items: Sequence[Item]) -> list[Trace]:
        if _work is None:
            end_with_parent()
            _start(*self.work)
        return _play(items)


_work: Work | None = None  # of this process
_at_once: int  # samples this process plays in step


def _start(
    dataset: Dataset, make: Callable[[], Segmenter], protocol: Protocol, given: Given, threads: int, batch: int
) -> None:
    global _work, _at_once
    _use_threads(threads)
    _work, _at_once = (dataset, make(), protocol, given), batch


def end_with_parent() -> None:
    """Let this process end when the one that started it is killed: it would wait for work for ever."""

    def watch(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, args=(multiprocessing.parent_process(),), daemon=True).start()


def _play(items: Sequence[Item]) -> list[Trace]:
    """Play a batch; when memory does not suffice, in halves of it, and so are later ones."""
    global _at_once
    assert _work is not None
    dataset, segmenter, protocol, given = _work
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1)) as pool:
        samples = list(pool.map(dataset.load, items))
    traces: list[Trace] = []
    while part := samples[len(traces) : len(traces) + _at_once]:
        known = None if given is None else [given[sample.name] for sample in part]
        try:
            traces += play_together(segmenter, part, protocol, known)
            continue
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise ValueError(
                    f"the memory of the device does not suffice for {part[0].name}; use a smaller --side or another device"
                ) from None
        _at_once = len(part) // 2  # here, where the error no longer holds on to what it was about
        torch.cuda.empty_cache()
        logger.warning("not enough memory for %d samples at once; going on with %d", len(part), _at_once)
    return traces


def _use_threads(threads: int) -> None:
    import cv2

    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def _kept(folder: Path, head: dict[str, Any]) -> dict[str, Trace]:
    """What earlier runs left in ``folder``; a line that was cut off is dropped from this process's own file."""
    traces: dict[str, Trace] = {}
    for path in sorted(folder.glob("*.jsonl")):
        found, kept = read_traces(path, torn=True)
        if found and json.loads(head_line(found)) != json.loads(head_line(head)):
            raise ValueError(
                f"{path} is of another evaluation (protocol, weights or data differ); choose another --out"
            )
        if path.name == f"{rank()}.jsonl":
            write_traces(path, head, kept)
        traces.update((trace.name, trace) for trace in kept)
    return traces


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[dict[str, Trace]], None]]:
    """A progress bar with the NoC@90 so far."""
    if not wanted:
        yield lambda traces: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("playing", total=total)

        def show(traces: dict[str, Trace]) -> None:
            noc = summary(list(traces.values()))["noc"]["90"]
            bar.update(task, completed=len(traces), description=f"NoC@90 {noc:.2f}")

        yield show


def _wait_for_all() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    dist.barrier()
