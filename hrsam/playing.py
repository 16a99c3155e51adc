"""Playing all samples of a data set, in one process or many.

Each sample is played alone and the same way wherever and whenever that happens: on a CPU the traces of 1, 2 or 4 processes
are equal to the bit, because every process uses the same number of threads.  Several processes: ``processes`` on this
machine, or ``torchrun``/``accelerate launch``, where each process takes every n-th sample.  What was played lies in a
folder, one file a process, so a run that was stopped goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hrsam.data.index import Dataset, Item
from hrsam.evaluation import Protocol, Segmenter, play, summary
from hrsam.traces import Trace, head_line, in_order, read_traces, write_traces

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
    progress: bool = False,
) -> list[Trace]:
    """All traces in the order of the data set; those in ``folder`` are not played again, new ones are added to it.

    ``make`` (picklable) loads what plays, once a process.  ``head`` says what is played; a folder whose files have another
    one is refused.  ``given``: traces by sample name whose clicks are made instead.  ``progress``: show a bar.
    Raises ``ValueError`` for that, for samples that cannot be read, and when a process died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [item.name for item in dataset.items]
    traces = _kept(folder, head)
    todo = [item for item in dataset.items[rank() :: world()] if item.name not in traces]
    own = folder / f"{rank()}.jsonl"
    if not own.exists():
        write_traces(own, head, [])
    work = (dataset, make, protocol, given, threads)
    count = min(processes, len(todo))
    results = _in_processes(work, todo, count) if count > 1 else _here(work, todo)
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


def _here(work: tuple[Any, ...], todo: Sequence[Item]) -> Iterator[Trace]:
    if not todo:
        return
    before = torch.get_num_threads()
    try:
        _start(*work)
        yield from map(_play, todo)
    finally:
        _use_threads(before)


def _in_processes(work: tuple[Any, ...], todo: Sequence[Item], count: int) -> Iterator[Trace]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _start, work) as pool:
        try:
            for future in as_completed([pool.submit(_play, item) for item in todo]):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process died, perhaps for lack of memory; run the same command again, with fewer --processes"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: Work  # of this process


def _start(dataset: Dataset, make: Callable[[], Segmenter], protocol: Protocol, given: Given, threads: int) -> None:
    global _work
    _use_threads(threads)
    _work = dataset, make(), protocol, given


def _play(item: Item) -> Trace:
    dataset, segmenter, protocol, given = _work
    return play(segmenter, dataset.load(item), protocol, None if given is None else given[item.name])


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
