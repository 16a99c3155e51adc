"""One thread that owns the model: a bounded queue, fair turns between desks, and the way out when memory ends.

What takes long is done in pieces, one a turn, so that others come in between.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

log = logging.getLogger("hrsam")

T = TypeVar("T")

STOPPING = "the server is stopping; connect again"
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
    ``long``: ``run()`` gives a generator, which does a piece at a time and returns the result; between two pieces it can be
    taken back, until :meth:`Engine.settle`.  ``tell``: is called after each with what the generator gave.
    ``ahead``: changes nothing and need not wait until long work of its desk that is begun is done.
    ``waited``: seconds until it was begun.
    """

    run: Callable[[], Any]
    about: Hashable = None
    round: bool = False
    long: bool = False
    tell: Callable[[Any], None] | None = None
    ahead: bool = False
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    begun: bool = False
    pieces: Generator[Any, None, Any] | None = None
    failures: int = 0  # times that memory ran out


_MORE = object()  # not the result yet


def apart(run: Callable[[], T]) -> T:
    """What ``run`` returns or raises, in a thread that ends with it.

    Whatever computes before an engine does so here.  OpenMP keeps helpers for each thread that has computed, and when there are
    more of them than cores none waits awake for its next piece of work: the engine's small steps would take four times as long.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        return future.result()
    finally:
        if future.done():
            thread.join()


class Engine:
    """Works through what was submitted, one thing at a time, one from each desk in turn, each desk's in order.

    ``each``, ``total``: most that may wait of one desk and of all.  ``relief``: called when memory has run out, to drop what
    can be made again; the work is then tried once more.  ``advice``: what to tell the person when that fails too.
    """

    def __init__(
        self, each: int, total: int, relief: Sequence[Callable[[], None]] = (), advice: Callable[[], str] = str
    ):
        self._each, self._total = each, total
        self._relief, self._advice = relief, advice
        self._waiting: OrderedDict[Hashable, deque[Work]] = OrderedDict()  # the first desk's turn is next
        self._count = 0  # of those not begun
        self._now: tuple[Hashable, Work] | None = None  # long work whose piece is being done, until it is settled
        self._change = threading.Condition()
        self._stopped = False
        self._threads = torch.get_num_threads()  # counted by thread, and their number shows in the last bits
        self._thread = threading.Thread(target=self._loop, name="hrsam-engine", daemon=True)
        self._thread.start()

    def submit(self, desk: Hashable, work: Work) -> Future[Any]:
        """Put ``work`` at the end of its desk's queue; :class:`Refusal` "busy" when too much waits."""
        with self._change:
            if self._stopped:
                raise Refusal("gone", STOPPING)
            mine = [one for one in self._waiting.get(desk, ()) if not one.begun]
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
            mine = self._about(desk, about)
            dropped = [work for work in (mine[-1:] if newest else mine) if work.round]
            self._take_back(desk, dropped)
        return len(dropped)

    def drop_long(self, desk: Hashable, about: Hashable) -> int:
        """Take back all long work on ``about``, begun or not, as :meth:`drop` does; how many."""
        with self._change:
            dropped = [work for work in self._about(desk, about) if work.long]
            self._take_back(desk, dropped)
        return len(dropped)

    def settle(self) -> bool:
        """From now on the long work that is being done cannot be taken back; False when it was.

        To be called by itself, before it changes anything and after its last piece.
        """
        with self._change:
            kept = self._now is not None
            self._now = None
            return kept

    def _about(self, desk: Hashable, about: Hashable) -> list[Work]:
        """What can be taken back or came later, in order."""
        now = [self._now[1]] if self._now is not None and self._now[0] == desk else []
        return [work for work in (*now, *self._waiting.get(desk, ())) if work.about == about]

    def _take_back(self, desk: Hashable, dropped: Iterable[Work]) -> None:
        for work in dropped:
            if self._now is not None and self._now[1] is work:
                self._now = None
            else:
                self._waiting[desk].remove(work)
                if not self._waiting[desk]:
                    del self._waiting[desk]
                self._count -= not work.begun
            text = "it was taken back before it was done" if work.begun else "it was taken back before it was begun"
            work.future.set_exception(Refusal("superseded", text))

    def stop(self) -> None:
        """Finish what is begun, refuse the rest, end the thread."""
        with self._change:
            self._stopped = True
            left = [work for waiting in self._waiting.values() for work in waiting]
            self._waiting.clear()
            self._count = 0
            self._change.notify()
        for work in left:
            work.future.set_exception(Refusal("gone", STOPPING))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        while (turn := self._next()) is not None:
            desk, work = turn
            try:
                result = self._try(work)
            except BaseException as error:
                self._end(work, error=error)
            else:
                if result is not _MORE:
                    self._end(work, result)
                elif not self._go_on(desk, work):
                    work.pieces = None
            del turn, work  # what it holds must not outlive it

    def _next(self) -> tuple[Hashable, Work] | None:
        with self._change:
            while not self._waiting and not self._stopped:
                self._change.wait()
            if self._stopped:
                return None
            desk, waiting = self._waiting.popitem(last=False)
            work = waiting[0]
            if work.begun:
                work = next((one for one in waiting if one.ahead), work)
            waiting.remove(work)
            if waiting:
                self._waiting[desk] = waiting  # behind all others
            if not work.begun:
                self._count -= 1
                work.begun, work.waited = True, time.perf_counter() - work.since
            self._now = (desk, work) if work.long else None
            return desk, work

    def _go_on(self, desk: Hashable, work: Work) -> bool:
        """Put begun work where its next turn is; False when it was taken back meanwhile."""
        with self._change:
            if self._now is None:
                return False
            self._now = None
            if self._stopped:
                work.future.set_exception(Refusal("gone", STOPPING))
                return False
            self._waiting.setdefault(desk, deque()).appendleft(work)
            self._waiting.move_to_end(desk)
            return True

    def _end(self, work: Work, result: Any = None, error: BaseException | None = None) -> None:
        with self._change:
            self._now = None
            if work.future.done():  # it was taken back
                return
        if error is None:
            work.future.set_result(result)
        else:
            work.future.set_exception(error)

    def _try(self, work: Work) -> Any:
        """The result, or ``_MORE`` after a piece of it."""
        while True:
            try:
                return self._piece(work)
            except Exception as error:
                if not is_exhaustion(error):
                    raise
            # outside of the except clause: the error's frames hold what filled the memory
            work.pieces = None  # long work begins anew
            work.failures += 1
            if work.failures == 1:
                log.warning("memory ran out; what can be made again is dropped, and one more try is made")
            self.relieve()
            if work.failures > 1:
                raise Refusal("memory", f"there is not enough memory for this; {self._advice()}")

    def _piece(self, work: Work) -> Any:
        if not work.long:
            return work.run()
        pieces = work.pieces or work.run()
        work.pieces = pieces
        try:
            told = next(pieces)
        except StopIteration as end:
            return end.value
        if work.tell is not None:
            work.tell(told)
        return _MORE

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
