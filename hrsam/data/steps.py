"""Which things a step of a training takes, and loading them ahead of it."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import lru_cache
from typing import TypeVar

import numpy as np

from hrsam.data.workers import ahead

Task = TypeVar("Task")
Result = TypeVar("Result")


class Epochs:
    """Positions since the first step -> one of ``count`` things.

    An epoch is a permutation of all of them, drawn from ``seed`` and its number; epochs follow one another without a gap.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._order = lru_cache(maxsize=2)(self._permutation)

    def at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        return int(self._order(epoch)[place])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.argsort(np.random.default_rng([0, self.seed, epoch]).random(self.count), kind="stable")


def load_steps(
    load: Callable[[Task], Result],
    tasks: Callable[[int, int], Sequence[Task]],
    ranks: Sequence[int],
    first: int,
    *,
    workers: int,
    most: int,
    patience: float,
    name: Callable[[Task], str],
    broken: Future[None] | None = None,
) -> Generator[tuple[int, int, list[Result]], None, None]:
    """(step, rank, what ``load`` makes of ``tasks(step, rank)``): steps from ``first`` on without end, each with all ``ranks``.

    Loaded by processes that run ahead over the steps' borders, see :func:`hrsam.data.workers.ahead` for the rest.
    """
    dealt: deque[tuple[int, int, int]] = deque()

    def all_tasks() -> Iterator[Task]:
        for step in itertools.count(first):
            for rank in ranks:
                mine = tasks(step, rank)
                dealt.append((step, rank, len(mine)))
                yield from mine

    loaded = ahead(load, all_tasks(), workers=workers, most=most, patience=patience, name=name, broken=broken)
    with closing(loaded):
        for result in loaded:
            step, rank, count = dealt.popleft()
            yield step, rank, [result, *itertools.islice(loaded, count - 1)]
