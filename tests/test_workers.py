"""Processes that run ahead: order, bounds, what is raised, and what is said of one that dies or stands still."""

import multiprocessing
import os
import pickle
import signal
import time

import pytest

from hrsam.data import workers
from hrsam.data.workers import WorkerError, ahead


def test_results_come_in_order_through_pipes_and_are_not_too_far_ahead():
    asked = []

    def tasks():
        for number in range(12):
            asked.append(number)
            yield number

    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    results = ahead(megabytes, tasks(), workers=2, most=3, patience=60, name=str)
    got = []
    for result in results:
        assert len(asked) <= len(got) + 4
        got.append((result[0], len(result)))
        if shared:
            assert set(os.listdir("/dev/shm")) <= shared
    assert got == [(number, 3_000_000) for number in range(12)]
    assert multiprocessing.active_children() == []


def megabytes(number):
    return bytes([number]) * 3_000_000


def fail(number):
    raise ValueError(f"no {number}")


def unpicklable(number):
    return lambda: number


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave(number):
    os._exit(7)


def freeze(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return number


def test_what_a_function_raises_is_raised_here():
    results = ahead(fail, range(5), workers=1, most=2, patience=60, name=str)
    with pytest.raises(ValueError, match="no 0"):
        next(results)
    with pytest.raises(RuntimeError, match="an answer cannot be sent"):
        next(ahead(unpicklable, range(5), workers=1, most=2, patience=60, name=str))
    with pytest.raises((AttributeError, pickle.PicklingError)):  # a task that cannot be sent
        next(ahead(fail, [lambda: 0], workers=1, most=2, patience=60, name=str))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (die, r"process \d+ was killed by SIGKILL while it loaded picture 3"),
        (freeze, r"process \d+ has not answered for 1 seconds while it loaded picture 3"),
        (leave, r"process \d+ ended with code 7 while it loaded picture 0"),
    ],
)
def test_a_process_that_fails_is_named_with_its_picture(function, message):
    results = ahead(function, range(9), workers=1, most=2, patience=1, name="picture {}".format)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=message):
        list(results)
    assert time.monotonic() - began < 30
    assert multiprocessing.active_children() == []


def test_a_process_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(workers, "START", 0.01)  # none is so quick
    with pytest.raises(WorkerError, match=r"process \d+ has not started"):
        next(ahead(megabytes, range(2), workers=2, most=1, patience=60, name=str))
    assert multiprocessing.active_children() == []
