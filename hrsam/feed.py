"""Batches of a stream for the parts of a run's steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Generic, Protocol, TypeVar

from hrsam.optim import Phase

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)


class Steps(Protocol[Batch_co]):
    """Batches of all steps from ``first`` on, for each of the ``ranks`` in turn, loaded ahead."""

    def batches(self, first: int, ranks: Sequence[int]) -> Generator[Batch_co, None, None]: ...


def own_parts(process: int, accumulate: int) -> range:
    """Which of a step's parts a process computes."""
    return range(process * accumulate, (process + 1) * accumulate)


class Feed(Generic[Batch]):
    """What the parts ``ranks`` of the loop train on; ``stream`` makes what a phase reads from.

    Loading begins with the first step of a phase that is asked for, so a run may end a phase, stop and go on anywhere.
    ``waited``: seconds that :meth:`step` stood still so far.  Close it to end the processes that load.
    """

    def __init__(self, stream: Callable[[Phase], Steps[Batch]], ranks: Sequence[int]):
        self.stream, self.ranks = stream, ranks
        self._phase: Phase | None = None
        self._coming: Generator[Batch, None, None] | None = None
        self._step, self._batches = -1, []
        self.waited = 0.0

    def step(self, phase: Phase, step: int) -> list[Batch]:
        """The batches of a step for all ``ranks``; those of the step before must not be asked for any more."""
        if phase is not self._phase or self._coming is None:
            self.close()
            self._phase = phase
            self._coming = self.stream(phase).batches(step, self.ranks)
        if step != self._step:
            began = time.monotonic()
            self._step, self._batches = step, [next(self._coming) for _ in self.ranks]
            self.waited += time.monotonic() - began
        return self._batches

    def close(self) -> None:
        if self._coming is not None:
            self._coming.close()
        self._coming, self._step, self._batches = None, -1, []
