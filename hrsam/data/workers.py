"""A function applied to tasks by processes that run ahead, in order, with a watch on them.

Results come through pipes: shared memory is small in containers, and its files outlive a process that is killed.  Arrays are
read from the pipe into the memory where they stay, one call each, without Python's lock.  One thread for each process sends
it a task and waits for the answer, so a process that stands still never blocks the caller.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

Task = TypeVar("Task")
Result = TypeVar("Result")

TICK = 0.5  # seconds between two looks at a process that has not answered
START = 300.0  # seconds for a process to start; a busy machine imports slowly
STOP = 5.0  # seconds for a killed process to be gone


class WorkerError(RuntimeError):
    """A process died or stands still; the message names it and its task."""


def ahead(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    most: int,
    patience: float,
    name: Callable[[Task], str],
    broken: Future[None] | None = None,
) -> Generator[Result, None, None]:
    """``map(function, tasks)`` by ``workers`` processes, at most ``most`` tasks ahead of who asks; 0: here, none ahead.

    ``function`` is a function of a module; tasks and results can be pickled.  What it raises is raised here, in the order of
    the tasks.  ``patience``: seconds without an answer after which a process stands still, counted while somebody waits for
    it; ``name`` of a task, for the message.  Raises :class:`WorkerError` as soon as a process is seen to have died, and what
    another thread sets in ``broken``.  The processes end with the iterator: close it, or use it up.  They end by themselves
    when this process is killed.
    """
    if workers == 0:
        yield from map(function, tasks)
        return
    todo: queue.SimpleQueue[tuple[Future[Any], Any] | None] = queue.SimpleQueue()
    broken = Future() if broken is None else broken
    staff: list[_Worker] = []
    waiting: deque[Future[Any]] = deque()
    try:
        for _ in range(workers):
            staff.append(_Worker(function, todo, broken, name))
        for worker in staff:  # all of them: one that never started would only make everything slower, in silence
            _await_start(worker, broken)
        for task in tasks:
            waiting.append(Future())
            todo.put((waiting[-1], task))
            if len(waiting) > most:
                yield _answer(waiting.popleft(), staff, broken, patience)
        while waiting:
            yield _answer(waiting.popleft(), staff, broken, patience)
    finally:
        for worker in staff:
            worker.stop()
            todo.put(None)


def one_ahead(items: Generator[Result, None, None], broken: Future[None]) -> Generator[Result, None, None]:
    """``items``, each made by a thread while the caller works on the one before; ``broken`` ends their waiting for processes.

    What making an item raises is raised in its place.  The thread ends with the iterator: close it, or use it up.
    """
    end = object()
    thread = ThreadPoolExecutor(1)
    try:
        coming: Future[Any] = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item
    finally:
        _set(broken, WorkerError("the iterator was closed"))
        thread.shutdown()
        items.close()


def _await_start(worker: _Worker, broken: Future[None]) -> None:
    if not wait((worker.started, broken), START, FIRST_COMPLETED).done:
        raise WorkerError(
            f"process {worker.process.pid} has not started within {START:.0f} seconds; is the machine busy?"
        )
    if broken.done():
        broken.result()


def _answer(future: Future[Any], staff: list[_Worker], broken: Future[None], patience: float) -> Any:
    """The result, or an error.  Time is counted in waits, so that a suspended program does not accuse its processes."""
    waited, busy = 0.0, None
    while not wait((future, broken), TICK, FIRST_COMPLETED).done:
        now = next((worker for worker in staff if worker.future is future), None)
        waited, busy = waited + TICK if now is busy else 0.0, now
        if busy is not None and waited >= patience:
            raise WorkerError(
                f"process {busy.process.pid} has not answered for {patience:g} seconds while it worked on {busy.what}; "
                "look at the file and the disk, or raise the patience"
            )
    return broken.result() if broken.done() else future.result()


class _Worker:
    """One process and the thread that talks with it.  ``future``, ``what``: the task it has now, and its name."""

    def __init__(self, function: Callable[[Any], Any], todo: Any, broken: Future[None], name: Callable[[Any], str]):
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks, and pipes that then never close
        self.here, there = context.Pipe()  # of sockets
        self.body = socket.socket(fileno=os.dup(self.here.fileno()))
        self.process = context.Process(target=_serve, args=(function, there), daemon=True)
        self.process.start()
        there.close()
        self.started: Future[None] = Future()
        self.future: Future[Any] | None = None
        self.what = ""
        self._stopped = False
        self._joining = threading.Lock()  # of two threads that wait for one process, one would learn nothing
        threading.Thread(target=self._talk, args=(todo, broken, name), daemon=True).start()

    def stop(self) -> None:
        self._stopped = True
        self.process.kill()  # it holds nothing, and one that stands still hears nothing else
        self._join()

    def _join(self) -> None:
        with self._joining:
            self.process.join(STOP)

    def _talk(self, todo: Any, broken: Future[None], name: Callable[[Any], str]) -> None:
        try:
            self.started.set_result(_receive(self.here, self.body))
            while (given := todo.get()) is not None and not self._stopped:
                future, task = given
                self.what, self.future = name(task), future
                done, value = self._ask(task)
                self.future = None
                if done:
                    future.set_result(value)
                else:
                    future.set_exception(value)
        except (EOFError, OSError):
            self._join()
            if not self._stopped:
                _set(
                    broken,
                    WorkerError(f"{self._end()} while it {'worked on ' + self.what if self.what else 'started'}"),
                )
        finally:
            self.body.close()
            self.here.close()

    def _ask(self, task: Any) -> tuple[bool, Any]:
        try:
            self.here.send(task)
            return _receive(self.here, self.body)
        except (EOFError, OSError):
            raise
        except Exception as error:  # what cannot be pickled
            return False, error

    def _end(self) -> str:
        code, who = self.process.exitcode, f"process {self.process.pid}"
        if code is None or code >= 0:
            return f"{who} ended with code {code}"
        return f"{who} was killed by {signal.Signals(-code).name}"


def _set(broken: Future[None], error: WorkerError) -> None:
    with suppress(InvalidStateError):  # of several deaths the first is told
        broken.set_exception(error)


def _send(value: Any, pipe: Connection, body: socket.socket) -> None:
    """A head, and after it the bytes of each array."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    pipe.send((head, [view.nbytes for view in views]))
    for view in views:
        body.sendall(view)


def _receive(pipe: Connection, body: socket.socket) -> Any:
    head, sizes = pipe.recv()
    arrays = [np.empty(size, np.uint8) for size in sizes]
    for array in arrays:
        view = array.data
        while view.nbytes:  # a signal may cut a call short
            count = body.recv_into(view, flags=socket.MSG_WAITALL)
            if count == 0:
                raise EOFError
            view = view[count:]
    return pickle.loads(head, buffers=arrays)


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """What a process does until its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller gets it too and stops us
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    body = socket.socket(fileno=os.dup(pipe.fileno()))
    try:
        _send(None, pipe, body)
        while True:
            task = pipe.recv()
            try:
                answer = True, function(task)
            except Exception as error:
                answer = False, error
            try:
                _send(answer, pipe, body)
            except OSError:
                raise
            except Exception as error:  # what cannot be pickled
                _send((False, RuntimeError(f"an answer cannot be sent: {error}")), pipe, body)
    except (EOFError, OSError):
        return
