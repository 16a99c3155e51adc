"""One thread that owns the model: a bounded queue, fair turns between desks, and the way out when memory ends."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

log = logging.getLogger("hrsam")

KINDS = ("busy", "refused", "superseded", "memory", "gone")


class Refusal(Exception):
    """Why something was not done: one of ``KINDS``, and one sentence for the person who asked."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        assert kind in KINDS
        self.kind, self.text = kind, text


@dataclass(eq=False)
class Work:
    """Something for the engine's thread to do: ``run()`` becomes the result of ``future``.

    ``about``: what it changes, and ``round``: whether an undo takes it back; both for :meth:`Engine.drop`.
    ``waited``: seconds until it was begun.
    """

    run: Callable[[], Any]
    about: Hashable = None
    round: bool = False
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0


class Engine:
    """Works through what was submitted, one thing at a time, one from each desk in turn.

    ``each``, ``total``: most that may wait of one desk and of all.  ``relief``: called when memory has run out, to drop what
    can be made again; the work is then tried once more.  ``advice``: what to tell the person when that fails too.
    """

    def __init__(
        self, each: int, total: int, relief: Sequence[Callable[[], None]] = (), advice: Callable[[], str] = str
    ):
        self._each, self._total = each, total
        self._relief, self._advice = relief, advice
        self._waiting: OrderedDict[Hashable, deque[Work]] = OrderedDict()  # the first desk's turn is next
        self._count = 0
        self._change = threading.Condition()
        self._stopped = False
        self._threads = torch.get_num_threads()  # counted by thread, and their number shows in the last bits
        self._thread = threading.Thread(target=self._loop, name="hrsam-engine", daemon=True)
        self._thread.start()

    def submit(self, desk: Hashable, work: Work) -> Future[Any]:
        """Put ``work`` at the end of its desk's queue; :class:`Refusal` "busy" when too much waits."""
        with self._change:
            if self._stopped:
                raise Refusal("gone", "the server is stopping; connect again")
            mine = self._waiting.get(desk, ())
            if len(mine) >= self._each:
                raise Refusal("busy", f"{self._each} commands are waiting already; try again when one is answered")
            if self._count >= self._total:
                raise Refusal("busy", "the server has too much to do; try again in a few seconds")
            self._waiting.setdefault(desk, deque()).append(work)
            self._count += 1
            self._change.notify()
        return work.future

    def drop(self, desk: Hashable, about: Hashable, *, newest: bool) -> int:
        """Take back rounds on ``about`` that wait: all, or the ``newest`` if nothing on ``about`` came after it; how many.

        Their futures get a :class:`Refusal` "superseded".
        """
        with self._change:
            mine = [work for work in self._waiting.get(desk, ()) if work.about == about]
            dropped = [work for work in (mine[-1:] if newest else mine) if work.round]
            for work in dropped:
                self._waiting[desk].remove(work)
            self._count -= len(dropped)
            if dropped and not self._waiting[desk]:
                del self._waiting[desk]
        for work in dropped:
            work.future.set_exception(Refusal("superseded", "it was taken back before it was begun"))
        return len(dropped)

    def stop(self) -> None:
        """Finish what is begun, refuse the rest, end the thread."""
        with self._change:
            self._stopped = True
            left = [work for waiting in self._waiting.values() for work in waiting]
            self._waiting.clear()
            self._count = 0
            self._change.notify()
        for work in left:
            work.future.set_exception(Refusal("gone", "the server is stopping; connect again"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        while (work := self._next()) is not None:
            work.waited = time.perf_counter() - work.since
            try:
                result = self._try(work.run)
            except BaseException as error:
                work.future.set_exception(error)
            else:
                work.future.set_result(result)
            del work  # what it holds must not outlive it

    def _next(self) -> Work | None:
        with self._change:
            while not self._waiting and not self._stopped:
                self._change.wait()
            if self._stopped:
                return None
            desk, waiting = self._waiting.popitem(last=False)
            work = waiting.popleft()
            if waiting:
                self._waiting[desk] = waiting  # behind all others
            self._count -= 1
            return work

    def _try(self, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            if not is_exhaustion(error):
                raise
        log.warning("memory ran out; what can be made again is dropped, and one more try is made")
        self.relieve()  # outside of the except clause: the error's frames hold what filled the memory
        try:
            return run()
        except Exception as error:
            if not is_exhaustion(error):
                raise
        self.relieve()
        raise Refusal("memory", f"there is not enough memory for this; {self._advice()}")

    def relieve(self) -> None:
        for drop in self._relief:
            drop()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_exhaustion(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a CPU or a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)  # of PyTorch's and of OpenCV's errors, which have no type of their own
    return "can't allocate memory" in text or "Insufficient memory" in text
