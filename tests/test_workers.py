"""Processes that run ahead: order, bounds, what is raised, and what is said of one that dies or stands still."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from concurrent.futures import Future
from contextlib import closing

import numpy as np
import pytest

from hrsam.data import workers
from hrsam.data.workers import WorkerError, ahead, one_ahead

QUICK = pytest.mark.usefixtures("quick_processes")


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


def arrays(number):
    rng = np.random.default_rng(number)
    large = rng.integers(0, 256, (3, 700, 900 + number), dtype=np.uint8)
    flags = rng.random((2, 5)) < 0.5
    return {
        "large": large,
        "turned": large[:, ::-2].T,
        "flags": flags,
        "none": np.zeros((0, 4), np.float32),
        "n": number,
    }


@QUICK
def test_arrays_come_as_they_are_and_can_be_written_to():
    """Whatever their layout, and however many pipes' fillings they are long."""
    with closing(ahead(arrays, range(5), workers=2, most=3, patience=60, name=str)) as results:
        for number, got in enumerate(results):
            want = arrays(number)
            assert got.pop("n") == want.pop("n")
            for name, array in want.items():
                assert got[name].dtype == array.dtype
                assert np.array_equal(got[name], array), name
                got[name][...] = 1


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


@QUICK
def test_what_a_function_raises_is_raised_here():
    results = ahead(fail, range(5), workers=1, most=2, patience=60, name=str)
    with pytest.raises(ValueError, match="no 0"):
        next(results)
    with pytest.raises(RuntimeError, match="an answer cannot be sent"):
        next(ahead(unpicklable, range(5), workers=1, most=2, patience=60, name=str))
    with pytest.raises((AttributeError, pickle.PicklingError)):  # a task that cannot be sent
        next(ahead(fail, [lambda: 0], workers=1, most=2, patience=60, name=str))
    assert multiprocessing.active_children() == []


@QUICK
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (die, r"process \d+ was killed by SIGKILL while it worked on picture 3"),
        (freeze, r"process \d+ has not answered for 1 seconds while it worked on picture 3"),
        (leave, r"process \d+ ended with code 7 while it worked on picture 0"),
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


# ---------------------------------------------------------------- one more, made by a thread


def counted(upto, made):
    for number in range(upto):
        made.append(number)
        yield number
    raise ValueError(f"no {upto}")


def test_the_next_item_is_made_while_one_is_in_use_and_no_other():
    made = []
    before = set(threading.enumerate())
    items = one_ahead(counted(3, made), Future())
    assert made == []
    for number in range(2):
        assert next(items) == number
        end = time.monotonic() + 30
        while len(made) < number + 2:
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == number + 2
    assert next(items) == 2
    with pytest.raises(ValueError, match="no 3"):  # in its place, behind the items that could be made
        next(items)
    assert list(one_ahead((n for n in range(4)), Future())) == [0, 1, 2, 3]
    assert set(threading.enumerate()) <= before


@QUICK
def test_closing_does_not_wait_for_what_is_being_made():
    """Neither for a process that stands still, however patient one is with it, nor before the first item."""
    for taken in (0, 3):
        broken = Future()
        results = ahead(freeze, range(9), workers=1, most=1, patience=600, name=str, broken=broken)
        items = one_ahead(results, broken)
        assert [next(items) for _ in range(taken)] == list(range(taken))
        began = time.monotonic()
        items.close()
        assert time.monotonic() - began < 5
        assert multiprocessing.active_children() == []
