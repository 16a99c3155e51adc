"""One thread for the model: turns, limits, what is taken back, and memory that runs out."""

import threading
import weakref

import pytest
import torch

from hrsam.demo.engine import Engine, Refusal, Work, is_exhaustion


@pytest.fixture
def engine():
    """Each desk may have 3 waiting, all together 5; it begins on ``open`` and its work is noted in ``done``."""
    made = Engine(3, 5)
    made.open, made.done = threading.Event(), []
    began = threading.Event()

    def hold():
        began.set()
        made.open.wait(10)

    made.submit("first", Work(hold))
    assert began.wait(10)
    yield made
    made.open.set()
    made.stop()


def note(engine, name, **options):
    return Work(lambda: engine.done.append(name) or name, **options)


def refusal(future):
    with pytest.raises(Refusal) as caught:
        future.result(10)
    return caught.value.kind


def test_desks_take_turns_and_each_keeps_its_order(engine):
    futures = [engine.submit(name[0], note(engine, name)) for name in ("a1", "a2", "a3", "b1", "c1")]
    engine.open.set()
    assert [future.result(10) for future in futures] == ["a1", "a2", "a3", "b1", "c1"]
    assert engine.done == ["a1", "b1", "c1", "a2", "a3"]


def test_too_much_of_one_desk_and_of_all_is_busy(engine):
    for number in range(3):
        engine.submit("a", note(engine, number))
    with pytest.raises(Refusal, match="3 commands are waiting") as caught:
        engine.submit("a", note(engine, 9))
    assert caught.value.kind == "busy"
    engine.submit("b", note(engine, 3))
    last = engine.submit("b", note(engine, 4))
    with pytest.raises(Refusal, match="too much to do"):
        engine.submit("c", note(engine, 9))
    engine.open.set()
    last.result(10)
    assert sorted(engine.done) == [0, 1, 2, 3, 4]
    assert engine.submit("c", note(engine, 5)).result(10) == 5


def test_only_the_newest_round_of_that_object_is_taken_back(engine):
    old = engine.submit("a", note(engine, "old", about=1, round=True))
    new = engine.submit("a", note(engine, "new", about=1, round=True))
    other = engine.submit("a", note(engine, "other", about=2, round=True))
    elsewhere = engine.submit("b", note(engine, "elsewhere", about=1, round=True))
    assert engine.drop("a", 1, newest=True) == 1
    assert refusal(new) == "superseded"
    engine.open.set()
    assert [f.result(10) for f in (old, other, elsewhere)] == ["old", "other", "elsewhere"]


def test_a_command_that_came_after_the_round_keeps_it(engine):
    engine.submit("a", note(engine, "click", about=1, round=True))
    engine.submit("a", note(engine, "redo", about=1))
    assert engine.drop("a", 1, newest=True) == 0
    assert engine.drop("a", 2, newest=True) == 0
    assert engine.drop("z", 1, newest=True) == 0


def test_all_rounds_of_an_object_are_taken_back(engine):
    futures = [engine.submit("a", note(engine, n, about=1, round=n != 1)) for n in range(3)]
    assert engine.drop("a", 1, newest=False) == 2
    assert [refusal(futures[0]), refusal(futures[2])] == ["superseded"] * 2
    for name in "aabb":  # their places are free again
        engine.submit(name, note(engine, name))
    engine.open.set()
    futures[1].result(10)
    engine.stop()
    assert engine.done[0] == 1


def test_what_is_begun_cannot_be_taken_back(engine):
    assert engine.drop("first", None, newest=False) == 0


def test_an_error_goes_to_who_asked_and_the_next_is_done(engine):
    def fail():
        raise ValueError("mine")

    future = engine.submit("a", Work(fail))
    after = engine.submit("a", note(engine, "after"))
    engine.open.set()
    with pytest.raises(ValueError, match="mine"):
        future.result(10)
    assert after.result(10) == "after"


def test_stop_refuses_what_waits_and_what_comes(engine):
    waiting = engine.submit("a", note(engine, "a"))
    engine.open.set()
    engine.stop()
    if not waiting.exception(10):
        assert engine.done == ["a"]
    with pytest.raises(Refusal, match="stopping"):
        engine.submit("a", note(engine, "b"))


class Arrays:
    """Stands for what fills the memory."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_runs_out_is_made_free_and_tried_once_more(error, times):
    calls, kept, dropped = [], [], []
    engine = Engine(9, 9, [lambda: dropped.append([ref() for ref in kept])], lambda: "use a smaller side")

    def run():
        calls.append(1)
        big = Arrays()
        kept.append(weakref.ref(big))
        if len(calls) <= times:
            raise error.with_traceback(None)
        return "done"

    try:
        future = engine.submit("a", Work(run))
        if times == 1:
            assert future.result(10) == "done"
        else:
            assert refusal(future) == "memory"
            assert str(future.exception()) == "there is not enough memory for this; use a smaller side"
        assert len(calls) == 2
        assert len(dropped) == times
        assert engine.submit("a", Work(lambda: "next")).result(10) == "next"
    finally:
        engine.stop()


def test_frames_of_the_failed_try_are_gone_before_the_next():
    alive = []
    engine = Engine(9, 9)

    def run():
        alive.append([ref() for ref in references])
        big = Arrays()
        references.append(weakref.ref(big))
        if len(references) == 1:
            raise MemoryError
        return True

    references = []
    assert engine.submit("a", Work(run)).result(10)
    engine.stop()
    assert alive == [[], [None]]


def test_other_errors_are_no_exhaustion():
    assert not is_exhaustion(RuntimeError("shapes differ"))
    assert not is_exhaustion(ValueError("can't"))


def test_the_engine_computes_with_as_many_threads_as_its_maker():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        engine = Engine(1, 1)
        assert engine.submit("a", Work(torch.get_num_threads)).result(10) == 3
        engine.stop()
    finally:
        torch.set_num_threads(before)
